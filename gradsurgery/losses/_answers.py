"""From sequences to the tokens that count, and back to one value per sequence or batch."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurgery.losses._checks import IGNORED


def answer_tokens(logits: Tensor, labels: Tensor, *, skip_first: int = 0) -> tuple[Tensor, Tensor]:
    """The logits that predict the tokens that count, and those tokens.

    Position t predicts token t + 1, so logits ``[:, :-1]`` are paired with labels ``[:, 1:]``. Of these pairs only the
    answer tokens (label not -100) are kept, without the first ``skip_first`` of each sequence.

    Args:
        logits: ``[B, T, V]`` (or hidden states ``[B, T, H]``).
        labels: ``[B, T]``, -100 on the prompt and the padding.
        skip_first: Answer tokens to leave out at the start of each sequence (CE-U's ``ignore_first_n_answer_tokens`` is
            1). If a row has several answer spans, only the first span loses tokens.

    Returns:
        Logits ``[N, V]`` and labels ``[N]``, N the number of tokens that count, in row order; N may be 0.

    Raises:
        ValueError: If the shapes do not fit or ``skip_first`` is negative.

    Example:
        >>> labels = torch.tensor([[-100, -100, 7, 8, 9]])
        >>> answer_tokens(torch.zeros(1, 5, 10), labels, skip_first=1)[1]
        tensor([8, 9])
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"expected logits [B, T, V] and labels [B, T], found {list(logits.shape)} and {list(labels.shape)}"
        )
    if skip_first < 0:
        raise ValueError(f"skip_first: expected a number of tokens >= 0, found {skip_first}")
    # The skipped tokens are counted before the shift: a label at position 0 is an answer token that nothing predicts.
    counts = labels != IGNORED
    kept = counts & (counts.cumsum(1) > skip_first)
    return logits[:, :-1][kept[:, 1:]], labels[:, 1:][kept[:, 1:]]


def token_mean(values: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens that count; 0 with a zero gradient if none does.

    Args:
        values: ``[N]`` from a loss per token.
        labels: ``[N]``, -100 where a token does not count.

    Returns:
        0-dim.

    Example:
        >>> token_mean(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([5, 6, -100]))
        tensor(2.)
    """
    return values.sum() / (labels != IGNORED).sum().clamp_min(1)


def sequence_sum(values: Tensor, labels: Tensor, *, skip_first: int = 0) -> Tensor:
    """Values per token, in the order of `answer_tokens`, summed over each sequence.

    Args:
        values: ``[N]``, from a loss per token of ``answer_tokens(logits, labels, skip_first=skip_first)``.
        labels: ``[B, T]``, the labels that ``answer_tokens`` was given.
        skip_first: The number that ``answer_tokens`` was given.

    Returns:
        ``[B]``, at least float32; 0 for a sequence without tokens that count. The same on every run, on a GPU too.

    Raises:
        ValueError: If the labels are not ``[B, T]``, or there is not one value for each of their tokens that count.

    Example:
        >>> labels = torch.tensor([[-100, 7, 8], [-100, -100, 9], [-100, -100, -100]])
        >>> sequence_sum(torch.tensor([1.0, 2.0, 4.0]), labels)
        tensor([3., 4., 0.])
    """
    positions = _positions(labels, skip_first)
    if values.shape != positions.shape:
        raise ValueError(
            f"values: expected {list(positions.shape)}, one of each token that counts, found {list(values.shape)}; sum what a loss gave "
            "for answer_tokens(...) with the same labels and skip_first"
        )
    return _by_sequence(values.to(torch.promote_types(values.dtype, torch.float32)), positions, labels.shape)


def answer_lengths(labels: Tensor, *, skip_first: int = 0) -> Tensor:
    """The number of tokens of each sequence that count, and that `answer_tokens` returns.

    Args:
        labels: ``[B, T]``, -100 on the prompt and the padding.
        skip_first: Answer tokens left out at the start of each sequence.

    Returns:
        ``[B]`` int64. A label at position 0 does not count, because nothing predicts it.

    Raises:
        ValueError: If the labels are not ``[B, T]`` or ``skip_first`` is negative.

    Example:
        >>> answer_lengths(torch.tensor([[-100, 7, 8], [-100, -100, 9], [-100, -100, -100]]))
        tensor([2, 1, 0])
    """
    positions = _positions(labels, skip_first)
    return _by_sequence(torch.ones_like(positions), positions, labels.shape)


def _positions(labels: Tensor, skip_first: int) -> Tensor:
    """The place in the flattened ``[B, T]`` at which each token that counts is predicted, ``[N]``."""
    if labels.dim() != 2:
        raise ValueError(f"labels: expected [B, T], found {list(labels.shape)}")
    # answer_tokens itself chooses, so that only one function decides which tokens count.
    places = torch.arange(labels.numel(), device=labels.device).view(*labels.shape, 1)
    return answer_tokens(places, labels, skip_first=skip_first)[0].squeeze(1)


def _by_sequence(values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    # Scattered and then summed instead of index_add, whose atomic additions on a GPU have no fixed order.
    return values.new_zeros(shape.numel()).scatter(0, positions, values).view(shape).sum(1)
