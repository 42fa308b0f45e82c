"""Products and combinations by Triton kernels: rows on CUDA devices, read at their addresses in few launches."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.gram.kernel import Members, Unavailable, note_writes, overwritten
from gradsurgery.gram.pointers import PointerBatch
from gradsurgery.gram.rows import Write, numbers_on
from gradsurgery.native import tried, triton_kernels

RULES = ("sum", "gru", "pcgrad")
"""Rules of two rows that the kernel which sums the products can apply itself."""


class DeviceKernel:
    """The Triton kernels, over lists of tensors.

    Attributes:
        about: What runs, in words.
        number: The same for the same kernels on every rank, and not 0.
        device: The type of device whose tensors are read: "cuda", or "cpu" in Triton's interpreter.

    Raises:
        Unavailable: If Triton or a device is not there, or they compute what is wrong.
    """

    def __init__(self) -> None:
        self._kernels, self.about, self.device = triton_kernels("gradsurgery.gram._triton")
        capability = torch.cuda.get_device_capability() if self.device == "cuda" else None
        self.number = int(hashlib.sha256(repr((self.about, capability)).encode()).hexdigest()[:8], 16) | 1
        tried(lambda: _right(self))

    def batch(self, members: Members, blocks: Sequence[int] | None, writes: Sequence[Write] = ()) -> PointerBatch:
        """What the kernels take of these members.

        Raises:
            RuntimeError: As `PointerBatch`.
        """
        return PointerBatch(members, blocks, writes, self.device)

    def add_products(self, batch: PointerBatch, total: Tensor) -> bool:
        """Do the batch's writes, and add its products to ``total``, ``[S, K, K]`` float64.

        Returns:
            True: it was done.

        Cost: reads each tensor once; two launches for each group.
        """
        num_blocks, number = total.shape[:2]
        writes = tuple((write.row, _rounded(write.weight), write.stored) for write in batch.writes)
        for group in batch.groups.values():
            table = group.table(num_blocks, self._kernels.CHUNK)
            mine = total if group.device == total.device else torch.zeros_like(total, device=group.device)
            partial = self._kernels.products(
                table.addresses, table.sizes, table.chunks, (number, group.dtypes, group.aligned), writes
            )
            self._kernels.sums(partial, table.begins, mine, None, "", True)
            if mine is not total:
                total += mine.to(total.device)
        note_writes(batch.writes, batch.taken)
        return True

    def combine(self, batch: PointerBatch, coefficients: Tensor, *, skip: bool = False) -> None:
        """Overwrite the batch's first tensors by the combinations.

        Args:
            batch: Without missing first tensors.
            coefficients: ``[S, K]`` float64.
            skip: Whether nothing is read where the coefficients are (1, 0, ..., 0).

        Cost: reads each tensor once and writes the first; one launch for each group. The host reads nothing.
        """
        for group in batch.groups.values():
            table = group.table(len(coefficients), self._kernels.CHUNK)
            numbers = numbers_on(group.device, coefficients).contiguous()
            self._kernels.combine(
                table.addresses,
                table.sizes,
                table.chunks,
                table.blocks,
                numbers,
                (numbers.shape[1], group.dtypes, group.aligned, skip),
            )
        for _, local in batch.taken:
            overwritten(local[0])

    def update(self, batch: PointerBatch, rule: str, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Gram matrices ``[S, 2, 2]``, coefficients ``[S, 2]``, and the combination written: three launches.

        Args:
            batch: Two rows, one group, and no missing first tensors.
            rule: One of `RULES`.
            num_blocks: S.
        """
        (group,) = batch.groups.values()
        table = group.table(num_blocks, self._kernels.CHUNK)
        gram = torch.empty(num_blocks, 2, 2, dtype=torch.float64, device=group.device)
        coefficients = torch.empty(num_blocks, 2, dtype=torch.float64, device=group.device)
        rows = (2, group.dtypes, group.aligned)
        partial = self._kernels.products(table.addresses, table.sizes, table.chunks, rows, ())
        self._kernels.sums(partial, table.begins, gram, coefficients, rule, False)
        # Rows with an inf have no finite coefficients, so that a row with the coefficient 0 need not be read.
        self._kernels.combine(table.addresses, table.sizes, table.chunks, table.blocks, coefficients, (*rows, True))
        for _, local in batch.taken:
            overwritten(local[0])
        return gram, coefficients


def _rounded(weight: float | None) -> float | None:
    """As `torch.Tensor.lerp_` takes it: 1 minus it would be another float32 number otherwise."""
    return None if weight is None else float(torch.tensor(weight, dtype=torch.float32, device="cpu"))


def _right(kernel: DeviceKernel) -> bool:
    """Compare with whole numbers, whose products and sums are exact, so that a compiler's fault shows at once."""
    numbers = torch.arange(3001, dtype=torch.float32, device=kernel.device)
    forget, retain = numbers % 7 - 3, (numbers % 5 - 2).bfloat16()
    total = torch.zeros(1, 2, 2, dtype=torch.float64, device=kernel.device)
    wide = torch.stack([forget, retain.float()]).double()
    expected = forget * 2 - retain.float() * 3
    batch = kernel.batch([(0, [forget, retain])], None)
    kernel.add_products(batch, total)
    kernel.combine(batch, torch.tensor([[2.0, -3.0]], dtype=torch.float64, device=kernel.device))
    return torch.equal(total[0], wide @ wide.mT) and torch.equal(forget, expected)


@functools.cache
def device_kernel() -> DeviceKernel | str:
    """This process's kernels, or why it has none, in words."""
    try:
        return DeviceKernel()
    except Unavailable as error:
        return str(error)
