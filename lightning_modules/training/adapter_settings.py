"""What low-rank adapters are, without torch: the command line's options become these settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["lora", "dora", "rslora"]
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterSettings:
    r"""What low-rank adapters are: the output of every adapted weight W becomes $W x + \sigma B A \, x$.

    Attributes:
        rank: r, of A and B; 0 for no adapters.
        alpha: In $\sigma = \alpha / r$, or $\alpha / \sqrt r$ with "rslora". None means twice the rank, as in LoKU.
        targets: "all-linear", every linear weight but the head and those that no adapter fits (Mamba's out_proj, a
            router that is more than a linear layer); or names of modules, whole ("model.layers.0.mlp.up_proj") or their
            last parts ("up_proj").
        dropout: On the adapters' input while training, from 0 to below 1.
        kind: "lora" (2106.09685), "rslora" (2312.03732), or "dora" (2402.09353), which scales every row of
            $W + \sigma B A$ to a length that is trained too.
        init: "default" starts with A random and B = 0, "fila" with what matters most to the forget set, see
            `gradsurgery.lora.fila_`.
        seed: Of the adapters. The global random state is left as it was.
    """

    rank: int
    alpha: float | None = None
    targets: str | Sequence[str] = ALL_LINEAR
    dropout: float = 0.0
    kind: Kind = "lora"
    init: Literal["default", "fila"] = "default"
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError if a setting is outside its domain, or two contradict each other."""
        if self.rank < 0:
            raise ValueError(f"rank: expected a number >= 0, found {self.rank}")
        if self.init not in ("default", "fila"):
            raise ValueError(f"init: expected 'default' or 'fila', found {self.init!r}")
        if self.init == "fila" and not self.rank:
            raise ValueError("init: FILA starts adapters, and a rank of 0 means none; choose a rank such as 8")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, found {self.kind!r}")
        if self.init == "fila" and self.kind == "dora":
            raise ValueError(
                "init: FILA splits W into a residual and B A, which DoRA's lengths would scale together; use kind='lora' or 'rslora'"
            )
        if self.alpha is not None and not 0.0 < self.alpha < math.inf:
            raise ValueError(f"alpha: expected a number > 0, found {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected at least 0 and below 1, found {self.dropout}")
