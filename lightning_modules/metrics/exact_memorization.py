"""The mean share of the answers' tokens that are a model's first choice, over a data set."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_modules.metrics._base import MeanOverExamples
from lightning_modules.metrics.functional import exact_memorization


class ExactMemorization(MeanOverExamples):
    """Mean exact memorization; for each example `functional.exact_memorization`, which has the formula.

    Direction: lower is better on the forget set, down to the retrained model's score, and `higher_is_better` says that.
    On what is to be kept higher is better.

    A small Llama that memorised 200 TOFU questions (`scratch_model`, two seeds) scores 1.000 on the 40 to be forgotten
    and on the others; trained without them, .121 and .109 on those 40.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = ExactMemorization()
        >>> metric.update(predicted=[[7, 9, 3, 4], [1, 2]], labels=[[7, 8, 3, 4], [1, 2]])
        >>> metric.compute()
        tensor(0.8750, dtype=torch.float64)
    """

    higher_is_better = False

    def update(
        self,
        predicted: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
        labels: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
    ) -> None:
        """Adds n examples.

        Args:
            predicted: argmax tokens under teacher forcing, each `[T_i]`, or `[n, T]`.
            labels: the answers' tokens in the same shape, already shifted; positions labelled -100 are left out.

        Raises:
            ValueError: if there is no example, an example has no labelled token, or the shapes differ.
        """
        self.add(exact_memorization(predicted, labels))  # pyright: ignore[reportArgumentType, reportCallIssue]
