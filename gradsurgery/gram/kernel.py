"""The compiled kernel: kernel.cpp, built by `native`, called by address.

It knows neither Python nor PyTorch, so that it builds in half a second, serves every version of both, and takes a whole
list of tensors in one call.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsurgery import native
from gradsurgery.gram.rows import Write
from gradsurgery.native import PLAIN, Library, Unavailable

Members = list[tuple[int, list[Tensor | None]]]
"""Parameters' indices, with what this process holds of each row's tensor."""

_SOURCE = Path(__file__).with_name("kernel.cpp")
_MOST_ROWS = 16  # as in kernel.cpp


class Kernel:
    """The two functions of a library, over lists of tensors.

    Args:
        library: As `native.build` gives it.

    Attributes:
        about: What it is, in words.
        number: The same for the same machine code on every rank, and not 0.

    Raises:
        Unavailable: If it cannot be loaded or computes what is wrong.
    """

    def __init__(self, library: Library) -> None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        arguments = (integer, integer, pointer, pointer, pointer, pointer, integer, integer, pointer, pointer)
        self._products = library.function("gradsurgery_products", *arguments, returns=ctypes.c_int32)
        self._combine = library.function("gradsurgery_combine", *arguments, returns=ctypes.c_int32)
        self.about, self.number = library.about, library.number
        with torch.device("cpu"):  # not on the default device, which may be another
            _check(self)

    def add_products(self, batch: Batch, total: Tensor) -> bool:
        """Do the batch's writes, and add its products to ``total``, ``[S, K, K]`` float64 on the CPU.

        Returns:
            Whether it was done; False, and nothing is done, where there is no memory to.

        Cost: reads each tensor once. The bits of the answer depend on no number of threads.
        """
        if batch.call(self._products, total.shape[-1], total):
            return False
        note_writes(batch.writes, batch.taken)
        return True

    def combine(self, batch: Batch, coefficients: Tensor) -> None:
        """Overwrite the batch's first tensors by the combinations.

        Args:
            batch: Without missing first tensors.
            coefficients: ``[S, K]`` float64 on the CPU.

        Cost: reads each tensor once and writes the first.
        """
        batch.call(self._combine, coefficients.shape[-1], coefficients.contiguous())
        for _, local in batch.taken:
            overwritten(local[0])


class Batch:
    """The members that the kernel can read at their addresses, as the tables that it wants, and those left over.

    Args:
        members: Parameters' indices with their tensors, K or None each, and one at least.
        blocks: The block of each parameter; all in block 0 when None.
        writes: Overwrites that belong to the pass.

    Attributes:
        writes: As given.
        taken: Members in the tables.
        left: Members of other types, devices or layouts, or of tensors of different sizes, and all where there are too
            many rows.
        numbers: How many each row of the tables has.
    """

    def __init__(self, members: Members, blocks: Sequence[int] | None, writes: Sequence[Write] = ()) -> None:
        self.writes = writes
        self.taken: Members = []
        self.left: Members = []
        self.numbers = 0
        self._addresses, self._sizes, self._blocks = array("q"), array("q"), array("q")
        # A list of adapters has hundreds of small tensors, for which this loop takes longer than their products.
        for member in members:
            index, local = member
            addresses: list[int] = []
            size = -1
            tensors = [*local, *(write.others.get(index) for write in writes)] if writes else local
            for tensor in tensors:
                if tensor is None:
                    addresses.append(0)
                    continue
                dtype, number = tensor.dtype, tensor.numel()
                if size < 0:
                    size = number
                if (
                    (dtype is torch.float32 or dtype is torch.bfloat16)
                    and tensor.is_cpu
                    and type(tensor) in PLAIN
                    and tensor.layout is torch.strided
                    and tensor.is_contiguous()
                    and not tensor.is_neg()
                    and number == size  # global shapes are the same, but what this process holds of them need not be
                ):
                    address = tensor.data_ptr()
                    if address & 1:  # as of a tensor in the midst of a mapped file
                        break
                    addresses.append(address | (dtype is torch.bfloat16))  # the mark that kernel.cpp reads
                else:
                    break
            if len(addresses) < len(tensors) or len(local) > _MOST_ROWS:
                self.left.append(member)
                continue
            self._addresses.extend(addresses)
            self._sizes.append(size)
            self._blocks.append(0 if blocks is None else blocks[index])
            self.numbers += size
            self.taken.append(member)

    def call(self, function: Any, rows: int, numbers: Tensor) -> int:
        """Call a function of the library."""
        tables = (table.buffer_info()[0] for table in (self._addresses, self._sizes, self._blocks))
        written = array("q", (write.row if write.stored else ~write.row for write in self.writes))
        weights = array("d", (math.nan if write.weight is None else write.weight for write in self.writes))
        return function(
            *(rows, len(self._sizes), *tables, numbers.data_ptr(), torch.get_num_threads()),
            *(len(written), written.buffer_info()[0], weights.buffer_info()[0]),
        )


def note_writes(writes: Sequence[Write], taken: Members) -> None:
    """Remove what was written from the writes, and let autograd know."""
    for write in writes:
        for index, local in taken:
            if write.others.pop(index, None) is not None and write.stored:
                overwritten(local[write.row])


def overwritten(tensor: Tensor | None) -> None:
    """Let autograd know, as an operation of PyTorch's own would."""
    if tensor is not None and not tensor.is_inference():
        torch.autograd.graph.increment_version([tensor])


def build() -> Kernel:
    """The kernel from the cache, or built anew where there is none or a broken one.

    Raises:
        Unavailable: As `native.build`.
    """
    return native.build(_SOURCE, Kernel)


def _check(kernel: Kernel) -> None:
    """Compare with whole numbers, whose products and sums are exact, so that a compiler's fault shows at once."""
    numbers = torch.arange(3001, dtype=torch.float32)
    forget, retain = numbers % 7 - 3, (numbers % 5 - 2).bfloat16()
    total = torch.zeros(1, 2, 2, dtype=torch.float64)
    batch = Batch([(0, [forget, retain])], None)
    kernel.add_products(batch, total)
    wide = torch.stack([forget, retain.float()]).double()
    expected = forget * 2 - retain.float() * 3
    kernel.combine(batch, torch.tensor([[2.0, -3.0]], dtype=torch.float64))
    if not (torch.equal(total[0], wide @ wide.mT) and torch.equal(forget, expected)):
        raise Unavailable("the built library computes wrong numbers")
