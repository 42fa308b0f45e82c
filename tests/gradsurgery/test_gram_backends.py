"""The compiled kernel beside plain PyTorch and float64 numpy: what it takes, its bits, its choice, and what can fail in building it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradsurgery.gram import backend, block_gram, choice, combine_, combine_blocks_, gram
from gradsurgery.gram.kernel import Batch, Kernel, Unavailable, build
from gradsurgery.gram.rows import Row
from tests import tolerances
from tests.reference import gram as reference
from tests.tolerances import close

F32, BF16 = torch.float32, torch.bfloat16
# Whole and broken blocks of 1024 numbers, lanes of 16, chunks of 2^16; the last is of several chunks.
SHAPES = [(), (0,), (1,), (15,), (16, 2), (1023,), (1025,), (3, 5), (1 << 16,), ((1 << 16) + 1,), (3, 100_003)]
COEFFICIENTS = (0.7, -1.3, 0.2, 2.0, 1.0)


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    try:
        return build()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with backend():
        yield


def tensor(shape: tuple[int, ...], dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def rows_of(*dtypes: torch.dtype) -> list[list[Tensor | None]]:
    shapes = SHAPES if len(dtypes) < 10 else SHAPES[:9]  # numpy takes all pairs of rows, one by one
    rows: list[list[Tensor | None]] = [
        [tensor(shape, dtype, 100 * k + p) for p, shape in enumerate(shapes)] for k, dtype in enumerate(dtypes)
    ]
    if len(rows) > 1:
        rows[1][8] = rows[-1][4] = None
    return rows


def copied(rows: list[list[Tensor | None]]) -> list[list[Tensor | None]]:
    return [[None if t is None else t.detach().clone() for t in row] for row in rows]


def same(found: Row, expected: Row) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


MIXTURES = [
    (F32,),
    (BF16,),
    (F32, F32),
    (BF16, BF16),
    (BF16, F32),
    (F32, BF16, F32),
    (F32, F32, BF16, F32, BF16),
    (F32,) * 16,
    (F32,) * 17,
    (F32, torch.float16),
    (torch.float64, F32),
]
mixtures = pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda mixture: f"{len(mixture)}-{mixture[-1]}")


@mixtures
@pytest.mark.parametrize("name", ["compiled", "eager"])
def test_products_equal_numpy(name: choice.Choice, dtypes: tuple[torch.dtype, ...], kernel: Kernel) -> None:
    rows = rows_of(*dtypes)
    with backend(name):
        found = gram(rows)
    expected = reference.gram(rows)
    norms = expected.diagonal().sqrt()
    assert torch.equal(found, found.mT)
    taken = name == "compiled" and len(dtypes) <= 16 and set(dtypes) <= {F32, BF16}
    tolerance = tolerances.KERNEL_GRAM[BF16 if BF16 in dtypes else F32] if taken else tolerances.GRAM[F32]
    close(found, expected, tolerance, scale=norms[:, None] * norms)


@mixtures
@pytest.mark.parametrize("scale", [1.0, 0.7, 0.0])
def test_combinations_are_those_of_plain_pytorch_bit_for_bit(
    dtypes: tuple[torch.dtype, ...], scale: float, kernel: Kernel
) -> None:
    rows, others = rows_of(*dtypes), rows_of(*dtypes)
    before = [t.data_ptr() for t in rows[0] if t is not None]
    coefficients = torch.tensor([scale, *itertools.islice(itertools.cycle(COEFFICIENTS), len(rows) - 1)])
    with backend("compiled"):
        found = combine_(rows, coefficients)
    with backend("eager"):
        expected = combine_(others, coefficients)
    same(found, expected)
    assert [t.data_ptr() for t in rows[0] if t is not None] == before
    for row, other in zip(rows[1:], others[1:], strict=True):
        same(row, other)


def test_what_the_kernel_does_not_take_goes_beside_what_it_takes(kernel: Kernel) -> None:
    layouts = [
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t[:, :1].expand(-1, 40),
        lambda t: t,
        lambda t: torch.nn.Parameter(t),
    ]
    rows: list[list[Tensor | None]] = [
        [layout(tensor((30, 40), seed=10 * k + p)) for p, layout in enumerate(layouts)] for k in range(2)
    ]
    ones = torch.ones(30, 40)
    lazy = tensor((1,), torch.complex64, seed=5).conj().imag  # a view whose sign is not in memory
    assert lazy.is_neg()
    rows[0].append(lazy)
    rows[1].append(tensor((1,), seed=6))
    blocks = [0, 1, 2, 0, 1, 2]
    with backend("compiled"):
        found = block_gram(rows, blocks=blocks, num_blocks=3)
        weighted = block_gram(rows, metric=lambda p: (ones, lambda one: 2.0 * one) if p < 5 else None)
    with backend("eager"):
        expected = block_gram(rows, blocks=blocks, num_blocks=3)
        unweighted = block_gram([row[:5] for row in rows]) * 2.0 + block_gram([row[5:] for row in rows])
    scale = expected.diagonal(dim1=-2, dim2=-1).amax()
    close(found, expected, tolerances.GRAM[F32], scale=scale)
    close(weighted, unweighted, tolerances.GRAM[F32], scale=scale)
    numbers = torch.tensor([[0.5, 1.0], [1.0, -1.0], [0.0, 2.0]])
    targets, others = (copied(rows[:1])[0] for _ in range(2))
    with backend("compiled"):
        combine_blocks_([targets, rows[1]], numbers, blocks=blocks)
    with backend("eager"):
        combine_blocks_([others, rows[1]], numbers, blocks=blocks)
    same(targets, others)


def test_bits_depend_on_nothing_but_the_numbers(kernel: Kernel) -> None:
    """Not on the number of threads, on repetition, on other rows, or on where in memory a tensor starts."""
    rows = rows_of(F32, F32, BF16)
    buffer = torch.zeros(3 * 100_003 + 3)
    threads = torch.get_num_threads()
    try:
        with backend("compiled"):
            first = gram(rows)
            combined = combine_(copied(rows), torch.tensor([0.5, 2.0, -1.0]))
            for number in (1, 2, 3, 7):
                torch.set_num_threads(number)
                assert torch.equal(gram(rows), first)
                same(combine_(copied(rows), torch.tensor([0.5, 2.0, -1.0])), combined)
            assert torch.equal(gram(rows[:2]), first[:2, :2])
            for start in (1, 2, 3):
                moved = copied(rows)
                there, here = buffer[start:][: 3 * 100_003].view(3, 100_003), moved[0][-1]
                assert here is not None
                moved[0][-1] = there.copy_(here)
                assert torch.equal(gram(moved), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_hides_a_bad_element(bad: float, dtype: torch.dtype, kernel: Kernel) -> None:
    for index, place in ((0, 0), (3, 14), (6, 1024), (10, 0), (10, 300_008)):
        rows = rows_of(dtype, F32, F32)
        spoilt = rows[0][index]
        assert spoilt is not None
        spoilt.view(-1)[place] = bad
        with backend("compiled"):
            finite = gram(rows).isfinite()
            assert not finite[0, 0]
            assert finite[1, 1]
            assert finite[1, 2]
            (found,) = combine_([[spoilt]], torch.tensor([0.0]))
        assert found is not None
        assert found.isnan().nonzero().flatten().numel() == max(spoilt.dim(), 0)
        assert bool(found.view(-1)[place].isnan())
    wide = torch.full((40,), 3e38)
    with backend("compiled"):
        (low,) = combine_([[torch.zeros(40, dtype=BF16)], [wide]], torch.tensor([1.0, 1.2]))
    assert low is not None
    assert low.isinf().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_hundred_million_numbers(dtype: torch.dtype, kernel: Kernel) -> None:
    """torch.dot of as many is off by up to 2e-2."""
    row = torch.randn(100_000_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = sum(float(part.double() @ part.double()) for part in row.split(1 << 20))
    with backend("compiled"):
        found = gram([[row]])
    close(found, torch.tensor([[exact]], dtype=torch.float64), tolerances.KERNEL_GRAM[dtype], scale=exact)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_equal_numbers_do_not_drift(dtype: torch.dtype, kernel: Kernel) -> None:
    """Long float32 sums of them are exact ties, which all round the same way."""
    row = torch.full((1 << 20,), 1.0078125, dtype=dtype)
    exact = torch.tensor([[row.numel() * 1.0078125**2]], dtype=torch.float64)
    with backend("compiled"):
        close(gram([[row], [row]])[:1, 1:], exact, tolerances.KERNEL_GRAM[dtype], scale=exact)


def test_a_tensor_at_an_odd_address_is_read_as_what_it_is(kernel: Kernel) -> None:
    """As one in the midst of a mapped file; the lowest bit of an address says bfloat16 to the kernel."""
    numbers = torch.arange(8, dtype=F32)
    file = bytearray(1) + bytearray(numbers.numpy().tobytes())
    odd = torch.frombuffer(file, dtype=F32, count=8, offset=1)
    assert odd.data_ptr() % 2 == 1
    with backend("compiled"):
        assert gram([[odd], [torch.ones(8)]]).tolist() == [[140.0, 28.0], [28.0, 8.0]]


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_numbers_with_gaps_are_multiplied_as_exactly_as_without(name: choice.Choice, kernel: Kernel) -> None:
    row = torch.randn(140_002, generator=torch.Generator().manual_seed(0))[::2]
    exact = torch.tensor([[float(row.double() @ row.double())]], dtype=torch.float64)
    with backend(name):
        close(gram([[row]]), exact, tolerances.KERNEL_GRAM[F32], scale=exact)


def test_autograd_notices_what_was_overwritten(kernel: Kernel) -> None:
    leaf = tensor((4,)).requires_grad_()
    used = leaf * 1.0
    squared = used.square().sum()
    with backend("compiled"):
        combine_([[used]], torch.tensor([2.0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


# ---------------------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------------------


def test_a_lack_of_memory_for_partial_sums_is_told_and_nothing_is_done(kernel: Kernel) -> None:
    total = torch.zeros(1, 2, 2, dtype=torch.float64)
    batch = Batch([(0, [torch.ones(4), torch.ones(4)])], None)
    batch._sizes[0] = 1 << 61  # numbers; the sums of their chunks would take 2 PB
    assert not kernel.add_products(batch, total)
    assert not total.any()


def test_auto_takes_large_rows_only(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    kept = Kernel.add_products

    def counted(self: Kernel, batch: Batch, total: Tensor) -> bool:
        taken.append(len(batch.taken))
        return kept(self, batch, total)

    monkeypatch.setattr(Kernel, "add_products", counted)
    monkeypatch.setattr(choice, "SMALLEST", 1000)
    small, large, other = torch.ones(999), torch.ones(1000), torch.ones(2000, dtype=torch.float64)
    with backend("auto"):
        gram([[small]])
        gram([[small, other]])  # what the kernel does not take does not count
        assert taken == []
        gram([[large]])
        gram([[small, None, torch.ones(1)], [small, None, None]])
        assert taken == [1, 2]
        with backend("eager"):
            gram([[large]])
        assert taken == [1, 2]
        gram([[large]])
        assert taken == [1, 2, 1]


def test_the_choice_says_itself_and_is_restored(kernel: Kernel) -> None:
    assert backend("eager").name == "eager"
    with backend("compiled") as inner:
        assert inner.name == backend().name == "compiled"
        assert "a CPU, built by" in repr(inner)
        with pytest.raises(
            ValueError, match=r"backend: expected one of 'auto', 'compiled', 'eager', 'triton', or None, found 'fast'"
        ):
            backend("fast")
        assert backend().name == "compiled"
    assert repr(backend()) == "eager: it was chosen"


def test_without_a_compiler_plain_pytorch_runs_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = [[torch.ones(5)], [torch.ones(5)]]
    for compiler, reason in (("no-such-compiler", "no C\\+\\+ compiler was found"), ("false", "false failed")):
        monkeypatch.setenv("CXX", compiler)
        choice.built.cache_clear()
        try:
            with pytest.raises(RuntimeError, match=f"expected a kernel to be built, found that .*{reason}"):
                backend("compiled")
            monkeypatch.setattr(choice, "SMALLEST", 1)
            with backend("auto") as chosen:
                assert chosen.name == "eager"
                assert gram(rows).tolist() == [[5.0, 5.0], [5.0, 5.0]]
        finally:
            choice.built.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


def test_the_cache_mends_itself_and_need_not_be_there(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build().number == kernel.number
    (library,) = tmp_path.rglob("*.so")
    library.unlink()  # this process has it in memory, and would end by a bus error if its bytes changed there
    library.write_bytes(b"not a library")
    assert build().number == kernel.number
    assert library.stat().st_size > 1000
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for place in (str(tmp_path / "file"), "relative"):  # the second is what a user without a home has: "~/.cache"
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        assert build().number == kernel.number
    assert not (tmp_path / "relative").exists()
