"""The Gram matrix of rows, by blocks of parameters and over the ranks that hold their shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.gram.choice import kernel_for
from gradsurgery.gram.eager import products
from gradsurgery.gram.rows import (
    Metric,
    Row,
    Sharding,
    Write,
    check_blocks,
    check_rows,
    check_writes,
    first_device,
    local_parts,
    local_tensor,
    numbers_on,
)


def gram(rows: Sequence[Row]) -> Tensor:
    r"""Gram matrix of K rows, $G_{ij} = \langle \mathrm{row}_i, \mathrm{row}_j \rangle$.

    Products are taken in float32, chunk by chunk (in float64 for float64 rows, and on a CPU for bf16 and fp16 rows,
    unless the compiled kernel takes them, whose float32 sums are of 64 products; see `gradsurgery.gram.backend`). The
    sums of the chunks are added in float64. A ``None`` in a row is a zero gradient. Of DTensors each rank
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
    writes: Sequence[Write] = (),
) -> Tensor:
    """Gram matrices of S blocks of parameters, ``G[s, i, j] = sum over block s of row_i * weight * row_j``.

    Args:
        rows: K rows over the same P parameters.
        blocks: The block of each parameter, P numbers from 0 to ``num_blocks - 1``; all in block 0 when None.
        num_blocks: S.
        metric: Weights of the inner product (see `Metric`); Euclidean when None.
        like: The P parameters. With them a rank knows which ``all_reduce`` it takes part in even where its own gradient
            is None.
        writes: Overwrites of rows' tensors, done in the same pass before these are multiplied.

    Returns:
        Float64 ``[S, K, K]``.

    Raises:
        ValueError: As `gram`, or if a block or what is to be overwritten is not there, or has another number of
            elements than what overwrites it. Nothing is done then.
        RuntimeError: As `gram`.
    """
    num_rows, num_parameters = check_rows(rows)
    check_blocks(blocks, num_parameters, num_blocks)
    check_writes(writes, rows)
    # Insertion order is parameter order, the same on every rank, so the collectives of different shardings cannot
    # cross.
    found: dict[Sharding, list[tuple[int, list[Tensor | None]]]] = {}
    for index, tensors in enumerate(map(list, zip(*rows, strict=True))):
        placed = tensors[0]
        if placed is None:
            placed = next((tensor for tensor in tensors if tensor is not None), None)
        example = placed if like is None else like[index]
        if example is None:
            continue
        sharding, local = local_parts(example, tensors, index)
        members = found.setdefault(sharding, [])
        if placed is not None:
            members.append((index, local))
    device = first_device(rows, like)
    by_kernel = kernel_for(found.values(), blocks, writes, device=device) if metric is None else None
    if writes:
        for number, members in enumerate(found.values()):
            # The kernel takes no tensors of different sizes.
            _check_sizes(members if by_kernel is None else by_kernel[1][number].left, writes)
    total = torch.zeros(num_blocks * num_rows * num_rows, dtype=torch.float64, device=device)
    for number, (sharding, members) in enumerate(found.items()):
        part = torch.zeros_like(total)
        if by_kernel is not None:
            kernel, batches = by_kernel
            if kernel.add_products(batches[number], part.view(num_blocks, num_rows, num_rows)):
                members = batches[number].left
        _add_products(members, blocks, metric, part.view(num_blocks, num_rows, num_rows), writes)
        if sharding is not None:
            mesh, dimensions = sharding
            for dimension in dimensions:
                torch.distributed.all_reduce(part, group=mesh.get_group(dimension))
        total += part
    return total.view(num_blocks, num_rows, num_rows)


def _check_sizes(members: list[tuple[int, list[Tensor | None]]], writes: Sequence[Write]) -> None:
    for index, local in members:
        for write in writes:
            target, other = local[write.row], write.others.get(index)
            if target is not None and other is not None and target.numel() != other.numel():
                raise ValueError(
                    f"parameter {index}: expected {target.numel()} numbers to overwrite row {write.row} by, "
                    f"found {other.numel()}"
                )


def _add_products(
    members: list[tuple[int, list[Tensor | None]]],
    blocks: Sequence[int] | None,
    metric: Metric | None,
    part: Tensor,
    writes: Sequence[Write],
) -> None:
    """Add the products of some parameters' local tensors to ``part``, ``[S, K, K]``."""
    num_rows = part.shape[-1]
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for index, local in members:
        weights = None if metric is None else metric(index)
        if weights is not None:
            weights = (local_tensor(weights[0]), weights[1])
        block = 0 if blocks is None else blocks[index]
        to_do = [(write, write.others.pop(index)) for write in writes if index in write.others]
        for i, j, product in products(local, weights, to_do):
            entry = (block * num_rows + i) * num_rows + j
            by_device.setdefault(product.device, []).append((entry, product))
            if i != j:
                by_device[product.device].append((entry + (j - i) * (num_rows - 1), product))
    for found in by_device.values():
        values = torch.stack([product for _, product in found]).to(part.device)
        part.view(-1).index_add_(0, numbers_on(part.device, [entry for entry, _ in found]), values)
