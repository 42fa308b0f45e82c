"""What `linear` must know of a loss, said once, by the decorator that makes the loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from gradsurgery.losses._checks import IGNORED, check_values
from gradsurgery.losses._head import Reference

F = TypeVar("F", bound=Callable[..., Tensor])

_ATTRIBUTE = "described"


@dataclass(frozen=True, eq=False, kw_only=True)
class Loss:
    """A loss as `linear` takes it: a function, what is known of it, and what it is compared with.

    `Loss.of` makes one of any loss function. It is needed only where a call binds a reference or ``recompute``;
    elsewhere `linear` takes the function itself, or its name.

    Attributes:
        function: ``(logits [N, V], labels [N], reference logits [N, V])`` -> values ``[N]``, value i from row i alone.
        takes_labels: Whether the function takes labels. If not, values of tokens whose label is -100 are set to 0
            afterwards.
        takes_reference: Whether it takes reference logits; None if unknown (a plain function), then it gets them if
            there are any.
        log_odds: The function of the labels' log-odds ``[N]`` that the loss is (`token_loss`); None for a loss of
            another kind.
        runner_up: Whether ``log_odds`` also takes the log-odds of the likeliest other token.
        in_place: ``(logits, labels, reference logits, weights)`` -> values, for a loss that can differentiate itself:
            it overwrites the logits by the gradient of the weighted sum of the values. Without weights it only computes
            the values. None: autograd.
        reference: The hidden states and the head of the model that the loss compares with.
        recompute: Whether `linear` makes the gradients in the backward pass instead of the forward pass. That is faster
            if the values are not averaged but go through another function, as those of `npo`, `simnpo` and `dpo` do.

    Example:
        >>> import torch
        >>> from gradsurgery.losses import linear, undial
        >>> hidden, weight, labels = torch.eye(2), torch.zeros(5, 2), torch.tensor([3, -100])
        >>> linear(hidden, weight, labels, Loss.of(undial, reference=Reference(hidden)))
        tensor([1.6094, 0.0000])
    """

    function: Callable[..., Tensor]
    takes_labels: bool
    takes_reference: bool | None
    log_odds: Callable[..., Tensor] | None
    runner_up: bool
    in_place: Callable[..., Tensor] | None
    reference: Reference | None = None
    recompute: bool = False

    @classmethod
    def of(
        cls, loss: Callable[..., Tensor] | Loss, reference: Reference | None = None, recompute: bool = False
    ) -> Loss:
        """Describe a loss, and bind what it is compared with.

        Args:
            loss: A loss of this package, a ``functools.partial`` of one, a function of your own, or a description to
                bind more to.
            reference: See the attributes; None keeps what the description holds.
            recompute: See the attributes.
        """
        found = loss if isinstance(loss, Loss) else _description(loss)
        if reference is None and not recompute:
            return found
        return dataclasses.replace(
            found, reference=reference or found.reference, recompute=recompute or found.recompute
        )

    def __call__(self, logits: Tensor, labels: Tensor, *reference_logits: Tensor) -> Tensor:
        """The values ``[N]``, whether or not the function itself takes labels; 0 where the label is -100.

        Raises:
            ValueError: If the function returns something else than one value per token, such as their mean.
        """
        values = self.function(logits, *([labels] if self.takes_labels else ()), *reference_logits)
        check_values(values, labels)
        return values if self.takes_labels else values.where(labels != IGNORED, 0.0)


def described(
    *,
    takes_labels: bool = True,
    takes_reference: bool | None = False,
    log_odds: Callable[..., Tensor] | None = None,
    runner_up: bool = False,
    in_place: Callable[..., Tensor] | None = None,
) -> Callable[[F], F]:
    """A decorator that attaches a description to a loss function, for `Loss.of`; the function stays as it is."""

    def attach(function: F) -> F:
        vars(function)[_ATTRIBUTE] = Loss(
            function=function,
            takes_labels=takes_labels,
            takes_reference=takes_reference,
            log_odds=log_odds,
            runner_up=runner_up,
            in_place=in_place,
        )
        return function

    return attach


def _description(loss: Callable[..., Tensor]) -> Loss:
    """The description of a function, with the options that ``functools.partial`` has bound to it."""
    plain: Any = loss
    options: dict[str, Any] = {}
    while isinstance(plain, functools.partial) and not plain.args:
        options = {**plain.keywords, **options}
        plain = plain.func
    found: Loss | None = getattr(plain, _ATTRIBUTE, None)
    # functools.wraps copies attributes: a function that wraps a loss of ours would carry a description that is not its
    # own.
    if found is None or found.function is not plain:
        return Loss(
            function=loss, takes_labels=True, takes_reference=None, log_odds=None, runner_up=False, in_place=None
        )
    if not options:
        return found
    return dataclasses.replace(
        found,
        function=loss,
        log_odds=None if found.log_odds is None else functools.partial(found.log_odds, **options),
        in_place=None if found.in_place is None else functools.partial(found.in_place, **options),
    )
