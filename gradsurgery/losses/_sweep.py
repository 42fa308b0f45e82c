"""Hidden states through a head and a loss, chunk by chunk; the gradients are computed on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.losses._backward import check_first_derivative
from gradsurgery.losses._checks import IGNORED, check_tokens, float_type
from gradsurgery.losses._chunk import Task, chunks, kind, values_

# Logits held at once, in bytes. On a CPU small chunks stay near the caches; a GPU needs large products.
_BYTES = {"cpu": 128 << 20, "accelerator": 256 << 20}
# Adding to a half-precision weight gradient rounds it every time, and on a CPU takes as long as the product: few, large
# chunks.
_BYTES_HALF_TRAINABLE = {"cpu": 512 << 20, "accelerator": 1 << 30}
# With a frozen head nothing but the logits takes memory. More rows save little time, and fewer make the products slow.
_FROZEN_CPU_ROWS = (64, 256)


class _Inputs(NamedTuple):
    """The tensors of one call; ``kept`` holds the places of the tokens that count."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    kept: Tensor


class _Wanted(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


class _Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Linear(torch.autograd.Function):
    """Values ``[N]``. The forward pass computes the gradients of their mean too, or the backward pass computes all."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, task: Task) -> Tensor:
        recompute = task.loss.recompute
        inputs = _Inputs(hidden, weight, bias, labels, (labels != IGNORED).nonzero().squeeze(1))
        kept = inputs.kept
        check_tokens(labels[kept], len(weight))
        needs = _Wanted(*ctx.needs_input_grad[:3])
        wanted = _Wanted(False, False, False) if recompute else needs
        unit = torch.full(kept.shape, 1.0 / max(len(kept), 1), dtype=float_type(hidden.dtype), device=hidden.device)
        values, gradients = _sweep(inputs, task, wanted, unit)
        ctx.task, ctx.needs, ctx.gradients = task, needs, None if recompute else gradients
        # With a frozen head the backward pass needs none of the three, so that the hidden states can be freed.
        again = recompute or needs.weight or needs.bias
        ctx.unit = unit
        ctx.save_for_backward(*((hidden, weight, bias) if again else (None, None, None)), labels, kept)
        ctx.shape = hidden.shape
        return values

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_first_derivative()
        inputs = _Inputs(*ctx.saved_tensors)
        kept, outer = inputs.kept, upstream[0]
        same = outer.stride() == (0,)  # values.sum() and values.sum() / n send such a tensor: no need to ask the device
        outer = outer[kept].to(ctx.unit.dtype)
        needs, known = ctx.needs, ctx.gradients
        if known is None:
            return *_spread(_sweep(inputs, ctx.task, needs, outer)[1], kept, ctx.shape), None, None
        factor = outer / ctx.unit
        # Comparing waits for the device, so it is done on a CPU only; after a mean there is nothing to multiply.
        mean = outer.device.type == "cpu" and bool((outer == ctx.unit).all())
        of_hidden = known.hidden
        if of_hidden is not None:  # always a new tensor: a second backward pass must find the old one unchanged
            of_hidden = of_hidden.clone() if mean else (of_hidden * factor[:, None]).to(of_hidden.dtype)
        of_weight, of_bias = known.weight, known.bias
        # Given to the caller, or freed before it is computed again, so that only one [V, H] exists. A second backward
        # pass computes its own.
        ctx.gradients = known = _Gradients(known.hidden, None, None)
        if needs.weight or needs.bias:
            if (of_weight is None and of_bias is None) or not (same or bool((outer == outer[:1]).all())):
                of_weight = of_bias = None
                _, again = _sweep(inputs, ctx.task, _Wanted(False, needs.weight, needs.bias), outer)
                of_weight, of_bias = again.weight, again.bias
            elif len(outer) and not mean:
                of_weight = None if of_weight is None else of_weight.mul_(factor[0])
                of_bias = None if of_bias is None else of_bias.mul_(factor[0])
        return *_spread(_Gradients(of_hidden, of_weight, of_bias), kept, ctx.shape), None, None


def _sweep(inputs: _Inputs, task: Task, wanted: _Wanted, weights: Tensor) -> tuple[Tensor, _Gradients]:
    """Values ``[N]``, 0 for tokens that do not count, and the gradients of the others' sum weighted by ``weights``."""
    hidden, weight, bias, labels, kept = inputs
    values = torch.zeros(len(labels), dtype=float_type(hidden.dtype), device=hidden.device)
    of_hidden = hidden.new_empty(len(kept), hidden.shape[1]) if wanted.hidden else None
    of_weight = torch.empty_like(weight) if wanted.weight else None
    of_bias = None
    if bias is not None and wanted.bias:  # few numbers, summed over every chunk: in 16 bits the sum would stop growing
        of_bias = torch.zeros_like(bias, dtype=float_type(bias.dtype))
    if of_weight is not None and not len(kept):
        of_weight.zero_()
    rows = min(task.chunk_size or chunk_rows(weight, trainable=wanted.weight), max(len(kept), 1))
    # One buffer for all chunks: a new one would be allocated before the old one is freed.
    buffer = hidden.new_empty(rows, len(weight))
    for index, part in enumerate(chunks(len(kept), rows)):
        chosen = kept[part]
        chunk = hidden[chosen]
        logits = buffer[: len(chosen)]
        if bias is None:
            torch.mm(chunk, weight.T, out=logits)
        else:
            torch.addmm(bias, chunk, weight.T, out=logits)
        reference = _reference_logits(task, chosen)
        values[chosen] = values_(logits, labels[chosen], task, reference, weights[part], any(wanted))
        if of_hidden is not None:
            torch.mm(logits, weight, out=of_hidden[part])
        if of_weight is not None and index == 0:
            torch.mm(logits.T, chunk, out=of_weight)
        elif of_weight is not None:
            of_weight.addmm_(logits.T, chunk)
        if of_bias is not None:
            of_bias += logits.sum(0, dtype=of_bias.dtype)
    return values, _Gradients(of_hidden, of_weight, None if bias is None or of_bias is None else of_bias.to(bias.dtype))


def _reference_logits(task: Task, chosen: Tensor) -> Tensor | None:
    """The reference's logits of a chunk, not yet scaled and capped."""
    reference = task.loss.reference
    if reference is None or reference.head is None:
        return None
    return torch.nn.functional.linear(reference.hidden[chosen], reference.head.weight, reference.head.bias)


def chunk_rows(weight: Tensor, trainable: bool) -> int:
    """Tokens per chunk if the caller did not say."""
    column = kind(weight)
    if column == "cpu" and not trainable:
        least, most = _FROZEN_CPU_ROWS
        return min(most, max(least, _BYTES[column] // (weight.element_size() * len(weight))))
    table = _BYTES_HALF_TRAINABLE if trainable and weight.element_size() < 4 else _BYTES
    return max(16, table[column] // (weight.element_size() * len(weight)))


def _spread(
    gradients: _Gradients, kept: Tensor, shape: torch.Size
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients, with zeros in the hidden states of tokens that do not count."""
    of_hidden = gradients.hidden
    if of_hidden is not None and len(kept) < shape[0]:
        of_hidden = of_hidden.new_zeros(shape).index_copy_(0, kept, of_hidden)
    return of_hidden, gradients.weight, gradients.bias
