"""The mean probability of the answers, over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.metrics._base import MeanOverExamples
from lightning_modules.metrics.functional import Numbers, answer_probability, option_probability


class AnswerProbability(MeanOverExamples):
    r"""Mean probability of the answer, exp(-nll), or mean share of the answer among the options.

    It is `functional.answer_probability` of each example, or `functional.option_probability` if `update` gets the wrong
    answers too. TOFU reports the first on retain and forget set, the second on real authors and world facts.

    Direction: higher is better on what is to be kept, and `higher_is_better` says that. On the forget set lower is
    better, down to the retrained model's score.

    | Llama-2-7B on TOFU | retain | forget10 | real authors | world facts |
    |---|---|---|---|---|
    | fine-tuned on everything | .9895 | .9909 | .4555 | .4186 |
    | retrained without forget10 | .9889 | .1476 | .4341 | .4143 |

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = AnswerProbability()
        >>> metric.update([0.0, 0.6931471805599453])
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = True

    normalised: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("normalised", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, answer_nll: Numbers, perturbed_nll: Tensor | Sequence[Sequence[float]] | None = None) -> None:
        """Adds n examples.

        Args:
            answer_nll: mean token negative log-likelihood of the answers in nats, `[n]`.
            perturbed_nll: of m wrong answers each, `[n, m]`; with it, the share among the options is measured.

        Raises:
            ValueError: if a shape is not the one stated, or empty.
        """
        if perturbed_nll is None:
            self.add(answer_probability(answer_nll))
        else:
            shares = option_probability(answer_nll, perturbed_nll)
            self.add(shares)
            self.normalised = self.normalised + len(shares)

    def compute(self) -> Tensor:
        """The mean over the examples, float64.

        Raises:
            RuntimeError: if there was no example, or only some came with wrong answers, because a mean over two
                different measures has no meaning.
        """
        mean = super().compute()
        if 0 < self.normalised < self.count:
            raise RuntimeError(
                f"AnswerProbability expected perturbed_nll with every update or with none, found it for {self.normalised} of "
                f"{self.count} examples: use one metric for each split"
            )
        return mean
