"""Log-odds of bare logits, which autograd differentiates: by a kernel on a CPU, or in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsurgery.losses import _kernel
from gradsurgery.losses._checks import float_type
from gradsurgery.losses._in_memory import labels_fit, readable
from gradsurgery.losses._log_odds import Reduced, gradient, reduce_


def log_odds(logits: Tensor, labels: Tensor, runner_up: bool) -> tuple[Tensor, Tensor | None]:
    """The log-odds of the labels, ``[N]``, and those of the runners-up if wanted, of logits ``[N, V]``."""
    return _LogOdds.apply(logits, labels, runner_up)


class _LogOdds(torch.autograd.Function):
    """The log-odds of the labels ``[N]``, gradient e_y - q, and if wanted those of the runners-up.

    The kernel keeps the logits and reads them again for the gradient; plain PyTorch keeps a float copy of them.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, runner_up: bool) -> tuple[Tensor, Tensor | None]:
        ctx.dtype, ctx.compiled = logits.dtype, logits.is_cpu and _fits(logits, labels)
        if ctx.compiled:
            found = _kernel.reduce(logits, labels, 1.0, None)
            ctx.runner_up = runner_up
            ctx.save_for_backward(logits, *found[:-2])
            return found.own, found.other if runner_up else None
        rows = logits.to(float_type(logits.dtype), copy=True)
        reduced = reduce_(rows, labels, runner_up)
        ctx.save_for_backward(rows, *reduced)
        return reduced.own, reduced.other

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, *rest = ctx.saved_tensors
        if ctx.compiled:
            rows, found = readable(rows), _kernel.Statistics._make((*rest, 1.0, None))
            result = rows.new_empty(rows.shape)
            _kernel.gradient_(rows, found, gradients[0], gradients[1] if ctx.runner_up else None, to=result)
            return result, None, None
        reduced = Reduced(*rest)
        row = gradient(rows, reduced, gradients[0], None if reduced.other is None else gradients[1], in_place=False)
        return row.to(ctx.dtype), None, None


def _fits(logits: Tensor, labels: Tensor) -> bool:
    return _kernel.usable(logits) and labels_fit(labels, logits.shape[1])
