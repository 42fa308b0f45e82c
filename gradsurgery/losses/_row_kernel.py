"""What the kernels for rows of logits share: a function of a C++ library that is checked before it is used."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from gradsurgery.native import Library, Unavailable, build

_A_THREAD = 1 << 16
"""Logits that are worth a thread."""

K = TypeVar("K", bound="RowKernel")


class RowKernel(ABC):
    """A function of a structure and a number of threads.

    Attributes:
        FUNCTION: Its name in the library.
        WORK: The structure.
        about: What the library is, in words.

    Args:
        library: As `native.build` gives it.

    Raises:
        Unavailable: If it cannot be loaded or computes what is wrong.
    """

    FUNCTION: ClassVar[str]
    WORK: ClassVar[type[ctypes.Structure]]

    def __init__(self, library: Library) -> None:
        self._function = library.function(self.FUNCTION, ctypes.POINTER(self.WORK), ctypes.c_int64)
        self.about = library.about
        with torch.device("cpu"):  # not on the default device, which may be another
            self.check()

    @abstractmethod
    def check(self) -> None:
        """Compare with plain PyTorch in float64, so that a compiler's fault shows at once."""

    def run(self, work: ctypes.Structure, logits: Tensor) -> None:
        """Do the work on these logits, in as many threads as they are worth."""
        self._function(work, min(torch.get_num_threads(), -(-logits.numel() // _A_THREAD)))


def built_or_why(source: Path, kind: type[K]) -> K | str:
    """A kernel, or why there is none, in words."""
    try:
        return build(source, kind)
    except Unavailable as error:
        return str(error)
