"""A language-model head and a loss in one: chunk by chunk, so that ``[tokens, vocabulary]`` is never held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.gram import dtensor_type
from gradsurgery.losses import _kernel
from gradsurgery.losses._log_odds import IGNORED, OfLogOdds, check_integers, float_type, gradient, of_log_odds, reduce_
from gradsurgery.losses._table import RowLoss, as_row_loss, row_loss_by_name

# Logits held at once, in bytes. On a CPU small chunks stay near the caches; a GPU needs large products.
_BYTES = {"cpu": 64 << 20, "accelerator": 256 << 20}
# Adding to a half-precision weight gradient rounds it every time, and on a CPU costs as much as the product: few, large chunks.
_BYTES_HALF_TRAINABLE = {"cpu": 512 << 20, "accelerator": 1 << 30}
_FROZEN_CPU_ROWS = 64
# Logits worked on at once in float32: on a CPU what is read several times comes from the cache.
_BLOCK_BYTES = {"cpu": 4 << 20, "accelerator": 64 << 20}


def linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: str | RowLoss = "cross_entropy",
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    r"""A loss of the logits ``hidden @ weight.T + bias`` that never holds them all: the value and gradients of the plain loss.

    .. math:: \ell_n = L(c \tanh(s (W h_n + b)/c), y_n)

    Tokens whose label is -100 are left out before the head; the others go through it chunk by chunk. The gradients with respect to
    hidden states, weight and bias are made in the same pass (three matrix products; two with a frozen head), as if the values' mean were
    to be taken. A backward pass that brings the same number for every token, as a mean or a sum does, at most scales them. One with a
    weight per token is as right: hidden states' gradients are scaled row by row, and a trainable weight's is computed again (two products
    more). ``recompute=True``, for losses that are made of the values afterwards (`npo`, `simnpo`, `dpo`), leaves all of it to the
    backward pass: four products, and nothing held meanwhile but the inputs.

    Args:
        hidden: ``[N, H]``, the states that predict the labels (`answer_tokens` shifts and gathers hidden states as it does logits).
        weight: ``[V, H]``. Its gradient is computed only if it requires one.
        labels: ``[N]`` integers, -100 where a token does not count.
        loss: The name of a token loss in `LOSSES` or of a row loss in `ROW_LOSSES`, one of these functions, a ``functools.partial`` of one,
            or any function of logits ``[n, V]`` and labels ``[n]`` (and reference logits, if there are any) whose value i depends on row i
            only.
        bias: ``[V]`` or None.
        chunk_size: Tokens whose logits are held at once; None chooses: on a CPU 64 with a frozen head, else 64 MiB of logits (512 MiB
            for a trainable half-precision head, whose gradient would lose digits and time with every chunk added to it); on a GPU 256 MiB,
            or 1 GiB.
        scale: s, by which a model family multiplies its logits (Cohere; 1/s in Granite).
        softcap: c, at which it caps them (Gemma 2); None for no cap.
        reference_hidden: ``[N, H']``, hidden states of the reference model, constants, for losses that need its logits (`undial`,
            `kl_divergence`).
        reference_weight: Its head ``[V, H']``; None: ``weight``.
        recompute: Make the gradients in the backward pass. Always so for float16, whose gradients must be scaled before they are rounded.

    Returns:
        ``[N]`` float32 (float64 for float64), 0 where the label is -100.

    Raises:
        ValueError: If the loss is unknown, a shape does not fit, or a loss needs a reference and there is none (or the other way round).
        TypeError: If the types do not fit, or a tensor is sharded (a DTensor): call this where FSDP has gathered the head, or let the model
            compute its logits.

    Memory: ``chunk_size x V`` logits, a block of them in float32, and the gradients; nothing of size ``[N, V]``. Under autocast
    the products are in its type; a second derivative is not defined; under ``torch.compile`` it is a break in the graph.

    Difference from ``torch.nn.functional.linear_cross_entropy``: that one is cross-entropy alone, needs four products for a value per
    token, and sends the prompt through the head too. Liger and Cut Cross-Entropy need a GPU.

    Example:
        >>> hidden, weight = torch.eye(2).requires_grad_(), torch.zeros(5, 2, requires_grad=True)
        >>> linear(hidden, weight, torch.tensor([3, -100]), "ceu").sum().backward()
        >>> weight.grad[3]
        tensor([0.2000, 0.0000])
    """
    loss = row_loss_by_name(loss) if isinstance(loss, str) else as_row_loss(loss)
    _check(hidden, weight, labels, bias, chunk_size, softcap, reference_hidden, reference_weight)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"expected hidden and weight of one type, found {hidden.dtype} and {weight.dtype}; convert one, or use autocast"
        )
    reference = None
    if reference_hidden is not None:
        other = weight if reference_weight is None else reference_weight
        reference = (reference_hidden.detach().to(other.dtype), other.detach())
    head = _Head(loss, scale, softcap, chunk_size, reference)
    # What is differentiated in the forward pass is not yet multiplied by a GradScaler's scale: too small for float16.
    recompute = recompute or hidden.dtype == torch.float16
    with torch.autocast(hidden.device.type, enabled=False):
        return _Linear.apply(hidden, weight, bias, labels, head, recompute)


class _Head(NamedTuple):
    """What turns chunks of hidden states into values."""

    loss: RowLoss
    scale: float
    softcap: float | None
    chunk_size: int | None
    reference: tuple[Tensor, Tensor] | None


class _Wanted(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


class _Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Linear(torch.autograd.Function):
    """Values ``[N]``; the gradients are made in the forward pass, as if their mean were to be taken, or in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: _Head, recompute: bool
    ) -> Tensor:
        kept = (labels != IGNORED).nonzero().squeeze(1)
        needs = _Wanted(*ctx.needs_input_grad[:3])
        wanted = _Wanted(False, False, False) if recompute else needs
        unit = torch.full((), 1.0 / max(len(kept), 1), dtype=float_type(hidden.dtype), device=hidden.device)
        values, gradients = _sweep(hidden, weight, bias, labels, kept, head, wanted, unit.expand(len(kept)))
        ctx.head, ctx.needs, ctx.gradients = head, needs, None if recompute else gradients
        # With a frozen head the backward pass needs neither of them: the hidden states can be freed.
        again = recompute or needs.weight or needs.bias
        ctx.unit = unit
        ctx.save_for_backward(kept, labels, *((hidden, weight, bias) if again else (None, None, None)))
        ctx.shape = hidden.shape
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept, labels, hidden, weight, bias = ctx.saved_tensors
        outer = upstream[0]
        same = outer.stride() == (0,)  # what .sum() and .mean() send: known without asking the device
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
        if of_hidden is not None and not mean:
            of_hidden = (of_hidden * factor[:, None]).to(of_hidden.dtype)
        of_weight, of_bias = made.weight, made.bias
        if needs.weight or needs.bias:
            if (of_weight is None and of_bias is None) or not (same or bool((outer == outer[:1]).all())):
                wanted = _Wanted(False, needs.weight, needs.bias)
                _, again = _sweep(hidden, weight, bias, labels, kept, ctx.head, wanted, outer)
                of_weight, of_bias = again.weight, again.bias
            elif len(outer):
                # In place and handed over, so that there is one [V, H] and not two; a second backward pass makes it anew.
                ctx.gradients = _Gradients(made.hidden, None, None)
                if not mean:
                    of_weight = None if of_weight is None else of_weight.mul_(factor[0])
                    of_bias = None if of_bias is None else of_bias.mul_(factor[0])
        return *_spread(_Gradients(of_hidden, of_weight, of_bias), kept, ctx.shape), None, None, None


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    kept: Tensor,
    head: _Head,
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
    buffer = hidden.new_empty(
        rows, len(weight)
    )  # one for all chunks: a new one would be made before the old one is freed
    for index, part in enumerate(_chunks(len(kept), rows)):
        chosen = kept[part]
        chunk = hidden[chosen]
        logits = buffer[: len(chosen)]
        if bias is None:
            torch.mm(chunk, weight.T, out=logits)
        else:
            torch.addmm(bias, chunk, weight.T, out=logits)
        reference = None
        if head.reference is not None:
            reference = head.reference[0][chosen] @ head.reference[1].T
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
    logits: Tensor, labels: Tensor, head: _Head, reference: Tensor | None, outer: Tensor, differentiate: bool
) -> Tensor:
    """Values of rows of raw logits, which are overwritten by their gradients if ``differentiate``."""
    found = of_log_odds(head.loss)
    if found is not None and _kernel.usable(logits):
        reduced = _kernel.reduce(logits, labels, head.scale, head.softcap)
        values, own, other = _slopes(found, reduced.own, reduced.other, outer, differentiate)
        if differentiate:
            _kernel.gradient_(logits, labels, reduced, own, other, head.scale, head.softcap)
        return values
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


def _capped_(rows: Tensor, head: _Head) -> Tensor:
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
    with torch.enable_grad():
        values = found(*inputs, *([] if found.runner_up else [None]))
    _check_values(values, own)
    slopes = torch.autograd.grad(values, inputs, outer.to(values.dtype), allow_unused=True, materialize_grads=True)
    return values.detach(), slopes[0], slopes[1] if found.runner_up else None


def _differentiated(
    loss: RowLoss, rows: Tensor, others: Sequence[Tensor], outer: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """Values of any row loss, and the gradient of their weighted sum, by autograd on one block."""
    function: Any = loss
    rows = rows.detach()
    with torch.set_grad_enabled(differentiate):
        values = function(rows.requires_grad_(differentiate), *others)
    _check_values(values, others[0])
    if not differentiate:
        return values, rows
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
        return _FROZEN_CPU_ROWS
    table = _BYTES_HALF_TRAINABLE if trainable and weight.element_size() < 4 else _BYTES
    return max(16, table[kind] // (weight.element_size() * len(weight)))


def _spread(
    gradients: _Gradients, kept: Tensor, shape: torch.Size
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_hidden = gradients.hidden
    if of_hidden is not None and len(kept) < shape[0]:
        of_hidden = of_hidden.new_zeros(shape).index_copy_(0, kept, of_hidden)
    return of_hidden, gradients.weight, gradients.bias


def _check_values(values: Any, tokens: Tensor) -> None:
    if not isinstance(values, Tensor) or values.shape != tokens.shape:
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"loss: expected one value per token, {list(tokens.shape)}, found {found}; take no mean in it")


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    softcap: float | None,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
) -> None:
    sharded = dtensor_type()
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if sharded is not None and isinstance(tensor, sharded):
            raise TypeError(
                f"{name}: expected a whole tensor, found a sharded one (DTensor); call linear where the head is gathered, or let the model "
                "compute its logits and apply the plain loss"
            )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] < 2:
        raise ValueError(
            f"expected hidden [N, H] and weight [V, H] with V >= 2, found {list(hidden.shape)} and {list(weight.shape)}; "
            "answer_tokens makes [N, H] of a backbone's [B, T, H]"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels: expected one per hidden state, [{len(hidden)}], found {list(labels.shape)}")
    check_integers(labels)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{len(weight)}], found {list(bias.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected a number of tokens >= 1, found {chunk_size}")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap: expected a positive number or None, found {softcap}")
    if reference_hidden is None and reference_weight is not None:
        raise ValueError("reference_weight: expected reference_hidden with it, found none")
    if reference_hidden is not None:
        other = weight if reference_weight is None else reference_weight
        if reference_hidden.shape != (len(hidden), other.shape[1]) or len(other) != len(weight):
            raise ValueError(
                f"reference: expected hidden states [{len(hidden)}, H'] and a weight [{len(weight)}, H'], found "
                f"{list(reference_hidden.shape)} and {list(other.shape)}"
            )
