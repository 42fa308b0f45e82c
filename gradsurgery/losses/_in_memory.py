"""What kernels in C++ have to know of tensors: whether they can read them, and where they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gradsurgery.losses._checks import IGNORED, check_tokens
from gradsurgery.native import PLAIN


def known(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at here and now: on the CPU, and no trace."""
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return tensor.is_cpu and type(tensor) in PLAIN and not traced


def check_known_tokens(labels: Tensor, vocabulary: int) -> None:
    """Refuse labels that are neither -100 nor a token, where they can be looked at; elsewhere PyTorch does."""
    if known(labels):
        check_tokens(labels.masked_fill(labels == IGNORED, 0), vocabulary)


def rows_of(rows: Tensor) -> tuple[int, int, int]:
    """Where rows are, how many bytes they are apart, and whether they are of bfloat16."""
    return rows.data_ptr(), rows.stride(0) * rows.element_size(), int(rows.dtype is torch.bfloat16)


def address_of(tensor: Tensor | None) -> int:
    """Where a tensor is; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def readable(tensor: Tensor) -> Tensor:
    """As it is, unless a hook for saved tensors has given it other strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def taken(rows: Tensor) -> bool:
    """Whether a kernel can read these rows ``[n, V]``."""
    return (
        known(rows)
        and (rows.dtype is torch.float32 or rows.dtype is torch.bfloat16)
        and rows.layout is torch.strided
        and rows.stride(1) == 1
        and not rows.is_neg()
    )
