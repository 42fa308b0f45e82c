"""Differences between models in the report: of the same examples, pair by pair; and what a diverged probe leaves of it."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from lightning_modules import folder as outputs
from lightning_modules.report import mean_interval
from lightning_modules.report.findings import differences
from lightning_modules.report.finished import FinishedRun
from lightning_modules.run.report import draw
from tests.lightning_modules.report.reports import make

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


def test_a_relearning_that_diverged_leaves_a_report(tmp_path: Path) -> None:
    made = make(tmp_path)
    points = [{"step": step, "rest": rest, "taught": rest} for step, rest in ((0, 0.1), (20, math.nan))]
    probe = {"taught": 1, "rest": 3, "steps": 20, "lr": 1e-4, "points": points}
    outputs.write_json(made / "probes.json", {"relearn": {"model": probe, "control": None}})
    draw(made)
    assert "nan" in (made / "report.html").read_text()
