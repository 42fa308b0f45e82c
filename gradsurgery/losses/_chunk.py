"""One chunk of raw logits: the values of a loss, and its gradients written over the logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gradsurgery.losses import _kernel
from gradsurgery.losses._checks import check_values, float_type
from gradsurgery.losses._log_odds import gradient, reduce_
from gradsurgery.losses._loss import Loss

# Logits worked on at once in float32. On a CPU they are read several times, and should still be in the cache.
_BLOCK_BYTES = {"cpu": 4 << 20, "accelerator": 64 << 20}


@dataclass(frozen=True, eq=False)
class Task:
    """What happens to logits once the head's product has made them.

    Attributes:
        loss: The loss. Its reference, if it has one, has a head.
        scale: Number by which the logits are multiplied, see `Head`.
        softcap: Number at which they are capped, or None.
        chunk_size: Tokens per chunk; None chooses.
    """

    loss: Loss
    scale: float
    softcap: float | None
    chunk_size: int | None


def values_(
    logits: Tensor, labels: Tensor, task: Task, reference: Tensor | None, weights: Tensor, differentiate: bool
) -> Tensor:
    """Values of rows of raw logits, overwritten by the gradients of the values' weighted sum if ``differentiate``."""
    loss = task.loss
    if loss.log_odds is not None and _kernel.usable(logits):
        statistics = _kernel.reduce(logits, labels, task.scale, task.softcap)
        values, own, other = _slopes(loss, statistics.own, statistics.other, weights, differentiate)
        if differentiate:
            _kernel.gradient_(logits, statistics, own, other)
        return values
    if loss.in_place is not None and _raw(task):
        return loss.in_place(logits, labels.long(), reference, weights if differentiate else None)
    dtype = float_type(logits.dtype)
    values = torch.empty(len(labels), dtype=dtype, device=logits.device)
    block = max(1, _BLOCK_BYTES[kind(logits)] // (4 * logits.shape[1]))
    for part in chunks(len(labels), block):
        rows = _capped_(logits[part].to(dtype), task.scale, task.softcap)
        slope = None if task.softcap is None or not differentiate else (rows / task.softcap).square_().neg_().add_(1.0)
        index, factors = labels[part].long(), weights[part]
        if loss.log_odds is not None:
            reduced = reduce_(rows, index, loss.runner_up)
            values[part], own, other = _slopes(loss, reduced.own, reduced.other, factors, differentiate)
            gradients = gradient(rows, reduced, own, other, in_place=True) if differentiate else rows
        elif loss.in_place is not None:
            # The reference's logits were computed for this chunk alone, and may be overwritten.
            compared = None if reference is None else _reference_capped_(reference[part].to(dtype), loss)
            values[part], gradients = loss.in_place(rows, index, compared, factors if differentiate else None), rows
        else:
            others = () if reference is None else (_reference_capped_(reference[part].to(dtype, copy=True), loss),)
            values[part], gradients = _differentiated(loss, rows, (index, *others), factors, differentiate)
        if differentiate:
            if slope is not None:
                gradients = gradients * slope
            if task.scale != 1.0:
                gradients = gradients * task.scale
            if gradients.data_ptr() != logits[part].data_ptr():  # float32 rows have been overwritten where they are
                logits[part] = gradients
    return values


def chunks(count: int, size: int) -> Iterator[slice]:
    """As few slices as fit, of equal length: a short last one would cost as much as a long one."""
    number = -(-count // size)
    edges = [count * index // max(number, 1) for index in range(number + 1)]
    return (slice(*pair) for pair in pairwise(edges))


def kind(tensor: Tensor) -> str:
    """The column of a table of sizes: "cpu" or "accelerator"."""
    return "cpu" if tensor.device.type == "cpu" else "accelerator"


def _raw(task: Task) -> bool:
    """Whether the logits are compared as the heads make them."""
    head = None if task.loss.reference is None else task.loss.reference.head
    reference = (1.0, None) if head is None else (head.scale, head.softcap)
    return (task.scale, task.softcap) == reference == (1.0, None)


def _capped_(rows: Tensor, scale: float, softcap: float | None) -> Tensor:
    if scale != 1.0:
        rows.mul_(scale)
    return rows if softcap is None else rows.div_(softcap).tanh_().mul_(softcap)


def _reference_capped_(rows: Tensor, loss: Loss) -> Tensor:
    head = None if loss.reference is None else loss.reference.head
    return rows if head is None else _capped_(rows, head.scale, head.softcap)


def _slopes(
    loss: Loss, own: Tensor, other: Tensor | None, weights: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, and the derivatives of their weighted sum with respect to the log-odds of label and runner-up."""
    function: Any = loss.log_odds
    inputs = [own, other] if loss.runner_up and other is not None else [own]
    if not differentiate:
        values = function(*inputs)
        check_values(values, own)
        return values, own, other
    for tensor in inputs:
        tensor.requires_grad_()
    with torch.enable_grad(), _unhooked():
        values = function(*inputs)
    check_values(values, own)
    if not values.requires_grad:  # a constant
        return values, torch.zeros_like(own), torch.zeros_like(own) if loss.runner_up else None
    slopes = torch.autograd.grad(values, inputs, weights.to(values.dtype), allow_unused=True, materialize_grads=True)
    return values.detach(), slopes[0], slopes[1] if loss.runner_up else None


def _differentiated(
    loss: Loss, rows: Tensor, others: Sequence[Tensor], weights: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """Values of any row loss, and the gradient of their weighted sum, by autograd on one block."""
    rows = rows.detach()
    with torch.set_grad_enabled(differentiate), _unhooked():
        values = loss(rows.requires_grad_(differentiate), *others)
    if not values.requires_grad:
        return values, torch.zeros_like(rows) if differentiate else rows
    (gradients,) = torch.autograd.grad(values, rows, weights.to(values.dtype), materialize_grads=True)
    return values.detach(), gradients


def _unhooked() -> Any:
    """Hide from activation checkpointing what is differentiated here: it is no part of the caller's graph."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
