"""The compiled kernel: kernel.cpp, built once by the machine's C++ compiler, kept in a cache, called by address.

It knows neither Python nor PyTorch, so that it builds in half a second, serves every version of both, and takes a whole
list of tensors in one call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

Members = list[tuple[int, list[Tensor | None]]]
"""Parameters' indices, with what this process holds of each row's tensor."""

_SOURCE = Path(__file__).with_name("kernel.cpp")
_FLAGS = ("-std=c++14", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
# By what PyTorch found that the processor can do. A library built with -march=native could be loaded from a cache that
# machines share, by one that has not all its instructions.
_PROCESSOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
_MOST_ROWS = 16  # as in kernel.cpp
_BFLOAT = 1  # set in an address, which is even


class Unavailable(Exception):
    """Why there is no kernel, in words."""


class Kernel:
    """The two functions of a library, over lists of tensors.

    Args:
        library: Path of the built library.

    Attributes:
        about: What it is, in words.
        number: The same for the same machine code on every rank, and not 0.

    Raises:
        Unavailable: If it cannot be loaded or computes what is wrong.
    """

    def __init__(self, library: Path, about: str) -> None:
        try:
            loaded = ctypes.CDLL(str(library))
            self._products, self._combine = loaded.gradsurgery_products, loaded.gradsurgery_combine
        except (OSError, AttributeError) as error:
            raise Unavailable(f"the built library cannot be loaded ({error})") from error
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._products.argtypes = self._combine.argtypes = [number, number, *[pointer] * 4, number]
        self.about = about
        self.number = int(hashlib.sha256(about.encode() + _SOURCE.read_bytes()).hexdigest()[:8], 16) | 1
        _check(self)

    def add_products(self, members: Members, blocks: Sequence[int] | None, total: Tensor) -> Members:
        """Add the members' products to ``total``, ``[S, K, K]`` float64 on the CPU, and hand back those not taken.

        Cost: reads each tensor once. The bits of the answer depend on no number of threads.
        """
        if total.device.type != "cpu" or total.shape[-1] > _MOST_ROWS:
            return members
        table = _Table(members, blocks)
        failed = table.call(self._products, total.shape[-1], total)
        return members if failed else table.left

    def combine(self, members: Members, blocks: Sequence[int] | None, coefficients: Tensor) -> Members:
        """Overwrite the members' first tensors by the combinations, and hand back the members not taken.

        Args:
            members: Their first tensors are overwritten.
            blocks: The block of each parameter; all in block 0 when None.
            coefficients: ``[S, K]`` on the CPU.

        Cost: reads each tensor once and writes the first.
        """
        if coefficients.shape[-1] > _MOST_ROWS:
            return members
        table = _Table(members, blocks)
        table.call(self._combine, coefficients.shape[-1], coefficients.to(torch.float64).contiguous())
        torch.autograd.graph.increment_version(table.first)  # as an operation of PyTorch's own would
        return table.left


def takes(tensor: Tensor | None) -> bool:
    """Whether the kernel can read the tensor at its address; a missing one is no obstacle."""
    return tensor is None or (
        (tensor.dtype is torch.float32 or tensor.dtype is torch.bfloat16)
        and tensor.is_cpu
        and type(tensor) in (Tensor, Parameter)
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


class _Table:
    """Addresses, sizes and blocks of the members that the kernel takes."""

    def __init__(self, members: Members, blocks: Sequence[int] | None) -> None:
        self.left: Members = []
        self.first: list[Tensor] = []
        self._kept: list[list[Tensor | None]] = []
        self._addresses, self._sizes, self._blocks = array("q"), array("q"), array("q")
        for index, local in members:
            if not all(map(takes, local)):
                self.left.append((index, local))
                continue
            self._addresses.extend(
                0 if t is None else t.data_ptr() | (_BFLOAT if t.dtype is torch.bfloat16 else 0) for t in local
            )
            present = local[0] if local[0] is not None else next(t for t in local if t is not None)
            self._sizes.append(present.numel())
            self._blocks.append(0 if blocks is None else blocks[index])
            self.first.append(present)
            self._kept.append(local)

    def call(self, function: ctypes._NamedFuncPointer, rows: int, numbers: Tensor) -> int:
        tables = (table.buffer_info()[0] for table in (self._addresses, self._sizes, self._blocks))
        return function(rows, len(self._sizes), *tables, numbers.data_ptr(), torch.get_num_threads())


def build() -> Kernel:
    """The kernel from the cache, or built anew where there is none or a broken one.

    The cache is `$XDG_CACHE_HOME/gradsurgery/kernel`, or in `~/.cache`; where that cannot be written to, the kernel is
    built for this process alone.

    Raises:
        Unavailable: If there is no compiler, or it fails, or what it built does.
    """
    compiler = _compiler()
    capability = torch.backends.cpu.get_cpu_capability()
    command = [*compiler, *_FLAGS, *_PROCESSOR_FLAGS.get(capability, ())]
    about = f"built by {' '.join(compiler)} for {platform.machine()} {capability}"
    key = repr((command, sys.platform, platform.machine())).encode() + _SOURCE.read_bytes()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gradsurgery" / "kernel"
    library = folder / f"{hashlib.sha256(key).hexdigest()[:24]}.so"
    if library.exists():
        try:
            return Kernel(library, about)
        except Unavailable:
            pass  # of another libc, say, in a home that machines share
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            built = _compiled(command, Path(building))
            kernel = Kernel(built, about)
            os.replace(built, library)  # whole or not at all: other processes build it at the same time
        return kernel
    except OSError:
        with tempfile.TemporaryDirectory() as building:
            return Kernel(_compiled(command, Path(building)), about)


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = [chosen[0]] if chosen else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise Unavailable(f"no C++ compiler was found ({', '.join(names)}); install one, or set CXX")
    return [found, *chosen[1:]]


def _compiled(command: list[str], folder: Path) -> Path:
    library = folder / "kernel.so"
    try:
        subprocess.run(
            [*command, "-o", str(library), str(_SOURCE)], check=True, capture_output=True, text=True, timeout=120
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines() or ["it says nothing"]
        raise Unavailable(f"{command[0]} failed: {said[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from error
    return library


def _check(kernel: Kernel) -> None:
    """Compare with whole numbers, whose products and sums are exact, so that a compiler's fault shows at once."""
    numbers = torch.arange(3001, dtype=torch.float32)
    forget, retain = numbers % 7 - 3, (numbers % 5 - 2).bfloat16()
    total = torch.zeros(1, 2, 2, dtype=torch.float64)
    kernel.add_products([(0, [forget, retain])], None, total)
    wide = torch.stack([forget, retain.float()]).double()
    expected = forget * 2 - retain.float() * 3
    kernel.combine([(0, [forget, retain])], None, torch.tensor([[2.0, -3.0]]))
    if not (torch.equal(total[0], wide @ wide.mT) and torch.equal(forget, expected)):
        raise Unavailable("the built library computes wrong numbers")
