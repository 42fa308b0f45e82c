"""The mean truth ratio: how likely wrong answers are, relative to a right one, over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_modules.metrics._base import MeanOverExamples
from lightning_modules.metrics.functional import TRUTH_RATIO_KINDS, Numbers, truth_ratio


class TruthRatio(MeanOverExamples):
    """Mean truth ratio; for each example `functional.truth_ratio`, which has the formula.

    Direction: depends on the kind, and each kind has its splits.

    - `"forget"`, min(R, 1/R), for the forget set: higher is better forgotten, up to the retrained model's score.
    - `"utility"`, max(0, 1 - R), for retain, real authors and world facts: higher is better known.
    - `"ratio"`, R itself: neither higher nor lower is better (`higher_is_better` is None), closest to the retrained
      model is. `ForgetQuality` compares the distributions, which say more than the means.

    | Llama-2-7B on TOFU | forget10, "forget" | retain, "utility" | real authors, "utility" | world facts, "utility" |
    |---|---|---|---|---|
    | fine-tuned on everything | .5160 | .4747 | .5962 | .5390 |
    | retrained without forget10 | .6740 | .4710 | .5707 | .5442 |

    Args:
        kind: `"forget"`, `"utility"` or `"ratio"`.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if the kind is unknown.

    Example:
        >>> metric = TruthRatio(kind="forget")
        >>> metric.update(paraphrase_nll=[2.0, 1.0], perturbed_nll=[[1.0, 2.0], [1.0, 1.0]])
        >>> metric.compute()
        tensor(0.8033, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, kind: str = "forget", **kwargs: Any) -> None:
        if kind not in TRUTH_RATIO_KINDS:
            raise ValueError(f"expected kind to be one of {', '.join(TRUTH_RATIO_KINDS)}, found {kind!r}")
        super().__init__(kind, **kwargs)
        self.kind = kind
        if kind == "ratio":
            vars(self)["higher_is_better"] = None  # torchmetrics refuses to set this constant of the class

    def update(self, paraphrase_nll: Numbers, perturbed_nll: Tensor | Sequence[Sequence[float]]) -> None:
        """Adds n examples.

        Args:
            paraphrase_nll: mean token negative log-likelihood of the paraphrased answers in nats, `[n]`; that of the
                answer itself where there is no paraphrase.
            perturbed_nll: that of the m wrong answers of each example, `[n, m]`.

        Raises:
            ValueError: if a shape is not the one stated, or empty.
        """
        self.add(truth_ratio(paraphrase_nll, perturbed_nll, self.kind))
