"""Rows as this process holds them: their type, their local parts, and the checks that they belong together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

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


class Write(NamedTuple):
    """An overwrite of one row's tensors x in the pass that multiplies them, so that memory is read once for both.

    Attributes:
        row: The row's number.
        others: By parameter index, a tensor y like the row's on this process. An entry is removed when it is done.
        weight: x becomes ``x.lerp_(y, weight)``; y - x where it is None.
        stored: Whether x is overwritten. If not, the same numbers are multiplied, and x stays as it was.
    """

    row: int
    others: dict[int, Tensor]
    weight: float | None
    stored: bool = True

    def do(self, tensor: Tensor, other: Tensor) -> Tensor:
        """What becomes of a tensor, or of a part of it: the tensor itself, overwritten, or another one."""
        if self.weight is None:
            return torch.sub(other, tensor, out=tensor) if self.stored else (other - tensor).to(tensor.dtype)
        return tensor.lerp_(other, self.weight) if self.stored else tensor.lerp(other, self.weight)

    def finish(self, row: Row) -> None:
        """Do what no pass has done."""
        for index in list(self.others):
            tensor = row[index]
            assert tensor is not None
            self.do(local_tensor(tensor), self.others[index])
            del self.others[index]


Sharding: TypeAlias = "tuple[DeviceMesh, tuple[int, ...]] | None"
"""The mesh of a DTensor and the dimensions that it is sharded over; None for a plain tensor."""


def local_parts(example: Tensor, tensors: list[Tensor | None], index: int) -> tuple[Sharding, list[Tensor | None]]:
    """How one parameter is sharded, and what this rank holds of each of its tensors."""
    shape = example.shape
    for tensor in tensors:
        if tensor is not None and tensor is not example and tensor.shape != shape:
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
    # as_tensor would bring a tensor to the default device, which may be another.
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from pageable memory makes the host wait
    return tensor.to(device, dtype, non_blocking=True)


def dtensor_type() -> type[DTensor] | None:
    """The DTensor class, or None while nobody has imported it, so that no DTensor can exist; the import is slow."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def first_device(rows: Sequence[Row], like: Sequence[Tensor] | None) -> torch.device:
    """The device that the rows' products are added up on."""
    candidates = like if like is not None else [tensor for row in rows for tensor in row if tensor is not None]
    return local_tensor(candidates[0]).device if candidates else torch.device("cpu")


def check_blocks(blocks: Sequence[int] | None, num_parameters: int, num_blocks: int) -> None:
    """ValueError unless every parameter has a block, and that is one of ``num_blocks``."""
    if blocks is not None and len(blocks) != num_parameters:
        raise ValueError(f"blocks: expected one for each of {num_parameters} parameters, found {len(blocks)}")
    if num_parameters:
        lowest, highest = (0, 0) if blocks is None else (min(blocks), max(blocks))
        if not 0 <= lowest <= highest < num_blocks:
            raise ValueError(f"blocks: expected numbers from 0 to {num_blocks - 1}, found {lowest} to {highest}")


def check_writes(writes: Sequence[Write], rows: Sequence[Row]) -> None:
    """ValueError unless every write has a tensor to overwrite."""
    for write in writes:
        if not 0 <= write.row < len(rows):
            raise ValueError(f"writes: expected a row from 0 to {len(rows) - 1}, found {write.row}")
        row = rows[write.row]
        missing = [index for index in write.others if not 0 <= index < len(row) or row[index] is None]
        if missing:
            raise ValueError(
                f"writes: expected tensors to overwrite in row {write.row}, found none of parameters {missing}"
            )


def check_rows(rows: Sequence[Row]) -> tuple[int, int]:
    """The number of rows and of parameters; ValueError if there is no row or they differ in length."""
    if not rows:
        raise ValueError("rows: expected at least one row, found none")
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise ValueError(f"rows: expected one entry per parameter in every row, found rows of {lengths} entries")
    return len(rows), lengths[0]
