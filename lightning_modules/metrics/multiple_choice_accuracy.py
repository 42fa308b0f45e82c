"""How many multiple-choice questions a model answers right, over a data set."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_modules.metrics._base import MeanOverExamples, nothing_seen
from lightning_modules.metrics.functional import accuracy_interval, multiple_choice_accuracy


class MultipleChoiceAccuracy(MeanOverExamples):
    """The share of questions whose right option is the likeliest; for each `functional.multiple_choice_accuracy`.

    Direction: higher is better on what is to be kept (MMLU), and `higher_is_better` says that. On what is to be
    forgotten (WMDP) lower is better, down to a retrained model's. For WMDP nobody has one, so down to chance, 1/4 with
    four options: below it the model still knows the answers.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = MultipleChoiceAccuracy()
        >>> metric.update([[-1.0, -2.0, -3.0, -4.0]], [0])
        >>> metric.update([[-1.0, -2.0, -3.0, -4.0]], [2])
        >>> metric.compute(), [round(limit, 2) for limit in metric.interval()]
        (tensor(0.5000, dtype=torch.float64), [0.09, 0.91])
    """

    higher_is_better = True

    def update(self, log_likelihoods: Tensor | Sequence[Sequence[float]], right: Tensor | Sequence[int]) -> None:
        """Adds n questions.

        Args:
            log_likelihoods: of the m options of each question, `[n, m]`.
            right: the places of the right options, `[n]`.

        Raises:
            ValueError: as `functional.multiple_choice_accuracy`.
        """
        self.add(multiple_choice_accuracy(log_likelihoods, right))

    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval, `functional.accuracy_interval`, of the questions that this process has seen.

        Raises:
            RuntimeError: if there was no question.
        """
        if not self.count:
            raise nothing_seen(self)
        return accuracy_interval(float(self.total / self.count), int(self.count))
