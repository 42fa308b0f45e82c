"""Log-odds of bare logits, which autograd differentiates: by the kernel on a CPU, or in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsurgery.losses import _kernel
from gradsurgery.losses._backward import batched, check_first_derivative
from gradsurgery.losses._checks import IGNORED, float_type
from gradsurgery.losses._in_memory import check_known_tokens, known, readable
from gradsurgery.losses._log_odds import Reduced, gradient, reduce_


def log_odds(logits: Tensor, labels: Tensor, runner_up: bool) -> tuple[Tensor, Tensor | None]:
    """The log-odds of the labels, ``[N]``, and those of the runners-up if wanted, of logits ``[N, V]``.

    Where the label is -100 they are any numbers, with a zero gradient.
    """
    return _LogOdds.apply(logits, labels, runner_up)


class _LogOdds(torch.autograd.Function):
    """The log-odds of the labels ``[N]``, gradient e_y - q, and if wanted those of the runners-up.

    The kernel keeps the logits and reads them again for the gradient; plain PyTorch keeps a float copy of them.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, runner_up: bool) -> tuple[Tensor, Tensor | None]:
        ctx.dtype, ctx.runner_up = logits.dtype, runner_up
        check_known_tokens(labels, logits.shape[1])
        ctx.compiled = known(labels) and _kernel.compiled(logits)
        if ctx.compiled:
            found = _kernel.reduce(logits, labels, 1.0, None)
            ctx.save_for_backward(logits, *found[2:-2])
            return found.own, found.other if runner_up else None
        rows, reduced = _plain(logits, labels, runner_up)
        ctx.save_for_backward(rows, *reduced)
        return reduced.own, reduced.other

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_first_derivative()
        logits, *rest = ctx.saved_tensors
        own, other = gradients[0], gradients[1] if ctx.runner_up else None
        if not ctx.compiled:
            rows, reduced = logits, Reduced(*rest)
        elif any(map(batched, (own,) if other is None else (own, other))):
            rows, reduced = _plain(logits, rest[-1], ctx.runner_up)
        else:
            rows, nothing = _as_saved(ctx.dtype, logits, rest), logits.new_empty(0)
            result = logits.new_empty(logits.shape)
            found = _kernel.Statistics._make((nothing, nothing, *rest, 1.0, None))  # the gradient needs no log-odds
            _kernel.gradient_(rows, found, own, other, to=result)
            return result, None, None
        return gradient(rows, reduced, own, other, in_place=False).to(ctx.dtype), None, None


def _plain(logits: Tensor, labels: Tensor, runner_up: bool) -> tuple[Tensor, Reduced]:
    """A float copy of the logits as `gradient` needs it; where the label is -100 they are anything, and become 0."""
    ignored = labels == IGNORED
    rows = logits.to(float_type(logits.dtype), copy=True).masked_fill_(ignored[:, None], 0.0)
    return rows, reduce_(rows, labels.masked_fill(ignored, 0), runner_up)


def _as_saved(dtype: torch.dtype, rows: Tensor, numbers: list[Tensor]) -> Tensor:
    """The logits, contiguous; refused with their numbers where a hook for saved tensors gives back other types."""
    found = [tensor.dtype for tensor in (rows, *numbers)]
    expected = [dtype, torch.float32, torch.int64, *[torch.float32] * 3, torch.int64]
    if found != expected or not all(tensor.is_cpu for tensor in (rows, *numbers)):
        raise RuntimeError(
            f"backward: expected what the forward pass saved, of {expected} on the CPU, found {found} on {rows.device}; a hook for saved "
            "tensors has to give back what it was given"
        )
    return readable(rows)
