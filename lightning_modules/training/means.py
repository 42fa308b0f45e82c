"""Means over answer tokens, and what a loss needs for one: what `objectives` and `teachers` are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias

from torch import Tensor

import gradsurgery as gs
from lightning_modules.training.heads import AnswerHead, Batch, States, answer_values
from lightning_modules.training.references import Reference

Batches: TypeAlias = Mapping[str, Mapping[str, Tensor]]


class Context(Protocol):
    """What an objective may use of the module that it trains; `UnlearningModule` has all of it.

    Attributes:
        reference: Gives the start model's outputs, for losses that compare with it.
    """

    reference: Reference | None

    @property
    def head(self) -> AnswerHead:
        """The trained model in two parts."""
        ...

    def mean_count(self, count: int) -> Tensor:
        """The mean of a count of tokens over all processes."""
        ...


Objective: TypeAlias = Callable[[Context, Batches, str], Tensor]
"""A function of the module, the batches by name, and the name of its own batch. It returns a scalar to be minimised."""


def as_objective(function: Any) -> Any:
    """A decorator for `Objective`s: tells a function of (module, batches, name) from a loss per token."""
    function.is_objective = True
    return function


def mean(loss: Any, skip: int, reference: Reference | None, context: Context, batch: Batch) -> Tensor:
    """A loss's mean over the answer tokens of all processes.

    Args:
        loss: Per token, or per row of logits.
        skip: Answer tokens left out at the start of each answer.
        reference: Gives what the loss compares with; None if it does not.
        context: Of the training.
        batch: Of this process.
    """
    states, others = states_of(reference, context, batch)
    values, tokens = answer_values(loss, states, batch["labels"], skip_first=skip, reference=others)
    return values.sum() / context.mean_count(len(tokens))


def states_of(reference: Reference | None, context: Context, batch: Batch) -> tuple[States, States | None]:
    """What the heads of the trained model and of the other one read: both whole, or both in two parts."""
    states = context.head.states(batch)
    if reference is None:
        return states, None
    others = reference.states(context.head, batch, split=states.head is not None)
    if (others.head is None) == (states.head is None):
        return states, others
    return context.head.states(batch, split=False), reference.states(context.head, batch, split=False)


def needs_reference(loss: Any) -> bool:
    """Whether a loss compares with the start model."""
    plain = unbound(loss)
    return (
        needs_logits(loss)
        or plain is gs.losses.npo
        or plain is gs.losses.dpo
        or getattr(plain, "needs_reference", False)
    )


def needs_logits(loss: Any) -> bool:
    """Whether that comparison takes whole rows of logits, which `references.Precomputed` does not hold."""
    plain = unbound(loss)
    return any(plain is loss for loss in (gs.losses.undial, gs.losses.kl_divergence, gs.losses.jensen_shannon))


def of_tokens(loss: Any) -> bool:
    """Whether a loss looks at a token of the model and its label alone: no sequence, no other model, no objective."""
    plain = unbound(loss)
    others = any(plain is known for known in gs.losses.SEQUENCE_LOSSES.values())
    return not (others or needs_reference(loss) or getattr(plain, "is_objective", False))


def usual_skip(loss: Any) -> int:
    """Answer tokens that a loss leaves out at the start, if nobody says how many."""
    return int(unbound(loss) is gs.losses.ceu)


def unbound(loss: Any) -> Any:
    """The loss itself, where options are bound to it."""
    while isinstance(loss, partial):
        loss = loss.func
    return loss


def name_of(loss: Any) -> str:
    """The loss's own name, for messages."""
    return getattr(unbound(loss), "__name__", type(loss).__name__)
