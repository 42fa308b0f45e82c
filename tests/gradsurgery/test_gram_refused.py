"""What must never reach the kernel's addresses, refused alike by both backends, and what keeps it from being built."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradsurgery.gram import Row, Write, backend, block_gram, choice, combine_blocks_, gram
from gradsurgery.gram.kernel import Batch, Members, build

needs_compiler = pytest.mark.skipif(isinstance(choice.built(), str), reason="needs a C++ compiler")
backends = pytest.mark.parametrize("name", ["eager", pytest.param("compiled", marks=needs_compiler)])


@pytest.fixture
def anew() -> Iterator[None]:
    """The kernel is looked for again, in the test and after it."""
    choice.built.cache_clear()
    yield
    choice.built.cache_clear()


def rows() -> list[list[Tensor]]:
    return [[torch.full((4,), 1.0 + k), torch.full((2, 3), 2.0 + k)] for k in range(2)]


def unchanged(found: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(a, b) for row, other in zip(found, rows(), strict=True) for a, b in zip(row, other, strict=True)
    )


@backends
@pytest.mark.parametrize(
    ("blocks", "number", "found"),
    [
        ([0, 2], 2, r"numbers from 0 to 1, found 0 to 2"),
        ([-1, 1], 2, r"numbers from 0 to 1, found -1 to 1"),
        ([0], 1, r"one for each of 2 parameters, found 1"),
        ([0, 0, 0], 1, r"one for each of 2 parameters, found 3"),
        (None, 0, r"numbers from 0 to -1, found 0 to 0"),
    ],
)
def test_blocks_that_are_not_there(name: choice.Choice, blocks: list[int] | None, number: int, found: str) -> None:
    mine = rows()
    with backend(name):
        with pytest.raises(ValueError, match=f"blocks: expected {found}"):
            block_gram(mine, blocks=blocks, num_blocks=number)
        with pytest.raises(ValueError, match=f"blocks: expected {found}"):
            combine_blocks_(mine, torch.full((number, 2), 3.0), blocks=blocks)
        assert block_gram([[], []], blocks=[], num_blocks=0).shape == (0, 2, 2)  # no parameter needs no block
    assert unchanged(mine)


@backends
@pytest.mark.parametrize("shape", [(2,), (1, 1), (1, 3), (1, 2, 1)])
def test_coefficients_that_are_not_one_for_each_row(name: choice.Choice, shape: tuple[int, ...]) -> None:
    mine = rows()
    with backend(name), pytest.raises(ValueError, match=r"coefficients: expected \[S, 2\].*found \[" + str(shape[0])):
        combine_blocks_(mine, torch.full(shape, 3.0))
    assert unchanged(mine)


@backends
@pytest.mark.parametrize("weight", [None, 0.5])
@pytest.mark.parametrize(
    ("row", "others", "found"),
    [
        (2, {0: 4}, "writes: expected a row from 0 to 1, found 2"),
        (-1, {0: 4}, "writes: expected a row from 0 to 1, found -1"),
        (1, {0: 4, 2: 4}, r"writes: expected tensors to overwrite in row 1, found none of parameters \[2\]"),
        (1, {0: 4, 1: 5}, "parameter 1: expected 6 numbers to overwrite row 1 by, found 5"),
        (1, {0: 1, 1: 6}, "parameter 0: expected 4 numbers to overwrite row 1 by, found 1"),
        (1, {0: 4, 1: 7}, "parameter 1: expected 6 numbers to overwrite row 1 by, found 7"),
    ],
)
def test_writes_that_do_not_fit(
    name: choice.Choice, row: int, others: dict[int, int], found: str, weight: float | None
) -> None:
    mine = rows()
    write = Write(row, {index: torch.ones(size) for index, size in others.items()}, weight)
    with backend(name), pytest.raises(ValueError, match=found):
        block_gram(mine, writes=[write])
    assert unchanged(mine)
    assert write.others.keys() == others.keys()


@backends
def test_a_write_where_there_is_no_tensor(name: choice.Choice) -> None:
    mine: list[Row] = [[torch.ones(4)], [None]]
    write = Write(1, {0: torch.ones(4)}, 0.5)
    with backend(name), pytest.raises(ValueError, match=r"row 1, found none of parameters \[0\]"):
        block_gram(mine, writes=[write])
    assert list(write.others) == [0]


def test_tensors_of_different_sizes_are_left_to_plain_pytorch() -> None:
    """As of a plain tensor beside shards: the kernel would read all at the size of one."""
    members: Members = [
        (0, [torch.ones(4), torch.ones(5)]),
        (1, [torch.ones(0), torch.ones(5)]),
        (2, [None, torch.ones(3)]),
    ]
    batch = Batch(members, None)
    assert [index for index, _ in batch.left] == [0, 1]
    assert batch.numbers == 3


# ---------------------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        ("quote", "CXX is not a command"),
        ("source", "it cannot be built .*no-such-file"),
        ("temporary", "it cannot be built .*no-such-folder"),
        ("noexec", "cannot be loaded .*failed to map segment"),
    ],
)
@pytest.mark.usefixtures("anew")
@needs_compiler
def test_what_keeps_the_kernel_from_being_built_ends_no_training(
    obstacle: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(_: str) -> None:
        raise OSError("kernel.so: failed to map segment from shared object")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if obstacle == "quote":
        monkeypatch.setenv("CXX", 'g++ "-O3')
    elif obstacle == "source":
        monkeypatch.setattr("gradsurgery.gram.kernel._SOURCE", tmp_path / "no-such-file")
    elif obstacle == "temporary":
        monkeypatch.setenv("XDG_CACHE_HOME", "x" * 5000)  # an OSError on every use, for root as well
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no-such-folder"))
    else:
        monkeypatch.setattr("ctypes.CDLL", refused)
    monkeypatch.setattr(choice, "SMALLEST", 1)
    with backend("auto"):
        assert gram([[torch.ones(5)]]).tolist() == [[5.0]]
        assert backend().name == "eager"
        with pytest.raises(RuntimeError, match=f"expected a kernel to be built, found that .*{reason}"):
            backend("compiled")


@needs_compiler
def test_a_cache_that_cannot_be_looked_into_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    number = build().number
    monkeypatch.setenv("XDG_CACHE_HOME", "x" * 5000)
    assert build().number == number


@needs_compiler
def test_a_default_device_is_no_obstacle() -> None:
    number = build().number
    with torch.device("meta"):
        assert build().number == number


@needs_compiler
def test_another_version_of_the_compiler_is_another_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its machine code, and so its bits, may differ: ranks compare the numbers, and the cache builds anew."""
    compiler = tmp_path / "compiler"
    version = tmp_path / "version"
    real = os.environ.get("CXX") or "c++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec cat {version}\nexec {real} "$@" -O0\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    numbers: list[int] = []
    for said in ("ours 12.2\nFree software", "\nours 13.1\nFree software", "ours 12.2\nAnd more"):
        version.write_text(said)
        kernel = build()
        assert said.strip().splitlines()[0] in kernel.about
        numbers.append(kernel.number)
    assert numbers[0] == numbers[2] != numbers[1]
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 2
