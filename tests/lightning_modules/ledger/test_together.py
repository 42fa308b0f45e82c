"""Which requests are cheap to do together: the estimate against explicit gradients, and groups that are a partition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.ledger.together import after_surgery, cosines, groups, saved, steps
from tests.reference import together as slow


def gradients(seed: int, count: int, size: int = 6, shared: float = 0.5) -> list[np.ndarray]:
    """Requests with something in common, of very different lengths; the last one is retention's."""
    draw = np.random.default_rng(seed)
    common = draw.normal(size=size)
    rows = [
        (shared * common + draw.normal(size=size)) * 10.0 ** draw.integers(-3, 4) * draw.choice([1, 1, 1, -1])
        for _ in range(count)
    ]
    return [*rows, draw.normal(size=size) - common]


def gram(rows: list[np.ndarray]) -> torch.Tensor:
    matrix = torch.from_numpy(np.stack(rows))
    return matrix @ matrix.T


@given(seed=st.integers(0, 10**6), count=st.integers(1, 5))
def test_the_estimate_is_that_of_a_walk_along_the_sum(seed: int, count: int) -> None:
    rows = gradients(seed, count)
    left = [slow.projected(row, rows[-1]) for row in rows[:-1]]
    cosine = cosines(after_surgery(gram(rows)))
    expected = slow.steps(left)
    if math.isinf(expected):
        assert steps(cosine, range(count)) > 1e6
    else:
        assert steps(cosine, range(count)) == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 10**6), count=st.integers(1, 7))
def test_groups_are_those_of_the_slow_agglomeration_and_every_request_is_in_one(seed: int, count: int) -> None:
    rows = gradients(seed, count)
    cosine = cosines(after_surgery(gram(rows)))
    found = groups(cosine)
    assert found == slow.greedy([slow.projected(row, rows[-1]) for row in rows[:-1]])
    assert sorted(place for group in found for place in group) == list(range(count))
    assert all(saved(cosine, group) >= 0 for group in found)


@pytest.mark.parametrize(
    ("cosine", "expected"), [(1.0, 0.5), (0.0, 1 - math.sqrt(0.5)), (-0.5, 0.0), (-1.0, -math.inf)]
)
def test_a_pair_saves_what_the_formula_says(cosine: float, expected: float) -> None:
    matrix = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
    assert saved(matrix, [0, 1]) == pytest.approx(expected)
    assert groups(matrix) == ([[0, 1]] if expected > 0 else [[0], [1]])


def test_requests_that_may_not_be_in_one_run_are_in_different_groups_however_alike() -> None:
    cosine = torch.full((4, 4), 0.9).fill_diagonal_(1.0)
    assert groups(cosine) == [[0, 1, 2, 3]]
    assert groups(cosine, lambda *pair: set(pair) != {0, 2}) == [[0, 1, 3], [2]]
    assert groups(cosine, lambda *_: False) == [[0], [1], [2], [3]]


def test_a_gradient_of_zero_has_no_direction_and_joins_nobody() -> None:
    rows = [np.array([1.0, 0.0]), np.zeros(2), np.array([1.0, 0.1]), np.array([0.0, 1.0])]
    cosine = cosines(after_surgery(gram(rows)))
    assert cosine[1].tolist() == [0.0, 0.0, 0.0]
    assert groups(cosine) == [[0, 2], [1]]
