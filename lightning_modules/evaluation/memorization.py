"""The statistics of every token of an answer, from which memorization and membership scores are computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.data.tokenization import IGNORED, Encoded
from lightning_modules.evaluation.likelihood import Predictions, Summary, over_answer_tokens
from lightning_modules.metrics.functional import (
    exact_memorization,
    extraction_strength,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    zlib_score,
)

_SHARE = 0.4  # the share of the tokens that Min-K averages; MUSE and open-unlearning use it for PrivLeak


class AnswerTokens(NamedTuple):
    """One answer of T tokens, each predicted from the question and the right tokens before it; on the CPU.

    `predicted`, `means` and `stds` are empty, `[0]`, where they were not asked for.

    Attributes:
        log_probabilities: natural logarithm of the right tokens' probabilities, float64 `[T]`; minus their mean is the
            example's nll.
        predicted: the most likely tokens, int64 `[T]`; -1 where the logits are NaN.
        labels: the right tokens, int64 `[T]`.
        means: the mean of log p over the vocabulary, weighted by p (which is minus the entropy), float64 `[T]`.
        stds: the standard deviation of log p, weighted in the same way, float64 `[T]`.
    """

    log_probabilities: Tensor
    predicted: Tensor
    labels: Tensor
    means: Tensor
    stds: Tensor

    @property
    def nll(self) -> float:
        """The mean negative log-likelihood per token, in nats; bit for bit that of `likelihood.answer_nll`."""
        return -float(self.log_probabilities.mean())

    @property
    def correct(self) -> Tensor:
        """Whether the most likely token is the right one, bool `[T]`; False where the logits are NaN."""
        return self.predicted == self.labels


def answer_token_statistics(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    detailed: Collection[int] | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> list[AnswerTokens]:
    r"""Scores every token of every answer, in one pass of the model over the examples.

    $$\mu_t = \sum_v p_t(v) \log p_t(v), \qquad \sigma_t^2 = \sum_v p_t(v) (\log p_t(v) - \mu_t)^2$$

    and in the same pass the right token's log p and the argmax. They come from a float32 log-softmax whatever the
    model's dtype, without dropout. In `lightning_modules.metrics.functional`

    - `loss_score`, `min_k_score` and `zlib_score` take `log_probabilities`,
    - `min_k_plus_plus_score` takes `log_probabilities, means, stds`,
    - `extraction_strength` and `exact_memorization` take `predicted, labels`.

    The eos counts as a token of the answer. open-unlearning leaves it out of these measures; to do the same, slice off
    the last entry of each tensor. The variance is summed from its definition instead of E[x^2] - E[x]^2, which would be
    rounding noise where a model that forgot is nearly uniform. A token with a logit of minus infinity contributes 0 to
    mean and variance.

    Cost: one forward pass, with the head at answer positions only; at most four buffers `[1024, vocabulary]` in float32
    (2 GB with a vocabulary of 128,000), and for a model in another dtype its logits too. An example that is not in
    `detailed` costs as much as in `answer_nll`.

    Args:
        model: a causal language model, on any device and in any dtype; its train or eval mode is restored.
        encoded: n examples; the labelled tokens are the answer.
        pad_token_id: fills up shorter rows; it is masked.
        batch_size: examples in a forward pass. They are sorted by length, so that little is spent on padding.
        detailed: the places of the examples that get every number; the others get log-probabilities only. `None` stands
            for all.
        advance: called with the number of examples done, after every batch.

    Returns:
        One `AnswerTokens` for each example, in the order given. A model that diverged gives NaN.
    """
    whole = torch.ones(len(encoded), dtype=torch.bool)
    if detailed is not None:
        whole = torch.zeros_like(whole).index_fill_(0, torch.tensor(list(detailed), dtype=torch.int64), True)
    statistics = over_answer_tokens(
        model, encoded, token_statistics(whole), pad_token_id=pad_token_id, batch_size=batch_size, advance=advance
    )
    return [
        answer_tokens(example, columns, detailed=every)
        for example, every, columns in zip(encoded, whole.tolist(), statistics, strict=True)
    ]


def token_statistics(detailed: Tensor, *, moments: bool = True) -> Summary:
    """What `answer_token_statistics` computes from logits, as a function for `likelihood.over_answer_tokens`.

    Args:
        detailed: which of the examples get every number, bool `[n]`; the others get log-probabilities only.
        moments: `False` leaves out mean and standard deviation, which then are -1.
    """
    return partial(_statistics, detailed, moments=moments)


def answer_tokens(example: Encoded, columns: Sequence[Tensor], *, detailed: bool) -> AnswerTokens:
    """What `token_statistics` made of one example, by its names; without the details where there are none."""
    log_p, *details = columns
    predicted, means, stds = (column if detailed else column[:0] for column in details)
    return AnswerTokens(log_p.double(), predicted, _labels(example), means.double(), stds.double())


def memory_scores(tokens: AnswerTokens, answer: str) -> dict[str, float]:
    """All scores of one answer's tokens, eos counted, as floats.

    Args:
        tokens: the answer with every number, see `answer_token_statistics`.
        answer: the answer's text; `zlib_score` needs its compressed size.

    Returns:
        `exact_memorization` and `extraction_strength` in [0, 1], and the membership scores `loss_score`, `min_k_score`
        and `min_k_plus_plus_score` (both with k = 0.4), and `zlib_score`, where higher means more likely a member. NaN
        where the model gives NaN.
    """
    likelihoods, means, stds = tokens.log_probabilities, tokens.means, tokens.stds
    scores = {
        "exact_memorization": exact_memorization(tokens.predicted, tokens.labels),
        "extraction_strength": extraction_strength(tokens.predicted, tokens.labels),
        "loss_score": loss_score(likelihoods),
        "min_k_score": min_k_score(likelihoods, _SHARE),
        "min_k_plus_plus_score": min_k_plus_plus_score(likelihoods, means, stds, _SHARE),
        "zlib_score": zlib_score(likelihoods, answer),
    }
    return {name: float(score) for name, score in scores.items()}


def _labels(example: Encoded) -> Tensor:
    return torch.tensor([label for label in example.labels[1:] if label != IGNORED], dtype=torch.int64)


def _statistics(whole: Tensor, found: Predictions, *, moments: bool = True) -> tuple[Tensor, ...]:
    logits, of, labels, owners = found
    log_p = logits.log_softmax(dim=-1)
    chosen = log_p[of, labels]
    predicted, means, stds = (torch.full_like(column, -1) for column in (labels, chosen, chosen))
    tokens = whole[owners].nonzero().squeeze(-1).to(logits.device)
    rows, back = of[tokens].unique(return_inverse=True)
    every = len(rows) == len(logits)
    # argmax would return the NaN
    predicted[tokens] = (logits if every else logits[rows]).argmax(dim=-1)[back].masked_fill(chosen[tokens].isnan(), -1)
    if moments:
        log_p = log_p if every else log_p[rows]  # frees what is not needed, before the next buffers
        means[tokens], stds[tokens] = (column[back] for column in _moments(log_p))
    return chosen, predicted, means, stds


def _moments(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of log p over the vocabulary, weighted by p, `[rows]` each; overwrites `log_p`."""
    p = log_p.exp()
    log_p.masked_fill_(log_p == -torch.inf, 0.0)  # p log p is 0 where p is 0
    means = (p * log_p).sum(dim=-1)
    variances = log_p.sub_(means.unsqueeze(-1)).square_().mul_(p).sum(dim=-1)
    return means, variances.sqrt()
