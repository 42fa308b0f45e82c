"""Whether an unlearned model can be told from one that never saw the forget set."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_modules.metrics._base import ExampleMetric, gathered, nothing_seen
from lightning_modules.metrics.functional import ForgetQualityResult, Numbers, forget_quality
from lightning_modules.metrics.functional.numbers import as_numbers


class ForgetQuality(ExampleMetric):
    """TOFU's forget quality: a Kolmogorov-Smirnov test of truth ratios against those of the retrained model.

    It is `functional.forget_quality` over all examples. A p-value means nothing without n: the same fine-tuned model
    has about 1e-3, 1e-14 and 1e-20 on TOFU's 1, 5 and 10 % splits. So `compute` returns the statistic, p, its base-10
    logarithm and n together. Compare models by `statistic`, or by p at equal n.

    Direction: a higher p-value (and a lower statistic) is better. Llama-2-7B on 300 questions of forget10: fine-tuned
    on everything p = 1.8e-21 (statistic .397), the retrained model 1 by definition, and .999 against a second retrained
    model. At p above .05 the two are usually called indistinguishable.

    Args:
        reference_truth_ratio: `[m]`, `functional.truth_ratio(..., kind="ratio")` of the retrained model on the same
            questions.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if the reference is empty, not one-dimensional, or holds a NaN.

    Example:
        >>> metric = ForgetQuality(reference_truth_ratio=[0.1, 0.2, 0.3, 0.4])
        >>> metric.update([0.3, 0.4])
        >>> metric.update([0.1, 0.2])
        >>> metric.compute()
        ForgetQualityResult(statistic=0.0, pvalue=1.0, log10_pvalue=0.0, n=4)
    """

    higher_is_better = True

    truth_ratio: list[Tensor]

    def __init__(self, reference_truth_ratio: Numbers, **kwargs: Any) -> None:
        reference, _ = as_numbers(reference_truth_ratio, "reference_truth_ratio", "[m]", dimensions=1)
        if reference.isnan().any():
            raise ValueError(
                "reference_truth_ratio: expected numbers that can be ranked, found NaN: the reference diverged"
            )
        super().__init__(**kwargs)
        self.reference_truth_ratio = reference.cpu().clone()
        self.add_state("truth_ratio", [], dist_reduce_fx="cat")

    def update(self, truth_ratio: Numbers) -> None:
        """Adds n examples.

        Args:
            truth_ratio: `[n]`, `functional.truth_ratio(..., kind="ratio")` of the unlearned model on the forget set.

        Raises:
            ValueError: if it is empty or not one-dimensional. NaN raises in `compute` only, in every process alike.
        """
        values, _ = as_numbers(truth_ratio, "truth_ratio", "[n]", dimensions=1)
        self.truth_ratio.append(values.to(self.device))

    def compute(self) -> ForgetQualityResult:
        """`ForgetQualityResult(statistic, pvalue, log10_pvalue, n)` over all examples.

        Raises:
            RuntimeError: if there was no example.
            ValueError: if a truth ratio is NaN, which has no rank.
        """
        values = gathered(self.truth_ratio)
        if not len(values):
            raise nothing_seen(self)
        return forget_quality(values, self.reference_truth_ratio)
