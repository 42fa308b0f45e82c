"""Inner products and linear combinations of rows, for plain tensors, DTensors and every device.

A *row* is one objective's gradient: a list with one tensor (or ``None``) per parameter, never flattened into one
vector. A coordinate-free rule sees nothing of K rows but their Gram matrix ``gram[i, j] = <row_i, row_j>``, and it can
do nothing with them but a linear combination. This module computes the matrix and applies the combination.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Row: TypeAlias = Sequence[Tensor | None]
"""One objective's gradient: a tensor, or None where it has no gradient, for each parameter."""

Metric: TypeAlias = Callable[[int], "tuple[Tensor, Callable[[Tensor], Tensor]] | None"]
"""The weights of an inner product: parameter index -> (statistic, function), or None where it is Euclidean.

The statistic is a tensor shaped like the parameter; the function makes positive weights of it. It is called chunk by
chunk, so that no tensor of the parameter's size is ever allocated."""

# The chunks of all rows stay in a core's cache while their products are taken. torch.dot of 2^17 float32 numbers is
# off by 1e-7 to 6e-7; of a whole tensor of 1e8 it is off by up to 2e-2 on a CPU. Accelerators sum in trees, so their
# chunks can be large, which means fewer launches.
_CPU_CHUNK = 1 << 17
_ACCELERATOR_CHUNK = 1 << 24
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def gram(rows: Sequence[Row]) -> Tensor:
    r"""Gram matrix of K rows, $G_{ij} = \langle \mathrm{row}_i, \mathrm{row}_j \rangle$.

    Products are taken in float32, chunk by chunk (in float64 for float64 rows, and on a CPU for bf16 and fp16 rows).
    The sums of the chunks are added in float64. A ``None`` in a row is a zero gradient. Of DTensors each rank
    multiplies what it holds, and one ``all_reduce`` of K x K numbers for each sharding pattern adds the ranks' parts,
    so every rank of the mesh must call this.

    Args:
        rows: K rows over the same parameters.

    Returns:
        Float64 ``[K, K]``, symmetric, on the rows' device. A NaN or inf anywhere in row k makes entry ``[k, k]``
        non-finite.

    Raises:
        ValueError: If there is no row, the rows differ in length, or two tensors of one parameter differ in shape.
        RuntimeError: If a DTensor holds a partial sum that was never reduced.

    Cost: reads every row once; K (K + 1) / 2 products an element; no temporaries beyond one chunk.

    Example:
        >>> forget = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
        >>> retain = [torch.tensor([-1.0, 2.0]), None]
        >>> gram([forget, retain])
        tensor([[25., -3.],
                [-3.,  5.]], dtype=torch.float64)
    """
    return block_gram(rows)[0]


def block_gram(
    rows: Sequence[Row],
    *,
    blocks: Sequence[int] | None = None,
    num_blocks: int = 1,
    metric: Metric | None = None,
    like: Sequence[Tensor] | None = None,
) -> Tensor:
    """Gram matrices of S blocks of parameters, ``G[s, i, j] = sum over block s of row_i * weight * row_j``.

    Args:
        rows: K rows over the same P parameters.
        blocks: The block of each parameter, P numbers below ``num_blocks``; all in block 0 when None.
        num_blocks: S.
        metric: Weights of the inner product (see `Metric`); Euclidean when None.
        like: The P parameters. With them a rank knows which ``all_reduce`` it takes part in even where its own gradient
            is None.

    Returns:
        Float64 ``[S, K, K]``.

    Raises:
        ValueError: As `gram`.
        RuntimeError: As `gram`.
    """
    num_rows, num_parameters = check_rows(rows)
    products: dict[_Sharding, dict[torch.device, list[tuple[int, Tensor]]]] = {}
    for index in range(num_parameters):
        tensors = [row[index] for row in rows]
        placed = next((tensor for tensor in tensors if tensor is not None), None)
        example = placed if like is None else like[index]
        if example is None:
            continue
        sharding, local = local_parts(example, tensors, index)
        by_device = products.setdefault(sharding, {})
        if placed is None:
            continue
        weights = None if metric is None else metric(index)
        if weights is not None:
            weights = (local_tensor(weights[0]), weights[1])
        block = 0 if blocks is None else blocks[index]
        for i, j, product in _products(local, weights):
            entry = (block * num_rows + i) * num_rows + j
            by_device.setdefault(product.device, []).append((entry, product))
            if i != j:
                by_device[product.device].append((entry + (j - i) * (num_rows - 1), product))
    device = _first_device(rows, like)
    total = torch.zeros(num_blocks * num_rows * num_rows, dtype=torch.float64, device=device)
    # Insertion order is parameter order, the same on every rank, so the collectives of different shardings cannot
    # cross.
    for sharding, by_device in products.items():
        part = torch.zeros_like(total)
        for found in by_device.values():
            values = torch.stack([product for _, product in found]).to(device)
            part.index_add_(0, numbers_on(device, [entry for entry, _ in found]), values)
        if sharding is not None:
            mesh, dimensions = sharding
            for dimension in dimensions:
                torch.distributed.all_reduce(part, group=mesh.get_group(dimension))
        total += part
    return total.view(num_blocks, num_rows, num_rows)


def combine_(rows: Sequence[Row], coefficients: Tensor) -> list[Tensor | None]:
    r"""Overwrite the first row by $\sum_k c_k\, \mathrm{row}_k$.

    Args:
        rows: K rows over the same parameters. Tensors of ``rows[0]`` are overwritten in place. Where it holds None and
            another row does not, a new tensor is put there, so ``rows[0]`` must then be a list.
        coefficients: The c_k, ``[K]``.

    Returns:
        ``rows[0]``.

    Raises:
        ValueError: If the rows differ in length or ``coefficients`` is not ``[K]``.

    Where a parameter has no gradient in any row it stays None. Low-precision rows are combined in float32 and rounded
    once. A NaN coefficient gives NaN, and so does 0 times inf.

    Cost: reads every row once and writes one; no temporaries beyond one chunk.

    Example:
        >>> forget, retain = [torch.tensor([3.0, 0.0]), None], [torch.tensor([-1.0, 2.0]), torch.tensor([1.0])]
        >>> combine_([forget, retain], torch.tensor([1.0, 2.0]))
        [tensor([1., 4.]), tensor([2.])]
    """
    if coefficients.shape != (len(rows),):
        raise ValueError(
            f"coefficients: expected one for each of {len(rows)} rows, [{len(rows)}], found {list(coefficients.shape)}"
        )
    return combine_blocks_(rows, coefficients[None])


@torch.no_grad()
def combine_blocks_(
    rows: Sequence[Row], coefficients: Tensor, *, blocks: Sequence[int] | None = None
) -> list[Tensor | None]:
    """As `combine_` with one set of coefficients for each block of parameters.

    Args:
        rows: K rows over P parameters; ``rows[0]`` is overwritten.
        coefficients: ``[S, K]``.
        blocks: The block of each parameter; all in block 0 when None.

    Returns:
        ``rows[0]``.
    """
    _, num_parameters = check_rows(rows)
    first = rows[0]
    # On an accelerator the coefficients stay where they are, because reading them would make the host wait.
    numbers = coefficients.tolist() if coefficients.device.type == "cpu" else None
    for index in range(num_parameters):
        tensors = [row[index] for row in rows]
        placed = next((tensor for tensor in tensors if tensor is not None), None)
        if placed is None:
            continue
        if tensors[0] is None:
            if not isinstance(first, list):
                raise TypeError(
                    f"rows[0]: expected a list, because it is given a tensor at {index}, found {type(first).__name__}"
                )
            tensors[0] = first[index] = torch.zeros_like(placed)
        _, local = local_parts(placed, tensors, index)
        block = 0 if blocks is None else blocks[index]
        target = local[0]
        assert target is not None
        others = [(k, other) for k, other in enumerate(local) if k > 0 and other is not None]
        if numbers is not None:
            _combine_on_host(target, numbers[block][0], [(numbers[block][k], other) for k, other in others])
        else:
            row = coefficients[block].to(target.device)
            _combine_on_device(target, row[0], [(row[k], other) for k, other in others])
    return first if isinstance(first, list) else list(first)


def _combine_on_host(target: Tensor, scale: float, others: list[tuple[float, Tensor]]) -> None:
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


def _combine_on_device(target: Tensor, scale: Tensor, others: list[tuple[Tensor, Tensor]]) -> None:
    for part, *parts in chunks([target, *(other for _, other in others)], _ACCELERATOR_CHUNK):
        wide = part.float() if part.dtype in _LOW_PRECISION else part
        real = wide.dtype.to_real()
        wide.mul_(scale.to(real))
        for (coefficient, _), other in zip(others, parts, strict=True):
            wide.addcmul_(other.to(wide.dtype), coefficient.to(real))
        if wide is not part:
            part.copy_(wide)


def _products(
    tensors: list[Tensor | None], weights: tuple[Tensor, Callable[[Tensor], Tensor]] | None
) -> list[tuple[int, int, Tensor]]:
    """The float64 inner product of every pair i <= j of the tensors that are not None."""
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
    for parts in chunks(operands, chunk_size(device), copy=True):
        left = wide = [part.to(dtype) for part in parts[: len(present)]]
        if weights is not None:
            weight = weights[1](parts[-1].to(dtype))
            left = [part * weight for part in wide]
        for sums, (a, b) in zip(partial, pairs, strict=True):
            sums.append(torch.dot(left[a], wide[b]))
    total = [sums[0].double() if len(sums) == 1 else torch.stack(sums).sum(dtype=torch.float64) for sums in partial]
    return [(present[a][0], present[b][0], value) for (a, b), value in zip(pairs, total, strict=True)]


def chunk_size(device: torch.device) -> int:
    """The number of elements a chunk on that device should have."""
    return _CPU_CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK


def chunks(tensors: list[Tensor], size: int, *, copy: bool = False) -> list[tuple[Tensor, ...]]:
    """The tensors cut alike into one-dimensional views of ``size`` numbers, complex tensors viewed as pairs of reals.

    Where a tensor is not contiguous and so has no such view, it is copied, or without ``copy`` all are handed back
    whole.
    """
    if copy:
        tensors = [tensor.resolve_conj() for tensor in tensors]
    elif not all(tensor.is_contiguous() and not tensor.is_conj() for tensor in tensors):
        return [tuple(tensors)]
    flat = [(torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1) for tensor in tensors]
    if flat[0].numel() <= size:
        return [tuple(flat)]
    return list(zip(*(tensor.split(size) for tensor in flat), strict=True))


_Sharding: TypeAlias = "tuple[DeviceMesh, tuple[int, ...]] | None"


def local_parts(example: Tensor, tensors: list[Tensor | None], index: int) -> tuple[_Sharding, list[Tensor | None]]:
    """How one parameter is sharded, and what this rank holds of each of its tensors."""
    for tensor in tensors:
        if tensor is not None and tensor.shape != example.shape:
            raise ValueError(
                f"parameter {index}: expected tensors of one shape, {list(example.shape)}, found {list(tensor.shape)}; "
                "rows must list the same parameters in the same order"
            )
    DTensor = dtensor_type()
    if DTensor is None or not isinstance(example, DTensor):
        return None, tensors
    mesh, placements = example.device_mesh, example.placements
    local: list[Tensor | None] = []
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            if any(placement.is_partial() for placement in tensor.placements):
                raise RuntimeError(
                    f"parameter {index}: expected a reduced gradient, found a DTensor with placements {tensor.placements}; "
                    "redistribute it to Shard or Replicate before surgery"
                )
            if tensor.placements != placements:
                tensor = tensor.redistribute(mesh, placements)
            local.append(tensor.to_local())
        else:
            local.append(tensor)
    # Not is_shard(): tensor parallelism with FSDP2 gives strided shards, which torch does not count among the shards.
    return (mesh, tuple(d for d, placement in enumerate(placements) if not placement.is_replicate())), local


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    DTensor = dtensor_type()
    return tensor.to_local() if DTensor is not None and isinstance(tensor, DTensor) else tensor


def numbers_on(device: torch.device, values: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A few numbers of the host as a tensor on a device; the host does not wait for the device."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from pageable memory makes the host wait
    return tensor.to(device, non_blocking=True)


def dtensor_type() -> type[DTensor] | None:
    """The DTensor class, or None while nobody has imported it, so that no DTensor can exist; the import is slow."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def _first_device(rows: Sequence[Row], like: Sequence[Tensor] | None) -> torch.device:
    candidates = like if like is not None else [tensor for row in rows for tensor in row if tensor is not None]
    return local_tensor(candidates[0]).device if candidates else torch.device("cpu")


def check_rows(rows: Sequence[Row]) -> tuple[int, int]:
    """The number of rows and of parameters; ValueError if there is no row or they differ in length."""
    if not rows:
        raise ValueError("rows: expected at least one row, found none")
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise ValueError(f"rows: expected one entry per parameter in every row, found rows of {lengths} entries")
    return len(rows), lengths[0]
