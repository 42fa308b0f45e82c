"""The compiled kernel: kernel.cpp, built once by the machine's C++ compiler, kept in a cache, called by address.

It knows neither Python nor PyTorch, so that it builds in half a second, serves every version of both, and takes a whole
list of tensors in one call.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
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
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradsurgery.gram.rows import Write

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
_TYPES = (Tensor, Parameter)  # not a subclass, which may hold its numbers elsewhere


class Unavailable(Exception):
    """Why there is no kernel, in words."""


class Kernel:
    """The two functions of a library, over lists of tensors.

    Args:
        library: Path of the built library.
        about: What it is, in words.
        number: The same for the same machine code on every rank, and not 0.

    Attributes:
        about: As given.
        number: As given.

    Raises:
        Unavailable: If it cannot be loaded or computes what is wrong.
    """

    def __init__(self, library: Path, about: str, number: int) -> None:
        try:
            loaded = ctypes.CDLL(str(library))
            self._products, self._combine = loaded.gradsurgery_products, loaded.gradsurgery_combine
        except (OSError, AttributeError) as error:
            raise Unavailable(f"the built library cannot be loaded ({error})") from error
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._products.argtypes = self._combine.argtypes = [
            *(integer, integer, pointer, pointer, pointer, pointer, integer),
            *(integer, pointer, pointer),
        ]
        self.about, self.number = about, number
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
        for write in batch.writes:
            for index, local in batch.taken:
                if write.others.pop(index, None) is not None:
                    overwritten(local[write.row])
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
                    and type(tensor) in _TYPES
                    and tensor.layout is torch.strided
                    and tensor.is_contiguous()
                    and not tensor.is_neg()
                    and number == size  # global shapes are the same, but what this process holds of them need not be
                ):
                    addresses.append(tensor.data_ptr() | (dtype is torch.bfloat16))  # the mark that kernel.cpp reads
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
        written = array("q", (write.row for write in self.writes))
        weights = array("d", (math.nan if write.weight is None else write.weight for write in self.writes))
        return function(
            *(rows, len(self._sizes), *tables, numbers.data_ptr(), torch.get_num_threads()),
            *(len(written), written.buffer_info()[0], weights.buffer_info()[0]),
        )


def overwritten(tensor: Tensor | None) -> None:
    """Let autograd know, as an operation of PyTorch's own would."""
    if tensor is not None and not tensor.is_inference():
        torch.autograd.graph.increment_version([tensor])


def build() -> Kernel:
    """The kernel from the cache, or built anew where there is none or a broken one.

    The cache is `$XDG_CACHE_HOME/gradsurgery/kernel`, or in `~/.cache`; where that cannot be written to, the kernel is
    built for this process alone.

    Raises:
        Unavailable: If there is no compiler, no place to build in or no source, or the compiler fails, or what it built
            does.
    """
    compiler = _compiler()
    capability = torch.backends.cpu.get_cpu_capability()
    command = [*compiler, *_FLAGS, *_PROCESSOR_FLAGS.get(capability, ())]
    # A compiler of another version, at the same path, makes other machine code.
    version = next(iter(_run([*compiler, "--version"]).strip().splitlines()), "")
    about = f"built by {' '.join(compiler)} ({version}) for {platform.machine()} {capability}"
    try:
        key = repr((command, version, sys.platform, platform.machine())).encode() + _SOURCE.read_bytes()
        return _kept(command, about, hashlib.sha256(key).hexdigest())
    except OSError as error:
        raise Unavailable(f"it cannot be built ({error})") from error


def _kept(command: list[str], about: str, key: str) -> Kernel:
    number = int(key[:8], 16) | 1
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gradsurgery" / "kernel"
    library = folder / f"{key[:24]}.so"
    try:
        if library.exists():
            try:
                return Kernel(library, about, number)
            except Unavailable:
                pass  # of another libc, say, in a home that machines share
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            built = _compiled(command, Path(building))
            kernel = Kernel(built, about, number)
            os.replace(built, library)  # whole or not at all: other processes build it at the same time
        return kernel
    except OSError:
        with tempfile.TemporaryDirectory() as building:
            return Kernel(_compiled(command, Path(building)), about, number)


def _compiler() -> list[str]:
    wanted = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(wanted)
    except ValueError as error:
        raise Unavailable(f"CXX is not a command, {wanted!r} ({error})") from error
    names = [chosen[0]] if chosen else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise Unavailable(f"no C++ compiler was found ({', '.join(names)}); install one, or set CXX")
    return [found, *chosen[1:]]


def _compiled(command: list[str], folder: Path) -> Path:
    library = folder / "kernel.so"
    _run([*command, "-o", str(library), str(_SOURCE)])
    return library


def _run(command: list[str]) -> str:
    """What the compiler says."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=120).stdout
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines() or ["it says nothing"]
        raise Unavailable(f"{command[0]} failed: {said[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from error


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
