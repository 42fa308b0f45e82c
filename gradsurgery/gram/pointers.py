"""Tables of addresses for the Triton kernels: which tensors they can read, and where, as numbers on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gradsurgery.gram.kernel import Members
from gradsurgery.gram.rows import Write, numbers_on
from gradsurgery.native import PLAIN

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_ROWS = 8  # the sums of all their pairs are held in registers
_MOST_TABLES = 64


class Table(NamedTuple):
    """What the kernels read of one group, on its device.

    Attributes:
        addresses: Int64 ``[M, columns]``, 0 where there is no tensor.
        sizes: Int64 ``[M]``.
        chunks: The parameter of each chunk and its number there, int32 ``[C, 2]``, block after block.
        blocks: The block of each parameter, int32 ``[M]``.
        begins: Where each block's chunks begin, and where the last ends, int32 ``[S + 1]``.
    """

    addresses: Tensor
    sizes: Tensor
    chunks: Tensor
    blocks: Tensor
    begins: Tensor


@dataclass
class Group:
    """Parameters whose tensors are on one device and row by row of one type: those that one launch takes.

    Attributes:
        device: Of all its tensors.
        dtypes: Of each column of its table.
        addresses: Line by line.
        sizes: Of each parameter.
        blocks: Of each parameter.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    addresses: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)

    @property
    def aligned(self) -> bool:
        """Whether every address is a multiple of 16, so that 16 bytes can be loaded at once."""
        return not any(address % 16 for address in self.addresses)

    def table(self, num_blocks: int, chunk: int) -> Table:
        """Its tables, uploaded where the device does not hold them yet; the host does not wait.

        Raises:
            RuntimeError: If a CUDA graph is being captured, and the device does not hold them.
        """
        columns, addresses = len(self.dtypes), self.addresses
        (lines,) = _kept(
            self.device, (columns, *addresses), lambda: [torch.tensor(addresses, dtype=torch.int64).view(-1, columns)]
        )
        layout = _kept(
            self.device,
            (num_blocks, chunk, *self.sizes, *self.blocks),
            lambda: _layout(self.sizes, self.blocks, num_blocks, chunk),
        )
        return Table(lines, *layout)


class PointerBatch:
    """The members that the Triton kernels can read at their addresses, in groups, and those left over.

    Args:
        members: Parameters' indices with their tensors, K or None each, and one at least.
        blocks: The block of each parameter; all in block 0 when None.
        writes: Overwrites that belong to the pass.
        device: The type of device that the kernels read: "cuda", or "cpu" in Triton's interpreter.

    Attributes:
        writes: As given.
        taken: Members in the groups.
        groups: By device and types.
        left: Members of other types, devices or layouts, or of tensors of different sizes, and all where there are too
            many rows.
        numbers: How many each row of the groups has.

    Raises:
        RuntimeError: If a tensor is on the CPU, and the kernels cannot read it there.
    """

    def __init__(
        self, members: Members, blocks: Sequence[int] | None, writes: Sequence[Write] = (), device: str = "cuda"
    ) -> None:
        self.writes = writes
        self.taken: Members = []
        self.left: Members = []
        self.groups: dict[tuple[torch.device, tuple[torch.dtype, ...]], Group] = {}
        self.numbers = 0
        for member in members:
            index, local = member
            tensors = [*local, *(write.others.get(index) for write in writes)] if writes else local
            present = [tensor for tensor in tensors if tensor is not None]
            if device != "cpu" and any(tensor.is_cpu for tensor in present):
                raise RuntimeError(
                    f"gradsurgery.gram.backend: expected rows on a CUDA device with 'triton', found a tensor of parameter {index} on the "
                    "CPU; choose 'auto', or move the model to the device"
                )
            first = present[0]
            if (
                len(local) > _MOST_ROWS
                or first.device.type != device
                or any(not _readable(tensor, first) for tensor in present)
            ):
                self.left.append(member)
                continue
            # A tensor that is not there is as good as one of the first one's type: its address is never read.
            dtypes = tuple(first.dtype if tensor is None else tensor.dtype for tensor in tensors)
            group = self.groups.setdefault((first.device, dtypes), Group(first.device, dtypes))
            group.addresses.extend(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
            group.sizes.append(first.numel())
            group.blocks.append(0 if blocks is None else blocks[index])
            self.numbers += first.numel()
            self.taken.append(member)


def _readable(tensor: Tensor, first: Tensor) -> bool:
    return (
        tensor.dtype in _DTYPES
        and type(tensor) in PLAIN
        and tensor.device == first.device
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.numel() == first.numel()  # global shapes are the same, but not what this process holds of them
    )


_Key = tuple[torch.device, int, tuple[int, ...]]
_tables: OrderedDict[_Key, tuple[Tensor, ...]] = OrderedDict()
# A graph reads its tables whenever it is replayed, for as long as the process lives. Tables are never overwritten.
_captured: dict[_Key, tuple[Tensor, ...]] = {}


def _kept(device: torch.device, numbers: tuple[int, ...], make: Callable[[], list[Tensor]]) -> tuple[Tensor, ...]:
    """What ``make`` makes of these numbers, on the device, where it stays: gradients often keep their addresses.

    A stream has tables of its own, because another could read them before they are there, or after they were freed.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Whoever begins a capture waits for all streams, so that the tables of others are there.
        for key, tables in _tables.items():
            if (key[0], key[2]) == (device, numbers):
                _captured[key] = tables
                return tables
        raise RuntimeError(
            "gradsurgery.gram.backend: expected that what a CUDA graph captures with 'triton' has run before on the same tensors, found "
            "tensors at other addresses; keep the gradients (zero_grad(set_to_none=False)), run it once, and capture it then"
        )
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0, numbers)
    if key not in _tables:
        with torch.device("cpu"):  # not on the default device, which may be another
            made = make()
        _tables[key] = tuple(numbers_on(device, table) for table in made)
        if len(_tables) > _MOST_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key]


def _layout(sizes: list[int], blocks: list[int], num_blocks: int, chunk: int) -> list[Tensor]:
    """All of a `Table` but the addresses."""
    size, block = torch.tensor(sizes), torch.tensor(blocks)
    counts = (size + chunk - 1) // chunk
    order = block.argsort(stable=True)
    members = order.repeat_interleave(counts[order])
    first = (counts[order].cumsum(0) - counts[order]).repeat_interleave(counts[order])
    begins = torch.zeros(num_blocks + 1, dtype=torch.int64)
    begins[1:] = torch.zeros(num_blocks, dtype=torch.int64).index_add_(0, block, counts).cumsum(0)
    return [size, torch.stack([members, torch.arange(len(members)) - first], 1).int(), block.int(), begins.int()]
