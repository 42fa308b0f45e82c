"""What a model thinks of every token of an answer: the numbers that extraction and membership inference are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.likelihood import over_answer_tokens
from lightning_modules.tokenization import IGNORED, Encoded


class AnswerTokens(NamedTuple):
    """One answer, token by token, given the question and the right tokens before: T tokens, on the CPU.

    Attributes:
        log_probabilities: of the right token, natural logarithm, float64 `[T]`; minus their mean is the example's nll.
        predicted: the most likely token, int64 `[T]`; -1 where the logits are NaN.
        labels: the right token, int64 `[T]`.
        means: the mean of log p over the vocabulary, weighted by p (minus the entropy), float64 `[T]`.
        stds: the standard deviation of the same, float64 `[T]`.
    """

    log_probabilities: Tensor
    predicted: Tensor
    labels: Tensor
    means: Tensor
    stds: Tensor

    @property
    def correct(self) -> Tensor:
        """Whether the most likely token is the right one, bool `[T]`; False where there is none."""
        return self.predicted == self.labels


def answer_token_statistics(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda _: None,
) -> list[AnswerTokens]:
    r"""Scores every token of every answer, in one pass of the model over the examples.

    .. math:: \mu_t = \sum_v p_t(v) \log p_t(v), \qquad \sigma_t^2 = \sum_v p_t(v) (\log p_t(v) - \mu_t)^2

    beside log p of the right token and the argmax, from a float32 log-softmax whatever the model's dtype, without
    dropout. With these, and `lightning_modules.metrics.functional`:

    - `loss_score`, `min_k_score`, `zlib_score`, `reference_score` take `log_probabilities`,
    - `min_k_plus_plus_score` takes `log_probabilities, means, stds`,
    - `extraction_strength` and `exact_memorization` take `predicted, labels`.

    The eos counts as a token of the answer. open-unlearning leaves it out of these measures, which slicing off the last
    entry of each tensor does too. The variance is summed from its definition, not as E[x^2] - E[x]^2, which is rounding
    noise where a model that forgot is nearly uniform. A token that is ruled out (logit of minus infinity) counts 0
    towards both.

    Cost: one forward pass, with the head at answer positions only; at most four buffers `[1024, vocabulary]` in
    float32 (2 GB with a vocabulary of 128,000).

    Args:
        model: a causal language model, on any device and in any dtype; its train or eval mode is restored.
        encoded: n examples; the labelled tokens are the answer.
        pad_token_id: fills up shorter rows; it is masked.
        batch_size: examples a forward pass. They are sorted by length, so that little is spent on padding.
        advance: called with the number of examples done, after every batch.

    Returns:
        One `AnswerTokens` for each example, in the order given. A model that diverged gives NaN.
    """
    statistics = over_answer_tokens(
        model, encoded, _statistics, pad_token_id=pad_token_id, batch_size=batch_size, advance=advance
    )
    return [
        AnswerTokens(log_p.double(), predicted, _labels(example), means.double(), stds.double())
        for example, (log_p, predicted, means, stds) in zip(encoded, statistics, strict=True)
    ]


def _labels(example: Encoded) -> Tensor:
    return torch.tensor([label for label in example.labels[1:] if label != IGNORED], dtype=torch.int64)


def _statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    log_p = logits.log_softmax(dim=-1)
    chosen = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    predicted = logits.argmax(dim=-1).masked_fill(chosen.isnan(), -1)  # argmax would take a NaN for the largest
    p = log_p.exp()
    log_p.masked_fill_(log_p == -torch.inf, 0.0)  # p log p is 0 where p is
    means = (p * log_p).sum(dim=-1)
    variances = log_p.sub_(means.unsqueeze(-1)).square_().mul_(p).sum(dim=-1)
    return chosen, predicted, means, variances.sqrt()
