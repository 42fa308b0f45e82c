"""Every loss by its name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from gradsurgery.losses._log_odds import IGNORED, TokenLoss
from gradsurgery.losses._rows import OF_PAIR, OfPair, kl_divergence, logit_margin, undial, uniform
from gradsurgery.losses._sequences import dpo, npo, simnpo
from gradsurgery.losses._tokens import (
    ceu,
    cross_entropy,
    gradient_ascent,
    inverted_hinge,
    satimp,
    unlikelihood,
    weighted_gradient_ascent,
)

RowLoss: TypeAlias = TokenLoss | Callable[[Tensor, Tensor, Tensor], Tensor]
"""A token loss, or one with reference logits as its third argument; every value a function of its own row only."""

_PLAIN = "_as_row_loss_of"

LOSSES: dict[str, TokenLoss] = {
    function.__name__: function
    for function in (
        cross_entropy,
        gradient_ascent,
        ceu,
        inverted_hinge,
        weighted_gradient_ascent,
        satimp,
        unlikelihood,
    )
}
"""Every loss per token of logits and labels by its name; tests and the command line read this."""

ROW_LOSSES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (undial, kl_divergence, uniform, logit_margin)
}
"""Every loss of whole rows of logits, and of reference logits, by its name."""

SEQUENCE_LOSSES: dict[str, Callable[..., Tensor]] = {function.__name__: function for function in (npo, simnpo, dpo)}
"""Every loss per sequence, of its negative log-likelihood, by its name."""


def by_name(name: str) -> TokenLoss:
    """The loss called ``name``.

    Raises:
        ValueError: If there is none.

    Example:
        >>> by_name("ceu") is ceu
        True
    """
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, found {name!r}")
    return LOSSES[name]


def as_row_loss(loss: Any) -> RowLoss:
    """A loss as `linear` calls it, of logits, labels and reference logits where there are any: some take no labels."""
    plain = _unbound(loss)
    if plain is uniform:

        def of_rows(logits: Tensor, labels: Tensor) -> Tensor:
            return loss(logits).where(labels != IGNORED, 0.0)

        found: RowLoss = of_rows
    elif plain is kl_divergence:

        def beside_reference(logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
            return loss(logits, reference).where(labels != IGNORED, 0.0)

        found = beside_reference
    else:
        return loss
    marks: dict[str, Any] = {_PLAIN: plain}
    if loss is plain:  # without options, of which these have none: `linear` need not differentiate it
        marks[OF_PAIR] = OfPair(None)
    vars(found).update(marks)
    return found


def takes_reference(loss: Any) -> bool | None:
    """Whether a loss of ours compares with reference logits; None for one that is not ours."""
    plain = _unbound(loss)
    plain = getattr(plain, _PLAIN, plain)
    if any(plain is known for known in (undial, kl_divergence)):
        return True
    return False if any(plain is known for known in (*LOSSES.values(), *ROW_LOSSES.values())) else None


def _unbound(loss: Any) -> Any:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss


def row_loss_by_name(name: str) -> RowLoss:
    """The loss per token or row called ``name``, as `linear` calls it."""
    tables: dict[str, Any] = LOSSES | ROW_LOSSES
    if name not in tables:
        raise ValueError(f"loss: expected one of {', '.join(tables)}, found {name!r}")
    return as_row_loss(tables[name])
