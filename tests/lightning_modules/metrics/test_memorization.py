"""Extraction strength and exact memorisation against trying every prefix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.metrics.functional import exact_memorization, extraction_strength
from tests.reference import metrics as oracles

answers = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None)
@given(st.lists(answers, min_size=1, max_size=4))
def test_both_equal_the_oracle_and_are_ordered(rows: list[list[tuple[int, int]]]) -> None:
    predicted, labels = [[p for p, _ in row] for row in rows], [[y for _, y in row] for row in rows]
    strength, memorized = extraction_strength(predicted, labels), exact_memorization(predicted, labels)
    expected = [oracles.extraction_strength(p, y) for p, y in zip(predicted, labels, strict=True)]
    assert strength.tolist() == pytest.approx(expected, abs=1e-15)
    expected = [oracles.exact_memorization(p, y) for p, y in zip(predicted, labels, strict=True)]
    assert memorized.tolist() == pytest.approx(expected, abs=1e-15)
    assert (strength <= memorized + 1e-15).all()
    assert extraction_strength(predicted[0], labels[0]) == strength[0]
    assert exact_memorization(predicted[0], labels[0]) == memorized[0]


def test_by_hand() -> None:
    assert extraction_strength([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0
    assert extraction_strength([0, 2, 3, 4], [1, 2, 3, 4]) == 0.75
    assert extraction_strength([1, 2, 3, 0], [1, 2, 3, 4]) == 0.0  # open-unlearning: 0.25
    assert extraction_strength([1, 0, 3, 0], [1, 2, 3, 4]) == 0.0
    assert exact_memorization([1, 2, 3, 0], [1, 2, 3, 4]) == 0.75
    assert extraction_strength([5], [5]) == 1.0
    assert extraction_strength([5], [4]) == 0.0


def test_bisection_finds_the_same_prefix() -> None:
    """Right from k on implies right from k + 1 on, so halving, as authors do it, is exact where decoding is."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        labels = torch.randint(0, 2, (12,), generator=generator)
        predicted = labels ^ (torch.rand(12, generator=generator) < 0.2).long()
        low, high = 0, len(labels)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if torch.equal(predicted[middle:], labels[middle:]) else (middle + 1, high)
        assert extraction_strength(predicted, labels) == 1 - low / len(labels)


def test_arrays_of_numpy_are_tensors() -> None:
    predicted, labels = torch.tensor([5, 2, 3, 4]), torch.tensor([1, 2, 3, 4])
    for function in (exact_memorization, extraction_strength):
        alone = function(predicted, labels)
        assert function(predicted.numpy(), labels.numpy()) == alone
        ragged = function([predicted.numpy(), predicted[1:].numpy()], [labels.numpy(), labels[1:].numpy()])
        assert ragged.tolist() == [alone, function(predicted[1:], labels[1:])]


def test_ignored_positions_are_left_out() -> None:
    padded_predicted = torch.tensor([[7, 7, 1, 2, 3, 9], [7, 1, 9, 9, 9, 9]])
    padded_labels = torch.tensor([[-100, -100, 1, 0, 3, -100], [-100, 1, -100, -100, -100, -100]])
    assert extraction_strength(padded_predicted, padded_labels).tolist() == pytest.approx([1 / 3, 1.0])
    assert exact_memorization(padded_predicted, padded_labels).tolist() == pytest.approx([2 / 3, 1.0])


def test_where_the_logits_were_nan_the_score_is_nan() -> None:
    predicted, labels = [[1, -1, 3], [1, 2, 3], [-1, 2, 3]], [[1, 2, 3], [1, 2, 3], [-100, 2, 3]]
    for metric in (extraction_strength, exact_memorization):
        assert metric(predicted, labels).isnan().tolist() == [True, False, False]
        assert math.isnan(metric(predicted[0], labels[0]))


@pytest.mark.parametrize(
    ("predicted", "labels"),
    [
        ([], []),
        ([[]], [[]]),
        ([1, 2], [1]),
        ([[1, 2]], [[1]]),
        ([[1]], [[1], [1]]),
        ([1], [[1]]),
        ([1], [-100]),
        ([1.0], [1.0]),
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64)),
        (None, [1]),
        ("ab", "ab"),
        (1, 1),
    ],
)
def test_misshaped_tokens_are_a_value_error(predicted: object, labels: object) -> None:
    for metric in (extraction_strength, exact_memorization):
        with pytest.raises(ValueError, match="expected"):
            metric(predicted, labels)
