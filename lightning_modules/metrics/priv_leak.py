"""PrivLeak: an attack on the unlearned model compared with the same attack on the retrained one, over a data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_modules.metrics._base import ExampleMetric, gathered, nothing_seen
from lightning_modules.metrics.functional import Numbers, auc, priv_leak
from lightning_modules.metrics.functional.numbers import as_numbers


class PrivLeak(ExampleMetric):
    """PrivLeak in percent, `functional.priv_leak` of `functional.auc` over all examples.

    Direction: closest to 0 is best, where the attack does as well on the unlearned model as on the retrained one; so
    `higher_is_better` is None. Below 0 the forget set is still remembered. Above 0, where there is no bound, it was
    unlearned too far.

    A small Llama that memorised 200 TOFU questions (`scratch_model`) scores -100, its AUC being 1; the model retrained
    without the 40 to be forgotten scores 0 by definition. The latter's own AUC, the `reference_auc`, is not 1/2: with
    holdout10 and two seeds .62 and .52 for Min-K at 40 %, .72 and .67 for the loss.

    Args:
        reference_auc: `functional.auc` of the same attack on the retrained model and the same two sets, in [0, 1).
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if the reference is not in [0, 1).

    Example:
        >>> metric = PrivLeak(reference_auc=0.5)
        >>> metric.update(forget_scores=[-0.1, -0.2], holdout_scores=[-3.0])
        >>> metric.update(holdout_scores=[-0.15, -2.0])
        >>> metric.compute()
        tensor(-66.6667, dtype=torch.float64)
    """

    higher_is_better = None

    forget_scores: list[Tensor]
    holdout_scores: list[Tensor]

    def __init__(self, reference_auc: float, **kwargs: Any) -> None:
        priv_leak(reference_auc, reference_auc)  # raises now what compute() would raise after hours
        super().__init__(**kwargs)
        self.reference_auc = float(reference_auc)
        self.add_state("forget_scores", [], dist_reduce_fx="cat")
        self.add_state("holdout_scores", [], dist_reduce_fx="cat")

    def update(self, forget_scores: Numbers | None = None, holdout_scores: Numbers | None = None) -> None:
        """Adds examples of one set or of both.

        Args:
            forget_scores: membership scores of the forget set, `[n]`, for example `functional.min_k_score`; higher
                means more likely a member.
            holdout_scores: those of examples that no model was trained on, `[m]`.

        Raises:
            ValueError: if neither is given, or one is empty or not one-dimensional.
        """
        given = {"forget_scores": forget_scores, "holdout_scores": holdout_scores}
        values = {
            name: as_numbers(scores, name, "[n]", dimensions=1)[0]
            for name, scores in given.items()
            if scores is not None
        }
        if not values:
            raise ValueError("expected forget_scores, holdout_scores or both, found neither")
        for name, scores in values.items():
            getattr(self, name).append(scores.to(self.device))

    def compute(self) -> Tensor:
        """PrivLeak in percent, a float64 scalar; NaN if a score is NaN.

        Raises:
            RuntimeError: if there was no example of one of the sets.
        """
        forget, holdout = gathered(self.forget_scores), gathered(self.holdout_scores)
        for name, scores in (("forget", forget), ("holdout", holdout)):
            if not len(scores):
                raise nothing_seen(self, f" of the {name} set")
        return torch.tensor(
            priv_leak(auc(forget, holdout), self.reference_auc), dtype=torch.float64, device=forget.device
        )
