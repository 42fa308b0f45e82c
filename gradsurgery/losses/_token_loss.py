"""The decorator that makes a loss per token of a function of one number, the label's log-odds."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeAlias, overload

import torch
from torch import Tensor

from gradsurgery.losses._checks import checked
from gradsurgery.losses._loss import described
from gradsurgery.losses._on_logits import log_odds

P = ParamSpec("P")

TokenLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A loss per token: logits ``[N, V]`` and labels ``[N]`` -> values ``[N]``."""


@overload
def token_loss(
    function: Callable[Concatenate[Tensor, P], Tensor], /
) -> Callable[Concatenate[Tensor, Tensor, P], Tensor]: ...
@overload
def token_loss(
    *, runner_up: bool
) -> Callable[[Callable[Concatenate[Tensor, Tensor, P], Tensor]], Callable[Concatenate[Tensor, Tensor, P], Tensor]]: ...
def token_loss(function: Callable[..., Tensor] | None = None, /, *, runner_up: bool = False) -> Any:
    r"""Make a loss of logits ``[N, V]`` and labels ``[N]`` from a function of the labels' log-odds, ``[N]``.

    $$d = \log(p_y / (1 - p_y))$$

    Autograd differentiates the function, on N numbers only. Detach in it what must not be differentiated, for example a
    weight. The loss checks its arguments, computes half-precision logits in float32, and gives 0 with a zero gradient
    where the label is -100. `linear` applies it without ever holding ``[N, V]``.

    Args:
        function: Log-odds ``[N]`` (float32, or float64 for float64 logits) and options by keyword -> values ``[N]``,
            elementwise.
        runner_up: Whether the function takes a second tensor: the log-odds of the likeliest token other than the label,
            the first of equals.

    Returns:
        The loss: ``(logits, labels, **options)`` -> ``[N]``.

    Example:
        >>> from torch.nn.functional import softplus
        >>> @token_loss
        ... def capped_unlikelihood(odds: Tensor, *, cap: float = 3.0) -> Tensor:
        ...     return cap * torch.tanh(softplus(odds) / cap)
        >>> capped_unlikelihood(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 0]))
        tensor([0.6811, 2.9852])
    """
    if function is None:
        return functools.partial(_token_loss, runner_up=runner_up)
    return _token_loss(function, runner_up=False)


def _token_loss(function: Callable[..., Tensor], *, runner_up: bool) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapped(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        valid = checked(logits, labels)
        own, other = log_odds(logits, labels.long(), runner_up)
        values = function(own, other, *args, **kwargs) if runner_up else function(own, *args, **kwargs)
        return torch.where(valid, values, 0.0)

    options = list(inspect.signature(function).parameters.values())[1 + runner_up :]
    leading = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor")
        for name in ("logits", "labels")
    ]
    wrapped.__signature__ = inspect.Signature([*leading, *options], return_annotation="Tensor")  # pyright: ignore[reportAttributeAccessIssue]
    return described(log_odds=function, runner_up=runner_up)(wrapped)
