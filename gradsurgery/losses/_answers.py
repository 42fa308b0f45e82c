"""Which tokens a loss sees: shifting, masking and CE-U's skipped first tokens, in one place."""

from __future__ import annotations

from torch import Tensor

from gradsurgery.losses._log_odds import IGNORED


def answer_tokens(logits: Tensor, labels: Tensor, *, skip_first: int = 0) -> tuple[Tensor, Tensor]:
    """The logits that predict the tokens that count, and those tokens.

    Position t predicts token t + 1, so logits ``[:, :-1]`` meet labels ``[:, 1:]``; of those only the answer tokens (label not -100) are
    kept, without the first ``skip_first`` of each sequence.

    Args:
        logits: ``[B, T, V]`` (or hidden states ``[B, T, H]``).
        labels: ``[B, T]``, -100 on the prompt and the padding.
        skip_first: Answer tokens to leave out at the start of each sequence (CE-U's ``ignore_first_n_answer_tokens`` is 1). With
            several answer spans in one row only the first loses tokens.

    Returns:
        Logits ``[N, V]`` and labels ``[N]``, N the number of tokens that count, in row order; N may be 0.

    Raises:
        ValueError: If the shapes do not fit or ``skip_first`` is negative.

    Example:
        >>> import torch
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
