"""The exact quantile of the sizes in a row, without sorting or copying it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradsurgery.gram import Row, chunk_size, chunks


@torch.no_grad()
def order_statistic(row: Row, quantile: float) -> float:
    """The element of rank floor(quantile n), counted from 0, among the n sizes $|x|$ of a row; 0 if n is 0.

    The bits of non-negative floats, read as integers, are ordered as the floats are. So the answer is built from its
    leading bits: each pass counts the sizes that share the bits known so far by their next 11 bits, and the histogram
    says which 11 bits the wanted size has. Three passes for float32, six for float64.
    """
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in row)
    floats, integers, top = (torch.float64, torch.int64, 55) if double else (torch.float32, torch.int32, 22)

    def sizes() -> Iterator[Tensor]:
        for tensor in row:
            for (part,) in [] if tensor is None else chunks([tensor], chunk_size(tensor.device)):
                yield part.to(floats).abs().view(integers).reshape(-1)

    prefix, rank = 0, None  # the answer's bits known so far, and its rank among the sizes that share them
    for low in range(top, -1, -11):
        counts = torch.zeros(2048, dtype=torch.int64, device="cpu")
        for bits in sizes():
            alike = bits if rank is None else bits[bits >> (low + 11) == prefix]
            counts += torch.bincount((alike >> low & 2047).long(), minlength=2048).cpu()
        below = counts.cumsum(0)
        if rank is None:
            total = int(below[-1])
            if total == 0:
                return 0.0
            rank = min(int(quantile * total), total - 1)
        digit = int(torch.searchsorted(below, rank, right=True))
        rank -= int(below[digit - 1]) if digit else 0
        prefix = prefix << 11 | digit
    return float(torch.tensor(prefix, dtype=integers, device="cpu").view(floats))
