"""Hidden states through a head and a loss, chunk by chunk, with the gradients made on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.losses import _kernel
from gradsurgery.losses._log_odds import IGNORED, OfLogOdds, float_type, gradient, of_log_odds, reduce_
from gradsurgery.losses._rows import of_pair
from gradsurgery.losses._table import RowLoss

# Logits held at once, in bytes. On a CPU small chunks stay near the caches; a GPU needs large products.
_BYTES = {"cpu": 64 << 20, "accelerator": 256 << 20}
# Adding to a half-precision weight gradient rounds it every time, and on a CPU costs as much as the product: few, large chunks.
_BYTES_HALF_TRAINABLE = {"cpu": 512 << 20, "accelerator": 1 << 30}
# With a frozen head the logits are all the memory there is: more rows save little time, and fewer make slow products.
_FROZEN_CPU_ROWS = (64, 128)
# Logits worked on at once in float32: on a CPU what is read several times comes from the cache.
_BLOCK_BYTES = {"cpu": 4 << 20, "accelerator": 64 << 20}


class Reference(NamedTuple):
    """The other model's hidden states and head, constants."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Head(NamedTuple):
    """What turns chunks of hidden states into values."""

    loss: RowLoss
    scale: float
    softcap: float | None
    chunk_size: int | None
    reference: Reference | None


class _Wanted(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


class _Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Linear(torch.autograd.Function):
    """Values ``[N]``; the gradients are made in the forward pass, as if their mean were to be taken, or in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head, recompute: bool
    ) -> Tensor:
        kept = (labels != IGNORED).nonzero().squeeze(1)
        _check_range(labels[kept], len(weight))
        needs = _Wanted(*ctx.needs_input_grad[:3])
        wanted = _Wanted(False, False, False) if recompute else needs
        unit = torch.full(kept.shape, 1.0 / max(len(kept), 1), dtype=float_type(hidden.dtype), device=hidden.device)
        values, gradients = _sweep(hidden, weight, bias, labels, kept, head, wanted, unit)
        ctx.head, ctx.needs, ctx.gradients = head, needs, None if recompute else gradients
        # With a frozen head the backward pass needs neither of them: the hidden states can be freed.
        again = recompute or needs.weight or needs.bias
        ctx.unit = unit
        ctx.save_for_backward(kept, labels, *((hidden, weight, bias) if again else (None, None, None)))
        ctx.shape = hidden.shape
        return values

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear: expected a first derivative, found create_graph=True; use the loss on logits where a second one is needed"
            )
        kept, labels, hidden, weight, bias = ctx.saved_tensors
        outer = upstream[0]
        same = outer.stride() == (0,)  # what values.sum() and values.sum() / n send: known without asking the device
        outer = outer[kept].to(ctx.unit.dtype)
        needs, made = ctx.needs, ctx.gradients
        if made is None:
            return (
                *_spread(_sweep(hidden, weight, bias, labels, kept, ctx.head, needs, outer)[1], kept, ctx.shape),
                None,
                None,
                None,
            )
        factor = outer / ctx.unit
        # A CPU need not be waited for: it can see that a mean was taken, and that there is nothing to multiply.
        mean = outer.device.type == "cpu" and bool((outer == ctx.unit).all())
        of_hidden = made.hidden
        if of_hidden is not None:  # a new tensor in any case: a second backward pass finds the old one as it was
            of_hidden = of_hidden.clone() if mean else (of_hidden * factor[:, None]).to(of_hidden.dtype)
        of_weight, of_bias = made.weight, made.bias
        # Handed over, or given up before it is made anew: there is one [V, H] and not two, and a second backward pass makes its own.
        ctx.gradients = made = _Gradients(made.hidden, None, None)
        if needs.weight or needs.bias:
            if (of_weight is None and of_bias is None) or not (same or bool((outer == outer[:1]).all())):
                of_weight = of_bias = None
                wanted = _Wanted(False, needs.weight, needs.bias)
                _, again = _sweep(hidden, weight, bias, labels, kept, ctx.head, wanted, outer)
                of_weight, of_bias = again.weight, again.bias
            elif len(outer) and not mean:
                of_weight = None if of_weight is None else of_weight.mul_(factor[0])
                of_bias = None if of_bias is None else of_bias.mul_(factor[0])
        return *_spread(_Gradients(of_hidden, of_weight, of_bias), kept, ctx.shape), None, None, None


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    head: Head,
    wanted: _Wanted,
    outer: Tensor,
) -> tuple[Tensor, _Gradients]:
    """Values of the kept tokens, spread over all, and the gradients of their sum weighted by ``outer``."""
    values = torch.zeros(len(labels), dtype=float_type(hidden.dtype), device=hidden.device)
    of_hidden = hidden.new_empty(len(kept), hidden.shape[1]) if wanted.hidden else None
    of_weight = torch.empty_like(weight) if wanted.weight else None
    of_bias = None if bias is None or not wanted.bias else torch.zeros_like(bias)
    if of_weight is not None and not len(kept):
        of_weight.zero_()
    rows = min(head.chunk_size or chunk_rows(weight, trainable=wanted.weight), max(len(kept), 1))
    # One for all chunks: a new one would be made before the old one is freed.
    buffer = hidden.new_empty(rows, len(weight))
    for index, part in enumerate(_chunks(len(kept), rows)):
        chosen = kept[part]
        chunk = hidden[chosen]
        logits = buffer[: len(chosen)]
        if bias is None:
            torch.mm(chunk, weight.T, out=logits)
        else:
            torch.addmm(bias, chunk, weight.T, out=logits)
        reference = None
        if (other := head.reference) is not None:
            reference = torch.nn.functional.linear(other.hidden[chosen], other.weight, other.bias)
        values[chosen] = _rows_(logits, labels[chosen], head, reference, outer[part], any(wanted))
        if of_hidden is not None:
            torch.mm(logits, weight, out=of_hidden[part])
        if of_weight is not None and index == 0:
            torch.mm(logits.T, chunk, out=of_weight)
        elif of_weight is not None:
            of_weight.addmm_(logits.T, chunk)
        if of_bias is not None:
            of_bias += logits.sum(0)
    return values, _Gradients(of_hidden, of_weight, of_bias)


def _rows_(
    logits: Tensor, labels: Tensor, head: Head, reference: Tensor | None, outer: Tensor, differentiate: bool
) -> Tensor:
    """Values of rows of raw logits, which are overwritten by their gradients if ``differentiate``."""
    found = of_log_odds(head.loss)
    if found is not None and _kernel.usable(logits):
        reduced = _kernel.reduce(logits, labels, head.scale, head.softcap)
        values, own, other = _slopes(found, reduced.own, reduced.other, outer, differentiate)
        if differentiate:
            _kernel.gradient_(logits, labels, reduced, own, other, head.scale, head.softcap)
        return values
    pair = of_pair(head.loss)
    dtype = float_type(logits.dtype)
    values = torch.empty(len(labels), dtype=dtype, device=logits.device)
    block = max(1, _BLOCK_BYTES[_kind(logits)] // (4 * logits.shape[1]))
    for part in _chunks(len(labels), block):
        rows = _capped_(logits[part].to(dtype), head)
        slope = None if head.softcap is None or not differentiate else (rows / head.softcap).square_().neg_().add_(1.0)
        index, weights = labels[part].long(), outer[part]
        if found is not None:
            reduced = reduce_(rows, index, found.runner_up)
            values[part], own, other = _slopes(found, reduced.own, reduced.other, weights, differentiate)
            gradients = gradient(rows, reduced, own, other, in_place=True) if differentiate else rows
        elif pair is not None:
            # A product of this chunk alone: it may be overwritten.
            other = None if reference is None else _capped_(reference[part].to(dtype), head)
            values[part], gradients = pair(rows, index, other, weights if differentiate else None), rows
        else:
            others = () if reference is None else (_capped_(reference[part].to(dtype, copy=True), head),)
            values[part], gradients = _differentiated(head.loss, rows, (index, *others), weights, differentiate)
        if differentiate:
            if slope is not None:
                gradients = gradients * slope
            if head.scale != 1.0:
                gradients = gradients * head.scale
            if gradients.data_ptr() != logits[part].data_ptr():  # float32 rows are worked on where they are
                logits[part] = gradients
    return values


def _capped_(rows: Tensor, head: Head) -> Tensor:
    if head.scale != 1.0:
        rows.mul_(head.scale)
    return rows if head.softcap is None else rows.div_(head.softcap).tanh_().mul_(head.softcap)


def _slopes(
    found: OfLogOdds, own: Tensor, other: Tensor | None, outer: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, and their derivatives (weighted by ``outer``) with respect to the log-odds of label and runner-up."""
    if not differentiate:
        values = found(own, other)
        _check_values(values, own)
        return values, own, other
    inputs = [own.requires_grad_(), *([other.requires_grad_()] if found.runner_up and other is not None else [])]
    with torch.enable_grad(), _unhooked():
        values = found(*inputs, *([] if found.runner_up else [None]))
    _check_values(values, own)
    if not values.requires_grad:  # a constant
        return values, *(torch.zeros_like(own), torch.zeros_like(own) if found.runner_up else None)
    slopes = torch.autograd.grad(values, inputs, outer.to(values.dtype), allow_unused=True, materialize_grads=True)
    return values.detach(), slopes[0], slopes[1] if found.runner_up else None


def _differentiated(
    loss: RowLoss, rows: Tensor, others: Sequence[Tensor], outer: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """Values of any row loss, and the gradient of their weighted sum, by autograd on one block."""
    function: Any = loss
    rows = rows.detach()
    with torch.set_grad_enabled(differentiate), _unhooked():
        values = function(rows.requires_grad_(differentiate), *others)
    _check_values(values, others[0])
    if not values.requires_grad:
        return values, torch.zeros_like(rows) if differentiate else rows
    (gradients,) = torch.autograd.grad(values, rows, outer.to(values.dtype), materialize_grads=True)
    return values.detach(), gradients


def _chunks(count: int, size: int) -> Iterator[slice]:
    """As few slices as fit, of equal length: a short last one would cost as much as a long one."""
    number = -(-count // size)
    edges = [count * index // max(number, 1) for index in range(number + 1)]
    return (slice(*pair) for pair in pairwise(edges))


def _kind(tensor: Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "accelerator"


def chunk_rows(weight: Tensor, trainable: bool) -> int:
    """Tokens a chunk where the caller did not say."""
    kind = _kind(weight)
    if kind == "cpu" and not trainable:
        least, most = _FROZEN_CPU_ROWS
        return min(most, max(least, _BYTES[kind] // (weight.element_size() * len(weight))))
    table = _BYTES_HALF_TRAINABLE if trainable and weight.element_size() < 4 else _BYTES
    return max(16, table[kind] // (weight.element_size() * len(weight)))


def _spread(
    gradients: _Gradients, kept: Tensor, shape: torch.Size
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_hidden = gradients.hidden
    if of_hidden is not None and len(kept) < shape[0]:
        of_hidden = of_hidden.new_zeros(shape).index_copy_(0, kept, of_hidden)
    return of_hidden, gradients.weight, gradients.bias


def _check_range(labels: Tensor, vocabulary: int) -> None:
    if not len(labels):
        return
    least, most = torch.stack(labels.aminmax()).tolist()
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"labels: expected -100 or a token of the head's {vocabulary}, found {least if least < 0 else most}; a tokenizer that outgrew "
            "the model's embeddings makes such labels"
        )


def _check_values(values: Any, tokens: Tensor) -> None:
    if not isinstance(values, Tensor) or values.shape != tokens.shape:
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"loss: expected one value per token, {list(tokens.shape)}, found {found}; take no mean in it")


def _unhooked() -> Any:
    """What is differentiated within a forward pass is no part of the caller's graph: activation checkpointing must not see it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
