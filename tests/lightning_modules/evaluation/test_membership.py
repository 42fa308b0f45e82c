"""The membership section: attacks against slow oracles, what is None and why, and how a terminal shows it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_modules.evaluation.membership import ATTACKS, attack_aucs, membership
from lightning_modules.report.terminal import sentences, tables
from lightning_modules.run.loading import read_splits
from lightning_modules.run.options import EvaluateOptions
from tests.reference import metrics as oracles

Examples = dict[str, list[dict[str, Any]]]


def examples(shift: float, seed: int = 0, forget: int = 7, holdout: int = 5) -> Examples:
    """Scores with ties, those of the forget set higher by `shift`."""
    draw = random.Random(seed)

    def rows(count: int, by: float) -> list[dict[str, float]]:
        return [{f"{attack}_score": round(draw.gauss(by, 1.0), 1) for attack in ATTACKS} for _ in range(count)]

    return {"forget": rows(forget, shift), "retain": rows(3, 0.0), "holdout": rows(holdout, 0.0)}


def test_every_auc_is_the_share_of_duels_and_privleak_that_of_muse() -> None:
    before, after, reference = examples(3.0), examples(1.0, 1), examples(0.2, 2, forget=6)
    found = membership(before, after, reference)
    assert found is not None
    assert set(found) == {"loss", "min_k", "min_k_plus_plus", "zlib"}
    for attack, entry in found.items():
        areas = [
            oracles.auc(*([row[f"{attack}_score"] for row in rows[split]] for split in ("forget", "holdout")))
            for rows in (before, after, reference)
        ]
        assert [entry["before_auc"], entry["auc"], entry["reference_auc"]] == pytest.approx(areas, rel=1e-12)
        # MUSE's AUC is 1 - ours.
        expected = oracles.priv_leak_of_muse(1 - areas[1], 1 - areas[2])
        assert entry["privleak"] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def without(split: str) -> Callable[[Examples], Examples]:
    return lambda rows: {name: entries for name, entries in rows.items() if name != split}


def old(rows: Examples) -> Examples:
    """One row is of an earlier version."""
    return {**rows, "holdout": [{"nll": 1.0}, *rows["holdout"]]}


@pytest.mark.parametrize("less", [without("holdout"), without("forget"), old, lambda rows: {**rows, "holdout": []}])
def test_without_two_sets_to_tell_apart_there_is_no_section(less: Callable[[Examples], Examples]) -> None:
    whole = examples(1.0)
    assert attack_aucs(less(whole)) is None
    assert membership(whole, less(whole), whole) is None
    entry = membership(less(whole), whole, less(whole))["loss"]
    assert entry == {"auc": entry["auc"], "privleak": None, "before_auc": None, "reference_auc": None}
    assert 0.0 <= entry["auc"] <= 1.0


def test_a_reference_that_tells_them_apart_perfectly_leaves_privleak_undefined() -> None:
    entry = membership(None, examples(1.0), examples(100.0))["min_k"]
    assert entry["reference_auc"] == 1.0
    assert entry["privleak"] is None


def test_nan_stays_nan() -> None:
    broken = examples(1.0)
    broken["forget"][3]["zlib_score"] = math.nan
    found = membership(None, broken, examples(0.0))
    assert math.isnan(found["zlib"]["auc"])
    assert math.isnan(found["zlib"]["privleak"])
    assert not math.isnan(found["loss"]["privleak"])


# ---- the terminal


def metrics(memory: bool = True, reference: bool = True, section: Any = None) -> dict[str, Any]:
    scores = {"probability": 0.5, "rouge_l_recall": 0.25, "truth_ratio": 1.2e-5, "nll": 7.37, "n": 400}
    found = {**scores, "exact_memorization": 0.625, "extraction_strength": 0.125} if memory else scores
    splits = dict.fromkeys(("forget", "retain", "real_authors"), found)
    return {"before": splits, "after": splits, "reference": splits if reference else None,
            "forget_quality": None, "membership": section}  # fmt: skip


def shown(found: dict[str, Any], width: int) -> tuple[str, int]:
    console = Console(width=width, record=True, file=None, quiet=False, stderr=True)
    drawn = tables(found, width)
    with console.capture() as capture:
        for table in drawn:
            console.print(table)
    return capture.get(), len(drawn)


@pytest.mark.parametrize(("width", "count"), [(80, 2), (100, 2), (120, 1)])
def test_no_number_is_cut_at_any_usual_width(width: int, count: int) -> None:
    text, drawn = shown(metrics(), width)
    assert drawn == count
    assert max(map(len, text.splitlines())) <= width
    assert text.count("0.625") == 9
    assert text.count("0.125") == 9
    assert text.count("1.2e-05") == 9
    assert text.count("7.370") == 9
    assert "…" not in text


def test_what_nobody_measured_has_no_column_and_old_metrics_are_drawn_as_ever() -> None:
    text, drawn = shown({key: value for key, value in metrics(memory=False).items() if key != "membership"}, 120)
    assert drawn == 1
    assert "memorization" not in text
    half = metrics()
    for model in ("before", "after", "reference"):
        half[model] = {split: {**scores, "extraction_strength": None} for split, scores in half[model].items()}
    assert "memorization" in shown(half, 120)[0]
    assert "strength" not in shown(half, 120)[0]
    assert sentences(metrics(memory=False)) == sentences(metrics(memory=False))[:1]


def test_attacks_have_a_table_and_a_sentence_for_everything_that_is_missing() -> None:
    section = membership(examples(3.0), examples(1.0, 1), examples(0.2, 2))
    text, drawn = shown(metrics(section=section), 120)
    assert drawn == 2
    for entry in section.values():
        assert f"{entry['auc']:.3f}" in text
        assert f"{entry['privleak']:+.1f} %" in text
    assert not any(
        "not computed" in sentence or "not defined" in sentence for sentence in sentences(metrics(section=section))
    )
    for reference, why in ((True, "no scores of a holdout"), (False, "there is none")):
        alone = metrics(reference=reference, section=membership(None, examples(1.0), None))
        assert "PrivLeak" not in shown(alone, 120)[0]
        assert sum(f"PrivLeak is not computed: it needs the AUCs of a reference, and {why}" in sentence.replace("its log has ", "")
                   for sentence in sentences(alone)) == 1  # fmt: skip
    perfect = metrics(section=membership(None, examples(1.0), examples(100.0)))
    assert (
        sum("PrivLeak is not defined for loss, Min-K, Min-K++, zlib" in sentence for sentence in sentences(perfect))
        == 1
    )


def test_a_log_of_an_earlier_version_is_said_to_lack_scores() -> None:
    found = metrics()
    found["reference"] = metrics(memory=False)["reference"]
    assert any("reference's log has no" in sentence for sentence in sentences(found))
    assert not any("reference's log" in sentence for sentence in sentences(metrics()))


def test_a_holdout_of_tofu_is_known_by_its_name(tmp_path: Path) -> None:
    for name in ("forget01", "retain99", "holdout10", "mine"):
        row = {"question": f"Who of {name}?", "answer": "Nobody."}
        (tmp_path / f"{name}.json").write_text(json.dumps(row) + "\n")
    options = EvaluateOptions.of(model="some/model", tofu="forget01", tofu_dir=str(tmp_path))
    for holdout, question in (("holdout10", "Who of holdout10?"), (str(tmp_path / "mine.json"), "Who of mine?")):
        splits = read_splits(options.but(holdout=holdout))
        assert list(splits) == ["forget", "retain", "holdout"]
        assert [row["question"] for row in splits["holdout"]] == [question]
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "holdout05.json")):
        read_splits(options.but(holdout="holdout05"))
    with pytest.raises(ValueError, match="1 of 1 that are in retain too"):
        read_splits(options.but(holdout="retain99"))
    files = {"forget": str(tmp_path / "forget01.json"), "retain": str(tmp_path / "retain99.json")}
    with pytest.raises(FileNotFoundError, match="a file of examples at holdout10"):  # of which data set?
        read_splits(EvaluateOptions.of(**files, holdout="holdout10"))
