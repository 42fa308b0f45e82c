"""Membership scores, AUC and PrivLeak against loops, against scipy's Mann-Whitney test, and against the other conventions."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from torch import Tensor

from lightning_modules.metrics.functional import (
    auc,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    priv_leak,
    zlib_score,
)
from tests.reference import metrics as oracles

LENGTHS = (1, 2, 4, 5, 9, 10, 30)


def examples(seed: int = 0) -> list[list[float]]:
    generator = random.Random(seed)
    return [[-generator.expovariate(0.5) for _ in range(length)] for length in LENGTHS]


def positive(seed: int) -> list[list[float]]:
    return [[-value for value in row] for row in examples(seed)]


@pytest.mark.parametrize("k", [0.05, 0.2, 0.29, 0.4, 0.7, 1.0])
def test_min_k_is_the_mean_of_the_smallest(k: float) -> None:
    rows = examples()
    assert min_k_score(rows, k).tolist() == pytest.approx([oracles.min_k(row, k) for row in rows], rel=1e-12)
    assert min_k_score(rows[-1], k) == pytest.approx(oracles.min_k(rows[-1], k), rel=1e-12)


@pytest.mark.parametrize("k", [0.2, 0.4, 1.0])
def test_min_k_plus_plus_is_min_k_of_standard_scores(k: float) -> None:
    rows, centres, spreads = examples(), examples(1), positive(2)
    spreads[0][0] = 0.0  # a position that the model is certain of
    expected = [oracles.min_k_plus_plus(*row, k) for row in zip(rows, centres, spreads, strict=True)]
    assert min_k_plus_plus_score(rows, centres, spreads, k).tolist() == pytest.approx(expected, rel=1e-9)


def test_loss_and_zlib_are_the_textbook_formulas() -> None:
    rows = examples()
    texts = ["é" * length + " and so on" for length in LENGTHS]
    assert loss_score(rows).tolist() == pytest.approx([oracles.mean(row) for row in rows], rel=1e-12)
    expected = [oracles.zlib_score(row, text) for row, text in zip(rows, texts, strict=True)]
    assert zlib_score(rows, texts).tolist() == pytest.approx(expected, rel=1e-12)


def test_defaults_are_the_papers() -> None:
    row = [-1.0, -2.0, -3.0, -4.0, -50.0, -6.0, -7.0, -8.0, -9.0, -10.0]
    assert min_k_score(row) == -30.0
    assert min_k_plus_plus_score(row, [0.0] * 10, [1.0] * 10) == -30.0


def test_every_score_is_higher_for_what_is_better_known() -> None:
    known, unknown = [-0.1, -0.2, -0.1, -0.3], [-2.0, -3.0, -1.0, -4.0]
    centres, spreads = [-1.0] * 4, [0.5] * 4
    for ours, theirs in (
        (loss_score(known), loss_score(unknown)),
        (min_k_score(known), min_k_score(unknown)),
        (min_k_plus_plus_score(known, centres, spreads), min_k_plus_plus_score(unknown, centres, spreads)),
        (zlib_score(known, "text"), zlib_score(unknown, "text")),
    ):
        assert ours > theirs


@pytest.mark.parametrize("as_tensor", [torch.float64, torch.float32])
def test_tensors_lists_of_tensors_and_matrices_are_understood(as_tensor: torch.dtype) -> None:
    matrix = torch.tensor([[-1.0, -3.0], [-2.0, -2.5]], dtype=as_tensor)
    expected = [-2.0, -2.25]
    for given_as in (matrix, list(matrix), matrix.tolist()):
        found = loss_score(given_as)
        assert isinstance(found, Tensor)
        assert found.dtype == torch.float64
        assert found.tolist() == expected
    assert loss_score(matrix[0]) == loss_score(list(matrix[0])) == -2.0


def test_a_nan_is_neither_sorted_away_nor_averaged_away() -> None:
    rows = [[-1.0, math.nan, -3.0, -4.0, -5.0], [-1.0, -2.0]]
    fine = [[1.0] * 5, [1.0] * 2]
    for scores in (
        loss_score(rows),
        min_k_score(rows, 0.2),
        min_k_plus_plus_score(rows, fine, fine, 0.2),
        min_k_plus_plus_score([[-1.0] * 5, [-1.0] * 2], rows, fine, 0.2),
        min_k_plus_plus_score([[-1.0] * 5, [-1.0] * 2], fine, [[1.0, math.nan, 1.0, 1.0, 1.0], [1.0, 1.0]], 0.2),
        zlib_score(rows, ["a", "b"]),
    ):
        assert scores.isnan().tolist() == [True, False]
    assert math.isnan(auc([math.nan, 1.0], [0.0]))
    assert math.isnan(auc([1.0], [0.0, math.nan]))
    assert math.isnan(priv_leak(math.nan, 0.5))
    assert math.isnan(priv_leak(0.5, math.nan))


def test_impossible_tokens_are_minus_infinity_and_rank_last() -> None:
    scores = min_k_score([[-math.inf, -1.0], [-1.0, -1.0]], 0.5)
    assert scores.tolist() == [-math.inf, -1.0]
    assert auc(scores[1:], scores[:1]) == 1.0


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [[]],
        [[-1.0], []],
        3.0,
        None,
        "text",
        [["a"]],
        torch.zeros(0),
        torch.zeros(()),
        torch.zeros(2, 2, 2),
        [-1.0, 2.0],
    ],
)
def test_bad_log_probabilities_are_a_value_error(bad: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        loss_score(bad)


def test_losses_in_place_of_log_probabilities_are_refused() -> None:
    for losses in ([0.3, 2.0], [[math.nan], [0.3, 2.0]]):  # a diverged example hides no other
        with pytest.raises(ValueError, match="pass log-probabilities, not losses"):
            min_k_score(losses)
    assert loss_score([1e-3, 0.0]) > 0.0  # half precision rounds to above 0


def test_unlike_shapes_and_shares_are_a_value_error() -> None:
    for call in (
        lambda: min_k_score([-1.0], 0.0),
        lambda: min_k_score([-1.0], 1.5),
        lambda: min_k_score([-1.0], math.nan),
        lambda: min_k_plus_plus_score([-1.0], [-1.0], [1.0], 0.0),
        lambda: min_k_plus_plus_score([-1.0], [-1.0], [1.0], 1.5),
        lambda: min_k_plus_plus_score([[-1.0]], [[-1.0, -1.0]], [[1.0]]),
        lambda: min_k_plus_plus_score([[-1.0]], [[-1.0]], [[-1.0]]),
        lambda: zlib_score([[-1.0]], ["a", "b"]),
        lambda: zlib_score([[-1.0]], "a"),
        lambda: auc([], [1.0]),
        lambda: auc([1.0], [[1.0]]),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


scores_with_ties = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(scores_with_ties, scores_with_ties)
def test_auc_is_the_share_of_duels_won(forget: list[float], holdout: list[float]) -> None:
    found = auc(forget, holdout)
    assert found == pytest.approx(oracles.auc(forget, holdout), rel=1e-14)
    statistic = mannwhitneyu(forget, holdout).statistic
    assert found == pytest.approx(statistic / (len(forget) * len(holdout)), rel=1e-14)
    assert auc(holdout, forget) == pytest.approx(1 - found, abs=1e-14)
    # open-unlearning: losses as scores, the holdout set as the class; the same number.
    losses = [-score for score in forget], [-score for score in holdout]
    assert oracles.open_unlearning_auc(*losses) == pytest.approx(found, abs=1e-12)


def test_auc_of_large_samples_agrees_with_scipy() -> None:
    generator = np.random.default_rng(0)
    forget, holdout = generator.normal(size=3000).round(2), generator.normal(0.2, size=2000).round(2)
    expected = mannwhitneyu(forget, holdout).statistic / forget.size / holdout.size
    assert auc(torch.from_numpy(forget), torch.from_numpy(holdout)) == pytest.approx(expected, rel=1e-12)


def test_auc_does_not_change_under_a_monotone_map_and_ranks_infinity() -> None:
    forget, holdout = [0.1, 0.5, 0.5, 0.9], [0.2, 0.5, 0.7]
    assert auc([math.exp(9 * x) for x in forget], [math.exp(9 * x) for x in holdout]) == auc(forget, holdout)
    assert auc([-math.inf, math.inf], [0.0]) == 0.5


def test_priv_leak_by_hand_and_in_the_direction_of_muse() -> None:
    assert priv_leak(0.5, 0.5) == 0.0
    assert priv_leak(1.0, 0.62) == -100.0
    assert priv_leak(0.0, 0.5) == 100.0
    assert priv_leak(0.25, 0.75) == 200.0
    for area, reference in ((0.1, 0.36), (0.9, 0.36), (2e-5, 0.98)):
        assert priv_leak(area, reference) == pytest.approx(
            oracles.priv_leak_of_muse(1 - area, 1 - reference), rel=1e-12
        )
    # A published open-unlearning row: Min-K AUC .0991, PrivLeak 40.8407; its reference AUC follows.
    reference = 1 - (1 - 0.0991) / 1.408407
    assert priv_leak(0.0991, reference) == pytest.approx(40.8407, abs=1e-6)


@pytest.mark.parametrize(
    ("area", "reference"), [(-0.1, 0.5), (1.1, 0.5), (0.5, -0.1), (0.5, 1.1), (0.5, 1.0), (1.0, 1.0)]
)
def test_impossible_areas_are_a_value_error(area: float, reference: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        priv_leak(area, reference)
