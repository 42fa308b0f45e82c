r"""The one number that most token losses are made of, and the decorator that makes a loss of a function of it.

With logits z, label y and :math:`d = z_y - \log\sum_{j \ne y} e^{z_j}`, the label's probability is sigmoid(d), its negative
log-likelihood softplus(-d), and every loss :math:`\varphi(d)` has the gradient :math:`\varphi'(d)\,(e_y - q)` with q the softmax
without y. Nothing here subtracts nearly equal numbers, so that a forgotten token gets a vanishing gradient and not rounding noise, and
a certain one no NaN. A loss may also look at the runner-up, the likeliest token that is not the label, through its own log-odds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeAlias, overload

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that no loss counts: Hugging Face's and torch's convention."""

P = ParamSpec("P")

TokenLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Logits [N, V] and labels [N] -> one value per token [N]."""


class OfLogOdds(NamedTuple):
    """What `token_loss` leaves on the losses that it makes: the function, and whether it takes the runner-up's log-odds too."""

    function: Callable[..., Tensor]
    runner_up: bool

    def __call__(self, own: Tensor, other: Tensor | None) -> Tensor:
        return self.function(own, other) if self.runner_up else self.function(own)


@overload
def token_loss(
    function: Callable[Concatenate[Tensor, P], Tensor], /
) -> Callable[Concatenate[Tensor, Tensor, P], Tensor]: ...
@overload
def token_loss(
    *, runner_up: bool
) -> Callable[[Callable[Concatenate[Tensor, Tensor, P], Tensor]], Callable[Concatenate[Tensor, Tensor, P], Tensor]]: ...
def token_loss(function: Callable[..., Tensor] | None = None, /, *, runner_up: bool = False) -> Any:
    r"""Make a loss of logits ``[N, V]`` and labels ``[N]`` from a function of the log-odds :math:`d = \log p_y/(1 - p_y)`, ``[N]``.

    The function is differentiated by autograd, on N numbers; what must not be differentiated it detaches. The loss checks its
    arguments, computes half-precision logits in float32, gives 0 with a zero gradient where the label is -100, and `linear` applies it
    without ever holding ``[N, V]``.

    Args:
        function: Log-odds ``[N]`` (float32, or float64 for float64 logits) and options by keyword -> values ``[N]``, elementwise.
        runner_up: The function takes a second tensor: the log-odds of the likeliest token other than the label, first of equals.

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
        valid, index = checked(logits, labels)
        own, other = _LogOdds.apply(logits, index, runner_up)
        found = OfLogOdds(functools.partial(function, *args, **kwargs) if args or kwargs else function, runner_up)
        return torch.where(valid, found(own, other), 0.0)

    options = list(inspect.signature(function).parameters.values())[1 + runner_up :]
    leading = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor")
        for name in ("logits", "labels")
    ]
    wrapped.__signature__ = inspect.Signature([*leading, *options], return_annotation="Tensor")  # pyright: ignore[reportAttributeAccessIssue]
    wrapped.of_log_odds = OfLogOdds(function, runner_up)  # pyright: ignore[reportAttributeAccessIssue] (a function's attribute)
    return wrapped


def of_log_odds(loss: Callable[..., Tensor]) -> OfLogOdds | None:
    """The function of the log-odds that a loss is, its bound options included; None for a loss of another kind."""
    bound: dict[str, Any] = {}
    while isinstance(loss, functools.partial) and not loss.args:
        bound = {**loss.keywords, **bound}
        loss = loss.func
    found: OfLogOdds | None = getattr(loss, "of_log_odds", None)
    if found is None or not bound:
        return found
    return OfLogOdds(functools.partial(found.function, **bound), found.runner_up)


def checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens count, and labels that can index where they do not."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits [N, V] with V >= 2 and labels [N], found {list(logits.shape)} and {list(labels.shape)}; "
            "answer_tokens makes them from a model's [B, T, V] and [B, T]"
        )
    check_integers(labels)
    valid = labels != IGNORED
    return valid, torch.where(valid, labels, 0).long()


def check_integers(labels: Tensor) -> None:
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):  # unsigned ones cannot hold -100
        raise TypeError(f"labels: expected signed integers, found {labels.dtype}")


def float_type(dtype: torch.dtype) -> torch.dtype:
    """What rows of this type are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Reduced(NamedTuple):
    """What is left of rows of logits, all ``[n, 1]`` but the first two.

    With m the largest logit that is not the label's, and S the sum of exp(z - m) over the tokens that are summed.

    Attributes:
        own: ``[n]``, log-odds of the label.
        other: ``[n]``, log-odds of the runner-up, or None.
        place: The labels.
        runner_up: Its index, or None.
        total: log of the sum over all but the label (with a runner-up), or that sum itself.
        other_total: log of the sum over all but the runner-up, or None.
        label: z_y - m.
    """

    own: Tensor
    other: Tensor | None
    place: Tensor
    runner_up: Tensor | None
    total: Tensor
    other_total: Tensor | None
    label: Tensor


def reduce_(rows: Tensor, labels: Tensor, runner_up: bool) -> Reduced:
    """The log-odds of rows ``[n, V]`` of float logits, which are overwritten by what `gradient` needs."""
    index = labels[:, None]
    own = rows.gather(1, index)
    rows.scatter_(1, index, -torch.inf)
    if not runner_up:
        largest = rows.amax(1, keepdim=True)
        own = own - largest
        # Differences to the largest logit are exact, and small: logits of 1e4 would leave a logsumexp with three decimals.
        total = rows.sub_(largest).exp_().sum(1, keepdim=True)
        return Reduced((own - total.log()).squeeze(1), None, index, None, total, None, own)
    second = rows.argmax(1, keepdim=True)
    largest = rows.gather(1, second)
    own = own - largest
    # Without the runner-up's own 1 the sum keeps the digits that the runner-up's log-odds are made of.
    log_rest = rows.sub_(largest).scatter_(1, second, -torch.inf).exp_().sum(1, keepdim=True).log_()
    total = log1p_exp(log_rest)
    other_total = torch.logaddexp(log_rest, own)
    return Reduced((own - total).squeeze(1), -other_total.squeeze(1), index, second, total, other_total, own)


def log1p_exp(value: Tensor) -> Tensor:
    """log(1 + exp(value)) with every digit: torch's softplus stops at 20."""
    return torch.logaddexp(value, torch.zeros_like(value))


def gradient(rows: Tensor, reduced: Reduced, own: Tensor, other: Tensor | None, *, in_place: bool) -> Tensor:
    """d/dz of ``own * d_y + other * d_v``, from rows that `reduce_` left; `own` and `other` are ``[n]``."""
    first = own[:, None]
    if other is None or reduced.runner_up is None or reduced.other_total is None:
        shares = -first / reduced.total
        result = rows.mul_(shares) if in_place else rows * shares
        return result.scatter_(1, reduced.place, first)
    second = other[:, None]
    # exp(-total) of a runner-up as certain as e^80 would overflow; the shares that it multiplies are 0 in float32 by then.
    inverse = (-reduced.other_total.clamp_min(-80.0 if rows.dtype == torch.float32 else -700.0)).exp()
    shares = -(first * (-reduced.total).exp() + second * inverse)
    result = rows.mul_(shares) if in_place else rows * shares
    result.scatter_(1, reduced.place, first - second * (reduced.label - reduced.other_total).exp())
    return result.scatter_(1, reduced.runner_up, second - first * (-reduced.total).exp())


class _LogOdds(torch.autograd.Function):
    """The log-odds of the labels ``[N]``, gradient e_y - q, and if wanted those of the runner-ups."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, runner_up: bool) -> tuple[Tensor, Tensor | None]:
        rows = logits.to(float_type(logits.dtype), copy=True)
        reduced = reduce_(rows, labels, runner_up)
        ctx.save_for_backward(rows, *reduced)
        ctx.dtype = logits.dtype
        return reduced.own, reduced.other

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, *rest = ctx.saved_tensors
        reduced = Reduced(*rest)
        row = gradient(rows, reduced, gradients[0], None if reduced.other is None else gradients[1], in_place=False)
        return row.to(ctx.dtype), None, None
