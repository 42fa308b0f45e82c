"""How far the weights are moved before the forget gradient is taken, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import gradsurgery as gs
from gradsurgery.optimizer.perturbation import Scale


@dataclass(frozen=True)
class PerturbSettings:
    r"""Take the forget gradient where the model would remember best, `UnlearningModule(perturb=...)`.

    In every step the weights are moved by $\rho$ against the gradient of `direction` on the forget batch, the forget
    loss is differentiated there, and the step is taken from where they were (`gradsurgery.Perturbed`). What a short
    fine-tuning would bring back is then forgotten too. Source: 2502.05374, with a radius that is 30 to 100 times theirs
    and about as long as the way that such an attack moves the weights.

    Attributes:
        start: The radius of the first step.
        end: That of the last; the steps between lie on a line. None keeps the first.
        scale: The radius is the length of the whole move ("global"), or for each tensor a multiple of its own length
            ("tensor").
        direction: The loss that is descended on the way, of the kinds that `forget_loss` has.

    Raises:
        ValueError: If a radius is not a positive number, or the scale is unknown.

    Cost: two forward and backward passes of the forget batch instead of one, and a copy of the trained weights.

    Example:
        >>> settings = PerturbSettings(start=0.2, end=1.0)
        >>> [round(settings.radius(step, 5), 2) for step in range(5)]
        [0.2, 0.4, 0.6, 0.8, 1.0]
    """

    start: float
    end: float | None = None
    scale: Scale = "global"
    direction: Any = gs.losses.cross_entropy

    def __post_init__(self) -> None:
        for name, radius in (("start", self.start), ("end", self.end)):
            if radius is not None and not 0.0 < radius < math.inf:
                raise ValueError(f"perturb, {name}: expected a radius > 0, found {radius}")
        if self.scale not in get_args(Scale):
            raise ValueError(f"perturb, scale: expected one of {', '.join(get_args(Scale))}, found {self.scale!r}")

    @property
    def grows(self) -> bool:
        """Whether the radius depends on the step."""
        return self.end is not None and self.end != self.start

    def radius(self, step: int, steps: int) -> float:
        """The radius of a step.

        Args:
            step: Counted from 0.
            steps: Of the whole training.
        """
        if self.end is None or steps <= 1:
            return self.start
        return self.start + (self.end - self.start) * min(1.0, step / (steps - 1))
