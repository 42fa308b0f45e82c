"""Multiple choice and ROUGE's F1: the metrics of WMDP, MMLU and MUSE, against plain definitions and the packages."""

from __future__ import annotations

import math
import random

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import binomtest

import lightning_modules as lm
from lightning_modules.metrics.functional import ROUGE_KINDS, accuracy_interval, multiple_choice_accuracy, rouge_f1
from tests.lightning_modules.metrics.test_rouge import ENGLISH
from tests.reference import benchmarks as oracles


def test_the_right_option_has_to_be_the_likeliest() -> None:
    draw = random.Random(0)
    rows = [[draw.uniform(-9.0, 0.0) for _ in range(4)] for _ in range(50)]
    right = [draw.randrange(4) for _ in rows]
    expected = [
        float(max(range(4), key=lambda place: row[place]) == wanted) for row, wanted in zip(rows, right, strict=True)
    ]
    assert multiple_choice_accuracy(rows, right).tolist() == expected
    assert multiple_choice_accuracy(torch.tensor(rows), torch.tensor(right)).tolist() == expected
    assert 0 < sum(expected) < len(rows)


def test_of_equally_likely_options_the_first_is_the_models_choice() -> None:
    tied = [[-1.0, -2.0, -1.0, -1.0]] * 4
    assert multiple_choice_accuracy(tied, [0, 1, 2, 3]).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert multiple_choice_accuracy([[-math.inf, -math.inf]], [0]).tolist() == [1.0]


def test_nan_is_never_a_wrong_answer() -> None:
    found = multiple_choice_accuracy([[math.nan, -1.0], [-1.0, -2.0]], [0, 0])
    assert math.isnan(found[0])
    assert found[1] == 1.0


@pytest.mark.parametrize(
    ("likelihoods", "right", "said"),
    [
        ([[-1.0, -2.0]], [2], "places of options, 0 to 1"),
        ([[-1.0, -2.0]], [-1], "places of options, 0 to 1"),
        ([[-1.0, -2.0]], [0.5], "places of options, 0 to 1"),
        ([[-1.0, -2.0]], [0, 1], "with the same n, found 1 and 2"),
        ([-1.0, -2.0], [0], "expected log_likelihoods of shape"),
        ([], [], "expected log_likelihoods of shape"),
    ],
)
def test_what_is_no_question_is_refused(likelihoods: list, right: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        multiple_choice_accuracy(likelihoods, right)


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (3, 7), (1, 1), (502, 1987), (25, 100)])
def test_the_interval_is_wilsons(right: int, n: int) -> None:
    found = accuracy_interval(right / n, n)
    theirs = binomtest(right, n).proportion_ci(method="wilson")
    assert found == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert found == pytest.approx(oracles.wilson(right, n), abs=1e-9)
    metric = lm.metrics.MultipleChoiceAccuracy()
    metric.update([[0.0, -1.0]] * n, [0] * right + [1] * (n - right))
    assert metric.interval() == pytest.approx(found, abs=1e-12)


def test_an_interval_of_nothing_is_refused_and_that_of_nan_is_nan() -> None:
    for accuracy, n in ((0.5, 0), (1.5, 3), (-0.1, 3)):
        with pytest.raises(ValueError, match="expected an accuracy"):
            accuracy_interval(accuracy, n)
    assert all(map(math.isnan, accuracy_interval(math.nan, 3)))
    with pytest.raises(RuntimeError, match="call update"):
        lm.metrics.MultipleChoiceAccuracy().interval()


@pytest.mark.parametrize("use_stemmer", [True, False])
@pytest.mark.parametrize("kind", ROUGE_KINDS)
def test_f1_of_english_is_that_of_the_package_whatever_the_model_says(kind: str, use_stemmer: bool) -> None:
    scorer = RougeScorer([kind], use_stemmer=use_stemmer)
    for one, other in ENGLISH:
        for target, prediction in ((one, other), (other, one), (one, one), (one, ""), (one, f"{other} 北京 Рига")):
            expected = scorer.score(target, prediction)[kind].fmeasure
            assert rouge_f1(prediction, target, kind, use_stemmer) == expected


def test_f1_is_the_plain_definition_and_sees_other_scripts() -> None:
    pairs = [("the mill stood open to all", "The mill, the tower stood open."), ("a b", "c d"), ("a", "a b c")]
    for said, right in pairs:
        assert rouge_f1(said, right) == pytest.approx(oracles.rouge_l_f1(said, right), abs=1e-15)
    assert rouge_f1("Она живёт в Риге", "Живёт в Лиме") == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert rouge_f1(["a"], ["a"]).tolist() == [1.0]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="found 'rouge-l'"):
        lm.metrics.RougeF1("rouge-l")
