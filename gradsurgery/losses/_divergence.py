r"""A model's distribution compared with another one: the divergence or the cross-entropy, with its gradient $p - q$.

The divergence of $q$ from $p$ is computed as $\sum_i q_i (e^{u_i} - 1 - u_i)$ with the log ratios
$u_i = \log(p_i / q_i)$. No term is negative, and an error in a normaliser enters only by its square. Two models that
hardly differ therefore get a small divergence, and not the rounding noise of two large sums. The gradient
$q_i (e^{u_i} - 1)$ is as exact. `_pairs` does this arithmetic, one block of rows at a time, or `_divergence_kernel`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsurgery.losses._backend import worth_a_kernel
from gradsurgery.losses._backward import check_first_derivative, rowwise
from gradsurgery.losses._checks import IGNORED, float_type
from gradsurgery.losses._divergence_kernel import Compared, Kernel, built
from gradsurgery.losses._in_memory import known
from gradsurgery.losses._pairs import Pair, Room, Totals, blocks


def kernel_for(compared: Compared) -> Kernel | None:
    """The kernel, if it takes these rows and is worth calling."""
    logits, reference, labels, beta = compared
    if not worth_a_kernel(logits, *(() if reference is None else (reference,))):
        return None
    if labels is not None and beta is not None and not known(labels):
        return None
    kernel = built()
    return None if isinstance(kernel, str) else kernel


def _pair(compared: Compared, rows: slice, room: Room, totals: Totals | None = None) -> Pair:
    logits, reference, labels, beta = compared
    lowered = None if labels is None or beta is None else (labels[rows], beta)
    return Pair(logits[rows], None if reference is None else reference[rows], room, lowered, totals)


def _values(compared: Compared, pair: Pair) -> Tensor:
    return pair.divergence() if compared.beta is None else pair.cross_entropy()


def divergence_(logits: Tensor, labels: Tensor, reference: Tensor | None, weights: Tensor | None) -> Tensor:
    """Divergences ``[n]`` of logits, which are overwritten by the gradient of the weighted sum, given weights."""
    return _overwritten(Compared(logits, reference, labels, None), weights)


def cross_entropy_(
    logits: Tensor, labels: Tensor, reference: Tensor | None, weights: Tensor | None, *, beta: float
) -> Tensor:
    """As `divergence_`, of the cross-entropy against a reference whose labels' logits are lowered by ``beta``."""
    return _overwritten(Compared(logits, reference, labels, checked_beta(beta)), weights)


def _overwritten(compared: Compared, weights: Tensor | None) -> Tensor:
    if (kernel := kernel_for(compared)) is not None:
        return kernel.measure(compared, None if weights is None else weights.contiguous())[0]
    logits = compared.logits
    values = logits.new_empty(len(logits), dtype=float_type(logits.dtype))
    for rows, room in blocks(logits):
        pair = _pair(compared, rows, room)
        values[rows] = _values(compared, pair)
        if weights is not None:
            pair.difference(weights[rows], out=logits[rows])
    return values


def compare(
    logits: Tensor, reference: Tensor | None, labels: Tensor | None = None, beta: float | None = None
) -> Tensor:
    """The divergence ``[N]``, or with a beta the cross-entropy; the reference is a constant, uniform if None."""
    return _Divergence.apply(logits, None if reference is None else reference.detach(), labels, beta)


def checked_beta(beta: float) -> float:
    """Refuse a negative beta."""
    if not beta >= 0:
        raise ValueError(f"beta: expected a number >= 0, found {beta}")
    return float(beta)


class _Divergence(torch.autograd.Function):
    """By the kernel where it takes these rows, and the backward pass computes them again.

    In plain PyTorch the forward pass leaves the gradient for the first backward pass, which hands it out. A second one,
    and one of logits of 16 bits, whose gradient would be rounded twice, computes the rows again, from the inputs and
    five numbers per row.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, reference: Tensor | None, labels: Tensor | None, beta: float | None
    ) -> Tensor:
        ctx.beta, ctx.gradient = beta, None
        given = Compared(logits, reference, None if labels is None else labels.long(), beta)
        ctx.kernel = kernel_for(given)
        if ctx.kernel is not None:
            values, totals = ctx.kernel.measure(given)
            ctx.save_for_backward(*given[:3], None, totals)
            return values
        index = None if labels is None else torch.where(labels == IGNORED, 0, labels).long()
        compared = Compared(logits, reference, index, beta)
        values = logits.new_empty(len(logits), dtype=float_type(logits.dtype))
        totals = values.new_empty(len(values), len(Totals._fields))
        ctx.gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] and logits.dtype == values.dtype else None
        one = torch.ones_like(values)
        for rows, room in blocks(logits):
            pair = _pair(compared, rows, room)
            values[rows] = _values(compared, pair)
            torch.cat(pair.totals, 1, out=totals[rows])
            if ctx.gradient is not None:
                pair.difference(one[rows], out=ctx.gradient[rows])
        ctx.save_for_backward(logits, reference, labels, index, totals)
        return values if labels is None else values.masked_fill_(labels == IGNORED, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_first_derivative()
        return rowwise(lambda outer: _Divergence._gradient(ctx, outer), gradients[0]), None, None, None

    @staticmethod
    def _gradient(ctx: Any, outer: Tensor) -> Tensor:
        logits, reference, labels, index, totals = ctx.saved_tensors
        if ctx.kernel is not None:
            return ctx.kernel.gradient(Compared(logits, reference, labels, ctx.beta), totals, outer.contiguous())
        result, ctx.gradient = ctx.gradient, None
        if result is None:
            result = torch.empty_like(logits)
            compared = Compared(logits, reference, index, ctx.beta)
            # With the totals of the forward pass; where p is near q the difference may be rounded in another way.
            factor = torch.ones_like(outer) if result.dtype == outer.dtype else outer
            for rows, room in blocks(logits):
                pair = _pair(compared, rows, room, Totals(*totals[rows].split(1, 1)))
                pair.difference(factor[rows], out=result[rows])
        if result.dtype == outer.dtype:
            result.mul_(outer[:, None])
        if labels is not None:
            ignored = (labels == IGNORED)[:, None]
            # On a CPU it is cheap to look whether any token is ignored, and a mask takes longer than all the rest.
            if result.device.type != "cpu" or bool(ignored.any()):
                result.masked_fill_(ignored, 0.0)
        return result
