"""Differences between models in the report: of the same examples, pair by pair."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest

from lightning_modules.report import mean_interval
from lightning_modules.report.findings import differences
from lightning_modules.report.finished import FinishedRun

KNOWN = {
    "before": {"forget": [0.9, 0.7, 0.8], "retain": [0.5, 0.6]},
    "after": {"forget": [0.1, 0.4, 0.1], "retain": [0.45, 0.3]},
    "reference": {"forget": [0.2, 0.1, 0.3], "retain": [0.5, 0.4]},
}


def finished() -> FinishedRun:
    examples: dict[str, Any] = {
        model: {
            split: [{"question": f"{split} {n}?", "answer": f"{n}.", "probability": p} for n, p in enumerate(values)]
            for split, values in splits.items()
        }
        for model, splits in KNOWN.items()
    }
    return FinishedRun({}, examples=examples)


def test_a_difference_is_the_mean_over_pairs_of_after_minus_the_other() -> None:
    found = {difference.label: difference for difference in differences(finished())}
    for label, split, other in (
        ("forget probability, after minus reference", "forget", "reference"),
        ("forget probability, after minus before", "forget", "before"),
        ("retain probability, after minus before", "retain", "before"),
    ):
        values = [ours - theirs for ours, theirs in zip(KNOWN["after"][split], KNOWN[other][split], strict=True)]
        assert found.pop(label)[1:] == (pytest.approx(fmean(values)), mean_interval(values))
    assert not found


@pytest.mark.parametrize("change", [{"question": "another?"}, {"answer": "another."}, {"probability": None}])
def test_other_examples_and_those_without_a_score_have_no_difference(change: dict[str, Any]) -> None:
    run = finished()
    run.examples["reference"]["forget"][1] |= change
    assert [difference.label for difference in differences(run)] == [
        "forget probability, after minus before",
        "retain probability, after minus before",
    ]
    run.examples["reference"]["forget"].reverse()
    assert len(differences(run)) == 2
