"""The memory-bandwidth limit of a surgery pass, and how others are compared with it in one process.

The limit of Gram matrix and combination of two rows is one read of both, and one pass that reads both and overwrites the
first. Both are measured on flat buffers of the same number of bytes, by code that does nothing else: a C++ loop that adds
up what it reads, and `torch.Tensor.add_`, which is as fast as the memory on a CPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

# glibc gives every temporary above 32 MiB back to the system, and page faults then dominate whatever is measured. GPUs and serious CPU
# set-ups keep their heap.
HEAP_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

_READ = """
#include <string.h>
typedef float V __attribute__((vector_size(64)));
extern "C" float read_two(const float* a, const float* b, long n) {
    V sums[4] = {};
    for (long i = 0; i + 64 <= n; i += 64)
        for (int u = 0; u < 4; u++) {
            V x, y;
            memcpy(&x, a + i + 16 * u, sizeof x);
            memcpy(&y, b + i + 16 * u, sizeof y);
            sums[u] += x + y;
        }
    float total = 0;
    for (int u = 0; u < 4; u++) for (int i = 0; i < 16; i++) total += sums[u][i];
    return total;
}
"""

FULL = "float32 list"
ROUNDS = "median of the rounds' ratios (quartiles; ratio of the best rounds)"
"""What `ratio` says, for a reader of a table."""

LISTS: dict[str, tuple[torch.dtype, bool]] = {
    FULL: (torch.float32, False),
    "bf16 list": (torch.bfloat16, False),
    "LoRA list": (torch.float32, True),
    "LoRA list, bf16": (torch.bfloat16, True),
}
"""The type of a list of gradients, and whether it is of adapters."""


def keep_heap() -> None:
    """Start this process again with a heap that is kept: glibc reads its settings when a process starts."""
    if any(os.environ.get(name) != value for name, value in HEAP_KEPT.items()):
        os.environ.update(HEAP_KEPT)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # "-m module" too


def shapes(adapters: bool, small: bool = False) -> list[tuple[int, ...]]:
    """A Llama of 58M parameters (75 tensors), or the 224 tensors of a LoRA of rank 16 for Llama-3.2-1B (11M)."""
    if adapters:
        ends = [(2048, 2048), (2048, 512), (2048, 512), (2048, 2048), (2048, 8192), (2048, 8192), (8192, 2048)]
        return [shape for _ in range(16) for i, o in ends for shape in ((16, i), (o, 16))]
    width, layer = 512, [(512, 512)] * 4 + [(1792, 512)] * 2 + [(512, 1792), (512,), (512,)]
    return [(8000 if small else 54000, width), *(layer * (2 if small else 8)), (width,), (4096, 16)]


def rows_of(name: str, number: int = 2, small: bool = False) -> list[list[Tensor | None]]:
    """The rows of a list of `LISTS`."""
    dtype, adapters = LISTS[name]
    return [list(row) for row in filled(shapes(adapters, small), number, dtype)]


def filled(sizes: Sequence[tuple[int, ...]], number: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Rows whose numbers have a mean, so that inner products do not vanish: negative with the first, where rows are long."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(shape, generator=generator).add_(0.3 * k - 0.2).to(dtype) for shape in sizes]
        for k in range(number)
    ]


def limit_of(rows: list[list[Tensor | None]]) -> Callable[[], object]:
    """A pass over as many bytes as two rows have, at the speed of the memory."""
    size = sum(t.numel() * t.element_size() for t in rows[0] if t is not None)
    return pass_over(torch.zeros(size // 4), torch.zeros(size // 4))


def pass_over(first: Tensor, second: Tensor) -> Callable[[], object]:
    """Two flat float32 buffers read, and read once more while the first is overwritten."""
    read = _reader()

    def once() -> None:
        read(first, second)
        first.add_(second, alpha=1e-9)

    return once


@functools.cache
def _reader() -> Callable[[Tensor, Tensor], object]:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("no C++ compiler: the limit of reading is torch.sum's")
        return lambda a, b: (a.sum(), b.sum())
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.cpp", Path(folder) / "read.so"
        source.write_text(_READ)
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-w"]
        subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
        read = ctypes.CDLL(str(library)).read_two
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long], ctypes.c_float
    return lambda a, b: read(a.data_ptr(), b.data_ptr(), a.numel())


def interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] | None = None
) -> dict[str, list[float]]:
    """Seconds of every function in every round; each round runs all of them, and the first is not counted.

    With one thread they are the process's CPU time, which neighbours on a shared machine change little; with more, or
    by another clock, what that says.
    """
    if clock is None:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratio(of: list[float], to: list[float]) -> str:
    """The median of the rounds' ratios with their quartiles, and the ratio of the best rounds."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return f"{median(ratios):.2f} ({low:.2f} to {high:.2f}; best {min(of) / min(to):.2f})"
