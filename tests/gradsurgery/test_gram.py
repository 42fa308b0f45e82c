"""Inner products and combinations of rows against float64 numpy, over dtypes, layouts and missing gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradsurgery.gram import Row, backend, block_gram, combine_, combine_blocks_, gram
from gradsurgery.gram.eager import combine_on_device, combine_on_host
from tests import tolerances
from tests.reference import gram as reference
from tests.tolerances import close

DTYPES = list(tolerances.GRAM)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# 2^17 elements are one chunk: below, at, just above, and several with a remainder.
SHAPES = [(), (1,), (0,), (3, 5), (1 << 17,), ((1 << 17) + 1,), (3, 100_003)]


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def rows_of(
    number: int, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> list[list[Tensor | None]]:
    return [[tensor(*shape, dtype=dtype, seed=100 * k + p) for p, shape in enumerate(shapes)] for k in range(number)]


def copied(rows: list[list[Tensor | None]]) -> list[list[Tensor | None]]:
    return [[None if t is None else t.clone() for t in row] for row in rows]


def close_grams(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    norms = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = (norms[..., :, None] * norms[..., None, :]).clamp_min(torch.finfo(torch.float64).tiny)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.mT)
    close(found, expected, tolerances.GRAM[dtype], scale=scale)


def close_rows(found: Row, expected: Row, dtype: torch.dtype, size: float) -> None:
    """``size`` bounds the sum of the terms' sizes, element by element."""
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == dtype
            wide = torch.complex128 if dtype.is_complex else torch.float64
            close(one.to(wide), other.to(wide), tolerances.COMBINED[dtype], scale=size)


# ---------------------------------------------------------------------------------------------------------------------------------
# Inner products
# ---------------------------------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_gram_equals_numpy(dtype: torch.dtype, number: int) -> None:
    rows = rows_of(number, SHAPES, dtype)
    close_grams(gram(rows), reference.gram(rows), dtype)


def test_gram_by_hand() -> None:
    forget = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    retain = [torch.tensor([-1.0, 2.0]), None]
    assert gram([forget, retain]).tolist() == [[25.0, -3.0], [-3.0, 5.0]]


def test_a_row_may_be_a_tuple_and_may_require_grad() -> None:
    leaf = tensor(7).requires_grad_()
    found = gram([(leaf,), (leaf * 2.0,)])
    assert not found.requires_grad
    close_grams(found, reference.gram([[leaf], [leaf * 2.0]]), torch.float32)


def test_none_is_a_zero_gradient() -> None:
    rows = rows_of(3, [(4,), (5,), (6,), (7,)])
    rows[0][0] = rows[1][1] = rows[2][1] = rows[0][2] = rows[1][2] = rows[2][2] = None
    close_grams(gram(rows), reference.gram(rows), torch.float32)
    filled = [[torch.zeros(4 + p) if t is None else t for p, t in enumerate(row)] for row in rows]
    assert torch.equal(gram(rows), gram(filled))


def test_rows_without_any_gradient_give_a_zero_matrix() -> None:
    assert torch.equal(gram([[None], [None]]), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(gram([[], []]), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(gram([[torch.zeros(0)], [None]]), torch.zeros(2, 2, dtype=torch.float64))


@dtypes
def test_layout_does_not_matter(dtype: torch.dtype) -> None:
    """Transposed, strided, expanded and channels-last gradients are multiplied element by element all the same."""
    square, cube = tensor(30, 50, dtype=dtype), tensor(4, 3, 5, 6, dtype=dtype, seed=1)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t[:, :1].expand(-1, 50),
    ]
    for layout in layouts:
        rows = [[square], [layout(tensor(30, 50, dtype=dtype, seed=2))], [layout(square)]]
        assert not rows[1][0].is_contiguous()
        close_grams(gram(rows), reference.gram(rows), dtype)
    large = tensor(400, 500, dtype=dtype)
    rows = [[large], [tensor(500, 400, dtype=dtype, seed=4).t()]]
    close_grams(gram(rows), reference.gram(rows), dtype)
    rows = [[cube], [tensor(4, 3, 5, 6, dtype=dtype, seed=3).to(memory_format=torch.channels_last)]]
    close_grams(gram(rows), reference.gram(rows), dtype)


def test_the_product_of_complex_rows_is_that_of_their_parts() -> None:
    rows = rows_of(2, [(3, 4)], torch.complex128)
    parts = [[torch.view_as_real(t) for t in row if t is not None] for row in rows]
    close_grams(gram(rows), gram(parts), torch.complex128)


def test_lazily_conjugated_gradients() -> None:
    """Autograd leaves them where a loss uses ``z.conj()``."""
    z = tensor(6, dtype=torch.complex64).requires_grad_()
    (z.conj() * (1 + 2j)).real.sum().backward()
    lazy, other = z.grad, tensor(6, dtype=torch.complex64, seed=1)
    assert lazy is not None
    assert lazy.is_conj()
    close_grams(gram([[lazy], [other]]), reference.gram([[lazy], [other]]), torch.complex64)
    for rows in ([[lazy.conj().clone().conj()], [other.clone()]], [[other.clone()], [lazy]]):
        expected = reference.combination(rows, [0.5, -2.0])
        target = rows[0][0]
        close_rows(combine_(rows, torch.tensor([0.5, -2.0])), expected, torch.complex64, 10.0)
        assert rows[0][0] is target


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_of_different_dtypes(low: torch.dtype) -> None:
    """The more precise decides; a bf16 forget row and a float32 moving average of the retain row are the usual case."""
    rows = [[tensor(1000, dtype=low)], [tensor(1000, seed=1)], [tensor(1000, dtype=torch.float64, seed=2)]]
    close_grams(gram(rows[:2]), reference.gram(rows[:2]), low)
    close_grams(gram(rows), reference.gram(rows), torch.float64)


def test_products_of_half_precision_do_not_overflow() -> None:
    rows = [[torch.full((1000,), 6e4, dtype=torch.float16)], [torch.full((1000,), 1e-7, dtype=torch.float16)]]
    close_grams(gram(rows), reference.gram(rows), torch.float16)


def test_parameters_of_different_dtypes() -> None:
    rows = [[tensor(50, dtype=dtype, seed=10 * k + p) for p, dtype in enumerate(DTYPES)] for k in range(3)]
    close_grams(gram(rows), reference.gram(rows), torch.float32)


def test_blocks() -> None:
    rows = rows_of(3, [(4,), (5, 2), (6,), (), (1 << 17, 2)])
    rows[1][2] = None
    blocks = [1, 0, 1, 3, 0]
    found = block_gram(rows, blocks=blocks, num_blocks=4)
    assert found.shape == (4, 3, 3)
    for block in range(4):
        part = [[t for t, b in zip(row, blocks, strict=True) if b == block] for row in rows]
        close_grams(found[block], reference.gram(part), torch.float32)
    close_grams(found.sum(0), gram(rows), torch.float64)


def test_a_metric_weighs_every_element() -> None:
    shapes = [(3, 4), (7,), (2, 100_003), (5,)]
    rows = rows_of(3, shapes)
    rows[2][1] = None
    statistics = [tensor(*shape, seed=900 + p).square() for p, shape in enumerate(shapes)]

    def weights(statistic: Tensor) -> Tensor:
        return 1.0 / (statistic.sqrt() + 0.1)

    def metric(index: int) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        return None if index == 3 else (statistics[index], weights)

    expected = reference.gram(rows, [weights(s.double()) for s in statistics[:3]] + [None])
    close_grams(block_gram(rows, metric=metric)[0], expected, torch.float32)
    found = block_gram(rows, metric=metric, blocks=[0, 1, 0, 1], num_blocks=2)
    close_grams(found.sum(0), expected, torch.float32)
    assert not torch.allclose(gram(rows), expected)


def test_a_metric_of_ones_is_the_euclidean_one() -> None:
    rows = rows_of(2, [(3, 4), (7,)], torch.bfloat16)

    def metric(index: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return torch.zeros_like(rows[0][index], dtype=torch.float32), lambda statistic: statistic + 1.0

    assert torch.equal(block_gram(rows, metric=metric)[0], gram(rows))


def test_a_metric_on_a_transposed_gradient() -> None:
    statistic = tensor(30, 50, seed=5).square()
    rows = [[tensor(50, 30).t()], [tensor(30, 50, seed=1)]]
    found = block_gram(rows, metric=lambda _: (statistic, lambda s: s + 1.0))[0]
    close_grams(found, reference.gram(rows, [statistic + 1.0]), torch.float32)


def test_parameters_without_any_gradient_are_known_from_like() -> None:
    rows: list[list[Tensor | None]] = [[None, tensor(3)], [None, None]]
    like = [torch.zeros(2), torch.zeros(3)]
    close_grams(block_gram(rows, like=like)[0], reference.gram(rows), torch.float32)
    with pytest.raises(ValueError, match="parameter 1: expected tensors of one shape"):
        block_gram(rows, like=[torch.zeros(2), torch.zeros(4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_tensor_keeps_its_precision(dtype: torch.dtype) -> None:
    """2e7 elements: torch.dot over the whole tensor is off by 1e-5 to 1e-4 here."""
    generator = torch.Generator().manual_seed(0)
    forget = torch.randn(20_000_000, generator=generator).to(dtype)
    retain = (forget * 0.5 + 1.0).to(dtype)
    with backend("eager"):
        found = gram([[forget], [retain]])
    with backend("auto"):
        by_kernel = gram([[forget], [retain]])
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for i, left in enumerate((forget, retain)):
        for j, right in enumerate((forget, retain)):
            # In small pieces, which is exact enough and spares a float64 copy of the whole.
            expected[i, j] = sum(
                float(a.double() @ b.double()) for a, b in zip(left.split(1 << 20), right.split(1 << 20), strict=True)
            )
    norms = expected.diagonal().sqrt()
    close(found, expected, tolerances.LARGE_GRAM[dtype], scale=norms[:, None] * norms)
    close(by_kernel, expected, tolerances.KERNEL_GRAM[dtype], scale=norms[:, None] * norms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_numbers_of_low_precision_do_not_drift(dtype: torch.dtype) -> None:
    """Their float32 sums are exact ties, which all round the same way: off by 5e-5, the more the fewer partial sums a CPU keeps."""
    row = torch.full((1 << 22,), 1.0078125, dtype=dtype)
    expected = torch.tensor([[row.numel() * 1.0078125**2]], dtype=torch.float64)
    close(gram([[row]]), expected, tolerances.LARGE_GRAM[torch.bfloat16], scale=expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_a_bad_element_anywhere_shows_on_the_diagonal(bad: float, dtype: torch.dtype) -> None:
    shapes = [(5,), (300_001,), ()]
    for index, place in ((0, 0), (0, 4), (1, 0), (1, 1 << 17), (1, 300_000), (2, 0)):
        rows = rows_of(3, shapes, dtype)
        spoilt = rows[1][index]
        assert spoilt is not None
        spoilt.view(-1)[place] = bad
        finite = gram(rows).isfinite()
        assert not finite[1, 1]
        assert finite[0, 0]
        assert finite[2, 2]
        assert finite[0, 2]


@pytest.mark.parametrize("function", [gram, lambda rows: combine_(rows, torch.ones(len(rows)))])
def test_rows_that_do_not_belong_together_are_refused(function: Callable[[list[list[Tensor | None]]], object]) -> None:
    with pytest.raises(ValueError, match="rows: expected at least one row"):
        function([])
    with pytest.raises(ValueError, match=r"rows: expected one entry per parameter.*\[1, 2\]"):
        function([[tensor(3)], [tensor(3), tensor(4)]])
    with pytest.raises(ValueError, match=r"parameter 1: expected tensors of one shape, \[3\], found \[4\]"):
        function([[tensor(2), tensor(3)], [tensor(2), tensor(4)]])
    with pytest.raises(ValueError, match="parameter 0: expected tensors of one shape"):
        function([[tensor(6)], [tensor(2, 3)]])  # the same number of elements is not enough


# ---------------------------------------------------------------------------------------------------------------------------------
# Combinations
# ---------------------------------------------------------------------------------------------------------------------------------

COEFFICIENTS = [(0.7,), (1.0, 0.37), (0.25, -1.5), (1.0, 0.0), (0.0, 1.0), (1.0, 0.3, 1.63), (0.9, -0.6, 0.0, 2.0)]


def on_host(target: Tensor, scale: float, others: list[tuple[float, Tensor]]) -> None:
    combine_on_host(target, scale, others)


def on_device(target: Tensor, scale: float, others: list[tuple[float, Tensor]]) -> None:
    combine_on_device(target, scalar(scale), [(scalar(coefficient), other) for coefficient, other in others])


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


PATHS = pytest.mark.parametrize("path", [on_host, on_device])


@dtypes
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_combination_equals_numpy(dtype: torch.dtype, coefficients: tuple[float, ...]) -> None:
    rows = rows_of(len(coefficients), SHAPES, dtype)
    expected = reference.combination(rows, coefficients)
    found = combine_(rows, torch.tensor(coefficients, dtype=torch.float64))
    largest = max(float(t.abs().max()) for row in rows for t in row if t is not None and t.numel())
    if dtype in (torch.bfloat16, torch.float16):  # judged below, to the bit
        return
    close_rows(found, expected, dtype, largest * (1.0 + sum(map(abs, coefficients))))


@PATHS
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_rounded_once(
    path: Callable[..., None], dtype: torch.dtype, other_dtype: torch.dtype, coefficients: tuple[float, ...]
) -> None:
    """Every result is one of the two values of its dtype next to the exact one, the nearer one up to a float32 rounding."""
    others = [tensor(500, dtype=other_dtype, seed=k) for k in range(1, len(coefficients))]
    target = tensor(500, dtype=dtype)
    (exact,) = reference.combination([[target], *([other] for other in others)], coefficients)
    assert exact is not None
    path(target, coefficients[0], list(zip(coefficients[1:], others, strict=True)))
    smallest_normal = torch.finfo(dtype).tiny
    close(target.double(), exact, tolerances.COMBINED[dtype], scale=exact.abs() + 10.0 * smallest_normal)
    assert int((target != exact.to(dtype)).sum()) <= 2  # ties that a float32 rounding decides


@PATHS
@dtypes
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_both_paths_equal_numpy_on_every_layout(
    path: Callable[..., None], dtype: torch.dtype, coefficients: tuple[float, ...]
) -> None:
    for layout in (lambda t: t, lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], -1)[..., 0]):
        others = [tensor(30, 20, dtype=dtype, seed=k) for k in range(1, len(coefficients))]
        target = layout(tensor(30, 20, dtype=dtype))
        (exact,) = reference.combination([[target], *([other] for other in others)], coefficients)
        strides, place = target.stride(), target.data_ptr()
        path(target, coefficients[0], list(zip(coefficients[1:], others, strict=True)))
        assert (target.stride(), target.data_ptr()) == (strides, place)
        close_rows([target], [exact], dtype, 20.0)


def test_the_device_path_equals_the_host_path_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsurgery.gram.eager._ACCELERATOR_CHUNK", 100)
    monkeypatch.setattr("gradsurgery.gram.eager._CPU_CHUNK", 70)
    for dtype in DTYPES:
        host, device = tensor(1001, dtype=dtype), tensor(1001, dtype=dtype)
        others = [(0.3, tensor(1001, dtype=dtype, seed=1)), (-1.7, tensor(1001, dtype=dtype, seed=2))]
        on_host(host, 0.9, others)
        on_device(device, 0.9, others)
        close_rows([device], [host], dtype, 20.0)


def test_the_combination_is_written_into_the_first_row() -> None:
    for coefficients in COEFFICIENTS:
        rows = rows_of(len(coefficients), SHAPES)
        before, places = copied(rows), [t.data_ptr() for t in rows[0] if t is not None]
        found = combine_(rows, torch.tensor(coefficients))
        assert found is rows[0]
        assert [t.data_ptr() for t in found if t is not None] == places
        for row, kept in zip(rows[1:], before[1:], strict=True):
            assert all(torch.equal(t, k) for t, k in zip(row, kept, strict=True) if t is not None and k is not None)


def test_the_first_row_given_as_a_tuple_is_overwritten_too() -> None:
    target = torch.tensor([1.0, 2.0])
    found = combine_([(target,), [torch.tensor([1.0, 1.0])]], torch.tensor([2.0, 1.0]))
    assert target.tolist() == [3.0, 5.0]
    assert found[0] is target


def test_gradients_that_require_grad_are_overwritten_without_a_graph() -> None:
    target = torch.ones(2, requires_grad=True)
    (found,) = combine_([[target], [torch.ones(2)]], torch.tensor([2.0, 1.0]))
    assert found is target
    assert found.tolist() == [3.0, 3.0]
    assert found.grad_fn is None


def test_a_missing_tensor_of_the_first_row_is_made() -> None:
    rows: list[list[Tensor | None]] = [[None, tensor(3)], [tensor(2, 4, dtype=torch.bfloat16, seed=1), None]]
    expected = reference.combination(rows, [0.5, -2.0])
    found = combine_(rows, torch.tensor([0.5, -2.0]))
    assert found is rows[0]
    assert found[0] is not None
    assert rows[1][0] is not None
    assert found[0].data_ptr() != rows[1][0].data_ptr()
    assert found[0].dtype == torch.bfloat16
    close(found[0].double(), expected[0], tolerances.COMBINED[torch.bfloat16], scale=5.0)
    close_rows(found[1:], expected[1:], torch.float32, 5.0)


def test_a_missing_tensor_cannot_be_made_in_a_tuple() -> None:
    with pytest.raises(TypeError, match=r"rows\[0\]: expected a list"):
        combine_([(None,), [tensor(2)]], torch.ones(2))


def test_a_parameter_without_any_gradient_stays_without() -> None:
    found = combine_([[None, tensor(2)], [None, tensor(2)], [None, None]], torch.tensor([1.0, 2.0, math.nan]))
    assert found[0] is None
    assert found[1] is not None
    assert found[1].isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 2)])
def test_coefficients_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"coefficients: expected one for each of 2 rows, \[2\]"):
        combine_([[tensor(3)], [tensor(3)]], torch.ones(shape))


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nothing_hides_a_bad_element(path: Callable[..., None], dtype: torch.dtype) -> None:
    """A coefficient of 0 does not skip its row: 0 * inf is the alarm."""
    for number in (1, 2, 3):
        for bad in (math.nan, math.inf):
            for row in range(number):
                parts = [torch.ones(3, dtype=dtype) for _ in range(number)]
                parts[row][1] = bad
                scale = 0.0 if row == 0 else 1.0
                path(parts[0], scale, [(0.0 if k == row else 1.0, part) for k, part in enumerate(parts) if k > 0])
                assert parts[0].isnan().tolist() == [False, True, False]
        parts = [torch.ones(3, dtype=dtype) for _ in range(number)]
        path(parts[0], math.nan, [(1.0, part) for part in parts[1:]])
        assert parts[0].isnan().all()
        if number > 1:
            parts = [torch.ones(3, dtype=dtype) for _ in range(number)]
            path(parts[0], 1.0, [(math.nan, part) for part in parts[1:]])
            assert parts[0].isnan().all()


@PATHS
def test_a_coefficient_beyond_the_range_of_half_precision(path: Callable[..., None]) -> None:
    for scale in (1.0, 0.5):
        target = torch.ones(3, dtype=torch.float16)
        path(target, scale, [(1e6, torch.full((3,), 1e-3, dtype=torch.float16))])
        close(
            target.double(),
            torch.full((3,), 1000.0, dtype=torch.float64),
            tolerances.COMBINED[torch.bfloat16],
            scale=1000.0,
        )


def test_blocks_have_their_own_coefficients() -> None:
    rows = rows_of(2, [(4,), (5,), (6,)])
    coefficients, blocks = torch.tensor([[1.0, 0.5], [0.2, -3.0]], dtype=torch.float64), [1, 0, 1]
    expected = [reference.combination(rows, coefficients[block].tolist())[p] for p, block in enumerate(blocks)]
    close_rows(combine_blocks_(rows, coefficients, blocks=blocks), expected, torch.float32, 10.0)


@dtypes
def test_the_matrix_of_a_combination_follows_from_the_matrix(dtype: torch.dtype) -> None:
    """<u, row_k> = (G c)_k and |u|^2 = c^T G c: what rules promise on the matrix holds for the tensors."""
    rows = rows_of(3, [(3, 5), (70_000, 2)], dtype)
    coefficients = torch.tensor([1.0, 0.4, -0.3], dtype=torch.float64)
    matrix, kept = gram(rows), copied(rows)
    found = gram([combine_(rows, coefficients), *kept])
    norms = matrix.diagonal().sqrt()
    close(found[0, 1:], matrix @ coefficients, tolerances.COMBINED[dtype], scale=3.0 * norms * norms.max())
    close(
        found[0, 0],
        coefficients @ matrix @ coefficients,
        tolerances.COMBINED[dtype],
        scale=9.0 * float(norms.max()) ** 2,
    )
