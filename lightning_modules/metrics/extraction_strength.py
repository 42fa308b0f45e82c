"""The mean share of the answers that a model completes by itself, over a data set."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_modules.metrics._base import MeanOverExamples
from lightning_modules.metrics.functional import extraction_strength


class ExtractionStrength(MeanOverExamples):
    """Mean extraction strength; for each example `functional.extraction_strength`, which has the formula.

    Direction: lower is better on the forget set, down to the retrained model's score, and `higher_is_better` says that.
    On what is to be kept higher is better.

    A small Llama that memorised 200 TOFU questions (`scratch_model`, two seeds) scores 1.000 on the 40 to be forgotten
    and .99 to 1.00 on the others; trained without them, .038 and .041 on those 40.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = ExtractionStrength()
        >>> metric.update(predicted=[[7, 9, 3, 4], [1, 2]], labels=[[7, 8, 3, 4], [1, 2]])
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
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
        self.add(extraction_strength(predicted, labels))  # pyright: ignore[reportArgumentType, reportCallIssue]
