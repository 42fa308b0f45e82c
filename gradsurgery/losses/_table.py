"""Every loss by its name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gradsurgery.losses import _rows, _sequences, _tokens
from gradsurgery.losses._loss import Loss
from gradsurgery.losses._token_loss import TokenLoss

LOSSES: dict[str, TokenLoss] = {name: getattr(_tokens, name) for name in _tokens.__all__}
"""Every loss per token of logits and labels by its name; tests and the command line read this."""

ROW_LOSSES: dict[str, Callable[..., Tensor]] = {name: getattr(_rows, name) for name in _rows.__all__}
"""Every loss of whole rows of logits, some beside reference logits, by its name."""

SEQUENCE_LOSSES: dict[str, Callable[..., Tensor]] = {name: getattr(_sequences, name) for name in _sequences.__all__}
"""Every loss per sequence, of its negative log-likelihood, by its name."""


def by_name(name: str) -> TokenLoss:
    """The loss per token called ``name``.

    Raises:
        ValueError: If there is none.

    Example:
        >>> from gradsurgery.losses import ceu
        >>> by_name("ceu") is ceu
        True
    """
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, found {name!r}")
    return LOSSES[name]


def as_row_loss(loss: str | Callable[..., Tensor] | Loss) -> Loss:
    """A loss per token or row as `linear` calls it: with logits, labels, and reference logits if there are any.

    Args:
        loss: A name in `LOSSES` or `ROW_LOSSES`, or what `Loss.of` takes.

    Raises:
        ValueError: If no loss has that name.

    Example:
        >>> import torch
        >>> as_row_loss("uniform")(torch.zeros(2, 4), torch.tensor([1, -100]))  # which itself takes no labels
        tensor([0., 0.])
    """
    if not isinstance(loss, str):
        return Loss.of(loss)
    names = LOSSES | ROW_LOSSES
    if loss not in names:
        raise ValueError(f"loss: expected one of {', '.join(names)}, found {loss!r}")
    return Loss.of(names[loss])
