"""Triton's kernels of Gram matrices where there is no GPU: in Triton's interpreter, compiled, refused, and their tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradsurgery.gram import backend, choice, combine_, gram
from gradsurgery.gram.device import DeviceKernel, device_kernel
from gradsurgery.gram.kernel import Members
from gradsurgery.gram.pointers import PointerBatch

ROOT = Path(__file__).parents[2]
# The kernels' own launches, with a driver that knows a device but has none, and with launches that end when compiled.
COMPILED = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=0: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", int(sys.argv[1]), 32))

driver.set_active(Driver())
from gradsurgery.gram import _triton

class Launched:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *numbers, **options: print(
            self.kernel.__name__, "v4.b32" in self.kernel.run(*numbers, grid=grid, warmup=True, **options).asm["ptx"]
        )

for name in ("_products", "_sums", "_combine"):
    setattr(_triton, name, Launched(getattr(_triton, name)))
f32, bf16 = torch.float32, torch.bfloat16
table, sizes, chunks, numbers = torch.zeros(4, 4).long(), torch.zeros(4).long(), torch.zeros(8, 2).int(), torch.zeros(1, 2).double()
_triton.products(table, sizes, chunks, (2, (bf16, bf16), True), ())
_triton.products(table, sizes, chunks, (4, (bf16, bf16, f32, f32, f32, bf16), True), ((2, 0.2, True), (1, None, False)))
_triton.products(table, sizes, chunks, (2, (f32, f32), False), ())
for rule in ("", *"sum gru pcgrad".split()):
    _triton.sums(torch.zeros(3, 4), sizes.int(), torch.zeros(1, 2, 2).double(), numbers if rule else None, rule, not rule)
_triton.combine(table, sizes, chunks, sizes.int(), numbers, (2, (bf16, bf16), True, True))
"""
needs_no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device would run the kernels")


def run(*arguments: str, **variables: str) -> str:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True, text=True, env=kept | {"PYTHONPATH": path} | variables, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.timeout(900)  # ten seconds where nothing else runs
def test_in_tritons_interpreter() -> None:
    file = str(Path(__file__).with_name("gram_triton.py"))
    said = run("-m", "pytest", "-n", "0", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    assert "[100%]" in said
    assert "skipped" not in said


def test_the_kernels_compile_and_load_16_bytes_at_once_where_they_may(tmp_path: Path) -> None:
    """With the compiler that comes with Triton, for an H100 or H200."""
    said = run("-c", COMPILED, "90", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0").split("\n")
    products, aligned = ["_products True"] * 2, ["_products False"]  # 4 bytes a lane where an address is odd
    assert said[:3] == products + aligned
    assert [line.split()[0] for line in said[3:7]] == ["_sums"] * 4
    assert said[7] == "_combine True"


@needs_no_device
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter would run the kernels")
def test_without_a_device_the_choice_is_refused_in_one_sentence_and_nothing_changes() -> None:
    device_kernel.cache_clear()
    with backend("eager"):
        with pytest.raises(
            RuntimeError, match=r"backend: expected Triton's kernels to run, found that there is no CUDA device"
        ) as found:
            backend("triton")
        assert "\n" not in str(found.value)
        assert backend().name == "eager"


def test_tensors_on_the_cpu_are_refused_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = object.__new__(DeviceKernel)  # as on a machine with a GPU
    kernel.device, kernel.about, kernel.number = "cuda", "Triton", 7
    monkeypatch.setattr(choice, "device_kernel", lambda: kernel)
    rows = [[torch.ones(3), None], [torch.ones(3), torch.ones(2)]]
    with backend("triton") as chosen:
        assert repr(chosen) == "triton: for float32, bfloat16 and float16 rows on CUDA devices, by Triton"
        assert choice.kernel_number([]) == 7
        for function in (lambda: gram(rows), lambda: combine_(rows, torch.ones(2))):
            with pytest.raises(
                RuntimeError, match="expected rows on a CUDA device with 'triton', found a tensor of parameter 0 on the"
            ):
                function()
    assert rows[0][1] is None
    with backend("auto"):
        assert choice.chosen_device_kernel() is None  # it never ran on a device, so that only a choice by name takes it
        assert gram(rows).tolist() == [[3.0, 3.0], [3.0, 5.0]]


def batch_of(members: Members) -> PointerBatch:
    return PointerBatch(members, [2, 0, 2, 0], device="cpu")


def test_tables_say_where_every_number_is_and_stay_where_they_are() -> None:
    rows = [[torch.ones(n) for n in (5, 4, 0, 9)] for _ in range(2)]
    rows[1][1] = None
    members: Members = [(p, [row[p] for row in rows]) for p in range(4)]
    (group,) = batch_of(members).groups.values()
    table = group.table(3, chunk=4)
    assert table.addresses.tolist() == [[0 if t is None else t.data_ptr() for t in local] for _, local in members]
    assert table.sizes.tolist() == [5, 4, 0, 9]
    # Block 0 has parameters 1 and 3, block 1 none, block 2 parameters 0 and 2.
    assert table.chunks.tolist() == [[1, 0], [3, 0], [3, 1], [3, 2], [0, 0], [0, 1]]
    assert table.begins.tolist() == [0, 4, 4, 6]
    assert table.blocks.tolist() == [2, 0, 2, 0]
    (again,) = batch_of(members).groups.values()
    assert all(one is other for one, other in zip(table, again.table(3, chunk=4), strict=True))
    rows[0][0] = torch.ones(6)[1:]
    (moved,) = batch_of([(p, [row[p] for row in rows]) for p in range(4)]).groups.values()
    found = moved.table(3, chunk=4)
    assert found.addresses is not table.addresses
    assert found.chunks is table.chunks
    assert not moved.aligned
