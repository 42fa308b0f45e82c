"""Products and combinations of one parameter's tensors in plain PyTorch, chunk by chunk: on every device and type."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradsurgery.gram.rows import Write

# The chunks of all rows stay in a core's cache while their products are taken. torch.dot of 2^17 float32 numbers is
# off by 1e-7 to 6e-7, of numbers that are all the same by 2e-5; of a whole tensor of 1e8 it is off by up to 2e-2 on a
# CPU. Accelerators sum in trees, so their chunks can be large, which means fewer launches.
_CPU_CHUNK = 1 << 17
_ACCELERATOR_CHUNK = 1 << 24
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def products(
    tensors: list[Tensor | None],
    weights: tuple[Tensor, Callable[[Tensor], Tensor]] | None,
    writes: Sequence[tuple[Write, Tensor]] = (),
) -> list[tuple[int, int, Tensor]]:
    """The float64 inner product of every pair i <= j of the tensors that are not None, after the writes."""
    in_chunks = []
    tensors = list(tensors)
    for write, other in writes:
        target = tensors[write.row]
        assert target is not None
        if target.is_contiguous() and other.is_contiguous() and not target.is_complex():
            in_chunks.append((write, other))
        else:
            tensors[write.row] = write.do(target, other)
    present = [(k, tensor.detach()) for k, tensor in enumerate(tensors) if tensor is not None]
    pairs = [(a, b) for a in range(len(present)) for b in range(a, len(present))]
    partial: list[list[Tensor]] = [[] for _ in pairs]
    device = present[0][1].device
    # Sums of bf16 or fp16 products are often exact ties in float32, and ties all round the same way. Such a sum is
    # off by 6e-6 to 5e-5, the more the fewer partial sums a processor keeps. Float64 sums of a chunk in cache are
    # exact enough on every processor, and need no more of the memory's bandwidth.
    wide_types = (torch.float64, torch.complex128, *(_LOW_PRECISION if device.type == "cpu" else ()))
    dtype = torch.float64 if any(tensor.dtype in wide_types for _, tensor in present) else torch.float32
    operands = [tensor for _, tensor in present] + ([] if weights is None else [weights[0]])
    place = {k: number for number, (k, _) in enumerate(present)}
    others = len(operands)
    operands += [other for _, other in in_chunks]
    for views in chunks(operands, chunk_size(device), copy=True):
        parts = list(views)
        for number, (write, _) in enumerate(in_chunks, start=others):
            parts[place[write.row]] = write.do(parts[place[write.row]], parts[number])
        weight = None if weights is None else weights[1](parts[len(present)].to(dtype))
        for sums, product in zip(partial, _of_chunk(parts[: len(present)], weight, pairs, dtype), strict=True):
            sums.append(product)
    total = [sums[0].double() if len(sums) == 1 else torch.stack(sums).sum(dtype=torch.float64) for sums in partial]
    return [(present[a][0], present[b][0], value) for (a, b), value in zip(pairs, total, strict=True)]


def _of_chunk(
    parts: Sequence[Tensor], weight: Tensor | None, pairs: Sequence[tuple[int, int]], dtype: torch.dtype
) -> list[Tensor]:
    """The products of a chunk. Its copies in another type are gone before those of the next chunk are made."""
    left = wide = [part.to(dtype) for part in parts]
    if weight is not None:
        left = [part * weight for part in wide]
    return [torch.dot(left[a], wide[b]) for a, b in pairs]


def combine_on_host(target: Tensor, scale: float, others: list[tuple[float, Tensor]]) -> None:
    """Overwrite ``target`` by ``scale * target + sum of coefficient * other``, by numbers that the host knows."""
    low = target.dtype in _LOW_PRECISION  # add_ would round the coefficient to the target's 8 or 11 bits
    if not others or (scale == 1.0 and len(others) == 1 and not low):
        if scale != 1.0:
            target.mul_(scale)
        for coefficient, other in others:
            target.add_(other, alpha=coefficient)
        return
    size = chunk_size(target.device)
    for part, *parts in chunks([target, *(other for _, other in others)], size):
        wide = part.float() if low else part
        if scale != 1.0:
            wide.mul_(scale)
        for (coefficient, _), other in zip(others, parts, strict=True):
            wide.add_(other, alpha=coefficient)
        if wide is not part:
            part.copy_(wide)


def combine_on_device(target: Tensor, scale: Tensor, others: list[tuple[Tensor, Tensor]]) -> None:
    """As `combine_on_host`, by 0-dim tensors on the target's device, which the host does not read."""
    for part, *parts in chunks([target, *(other for _, other in others)], _ACCELERATOR_CHUNK):
        wide = part.float() if part.dtype in _LOW_PRECISION else part
        real = wide.dtype.to_real()
        wide.mul_(scale.to(real))
        for (coefficient, _), other in zip(others, parts, strict=True):
            wide.addcmul_(other.to(wide.dtype), coefficient.to(real))
        if wide is not part:
            part.copy_(wide)


def chunk_size(device: torch.device) -> int:
    """The number of elements a chunk on that device should have."""
    return _CPU_CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK


def chunks(tensors: list[Tensor], size: int, *, copy: bool = False) -> list[tuple[Tensor, ...]]:
    """The tensors cut alike into one-dimensional views of ``size`` numbers, complex tensors viewed as pairs of reals.

    Where a tensor is not contiguous and so has no such view, it is copied, or without ``copy`` all are handed back
    whole.
    """
    if copy:
        tensors = [tensor.resolve_conj().contiguous() for tensor in tensors]  # a strided dot is slower and less exact
    elif not all(tensor.is_contiguous() and not tensor.is_conj() for tensor in tensors):
        return [tuple(tensors)]
    flat = [(torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1) for tensor in tensors]
    if flat[0].numel() <= size:
        return [tuple(flat)]
    return list(zip(*(tensor.split(size) for tensor in flat), strict=True))
