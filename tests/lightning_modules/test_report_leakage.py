"""Reproduced text and membership inference in the report: shown where measured, and nothing where not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_modules import outputs
from lightning_modules.report import draw, mean_interval, table
from lightning_modules.report.leakage import Attack, membership, percent
from lightning_modules.report.run import COLUMNS, columns, read
from lightning_modules.report.seeds import read_seeds
from lightning_modules.report.spread import spreads
from tests.lightning_modules.reports import Page, make, make_seed, read_metrics, write_rows

NEW = {"exact_memorization": "exact memorization", "extraction_strength": "extraction strength"}


def measured(folder: Path, names: tuple[str, ...] = tuple(NEW)) -> Path:
    """A run whose examples have the new scores."""
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    for row in rows:
        for power, name in enumerate(names, start=2):
            row[name] = row["probability"] ** power
    write_rows(folder, rows)
    return folder


def page_of(folder: Path) -> Page:
    draw(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_they_are_rows_with_intervals_like_the_others(tmp_path: Path) -> None:
    made = measured(make(tmp_path))
    words, text = page_of(made).words(), (made / "report.md").read_text()
    rows = [json.loads(line) for line in (made / "evaluation.jsonl").read_text().splitlines()]
    for name, heading in NEW.items():
        assert heading in words
        assert heading in text.splitlines()[next(i for i, line in enumerate(text.splitlines()) if "| split |" in line)]
        for model in ("before", "after", "reference"):
            for split in ("forget", "retain"):
                values = [row[name] for row in rows if (row["model"], row["split"]) == (model, split)]
                low, high, _ = mean_interval(values)
                mean = read_metrics(made)[model][split][name]
                assert low < mean < high
                for said in (words, text):
                    assert f"{mean:.3f} [{low:.3f}, {high:.3f}]" in said
    for said in (words, text):
        assert said.count("lower is better on forget, where 0 means that nothing of the answer is reproduced") == 2


def test_a_run_without_them_has_no_rows_for_them(tmp_path: Path) -> None:
    made = make(tmp_path)
    words, text = page_of(made).words(), (made / "report.md").read_text()
    for said in (words, text):
        for word in ("memorization", "extraction", "AUC", "PrivLeak", "attack"):
            assert word not in said
    assert columns(read(made)) == COLUMNS


def test_only_what_was_measured_is_shown(tmp_path: Path) -> None:
    made = measured(make(tmp_path), ("extraction_strength",))
    metrics = read_metrics(made)
    for model in ("before", "reference"):
        for scores in metrics[model].values():
            scores["extraction_strength"] = None  # of a log that is older than the score
    for scores in metrics["after"].values():
        scores["exact_memorization"] = None
    outputs.write_json(made / "metrics.json", metrics)
    words, text = page_of(made).words(), (made / "report.md").read_text()
    assert [name for name, _ in columns(read(made))] == [*dict(COLUMNS), "extraction_strength"]
    for said in (words, text):
        assert "Extraction strength is the share" in said
        assert "Exact memorization is the share" not in said


def test_a_terminal_table_does_not_depend_on_them(tmp_path: Path) -> None:
    old, new = make(tmp_path / "old"), measured(make(tmp_path / "new"))
    assert table(read_metrics(old)).row_count == table(read_metrics(new)).row_count == 6


def test_the_spread_over_seeds_has_them_and_counts_older_runs(tmp_path: Path) -> None:
    made = [measured(make_seed(tmp_path / str(seed), seed)) for seed in (0, 1)] + [make_seed(tmp_path / "2", 2)]
    counts = {row.heading: row.n for row in spreads(read_seeds(made[0], made[1:]))}
    assert counts["exact memorization"] == counts["extraction strength"] == 2
    assert counts["NLL"] == 3
    assert not set(NEW.values()) & {row.heading for row in spreads(read_seeds(made[2], made[:2]))}


def attack(before: Any, after: Any, reference: Any, privleak: Any) -> dict[str, Any]:
    return {"auc": after, "privleak": privleak, "before_auc": before, "reference_auc": reference}


def test_attacks_are_a_table_of_metrics_json(tmp_path: Path) -> None:
    attacks = {
        "loss": attack(0.9375, 0.3125, 0.2625, -12.34),
        "min_k": attack(None, 0.75, None, None),
        "<b>z|lib</b>": attack("NaN", "NaN", 0.5, "NaN"),
    }
    made = make(tmp_path, membership=attacks)
    page, text = page_of(made), (made / "report.md").read_text()
    flat = page.words().replace(" ", "")
    for row in ("loss0.9380.3120.263-12.3%", "Min-K-0.750--", "<b>z|lib</b>NaNNaN0.500NaN"):
        assert row in flat
    assert "| loss | 0.938 | 0.312 | 0.263 | -12.3 % |" in text
    assert "| Min-K | - | 0.750 | - | - |" in text
    assert "<b>" not in text
    assert "b" not in {tag for tag, _ in page.tags}
    for said in (page.words(), text):
        assert "1 if it always does, .5 if it cannot tell them apart" in said
        assert "0 is best, and below 0 the forget set is still remembered" in said
    assert not page.open


@pytest.mark.parametrize("none", [{}, {"membership": None}, {"membership": {}}])
def test_no_attacks_no_table(tmp_path: Path, none: dict[str, Any]) -> None:
    made = make(tmp_path, **none)
    assert membership(read(made)) == []
    assert "PrivLeak" not in page_of(made).words() + (made / "report.md").read_text()


def test_an_attack_keeps_its_numbers(tmp_path: Path) -> None:
    made = make(tmp_path, membership={"loss": {"auc": 0.25}, "zlib": attack(1.0, 0.5, 0.625, 0.0)})
    assert membership(read(made)) == [Attack("loss", None, 0.25, None, None), Attack("zlib", 1.0, 0.5, 0.625, 0.0)]
    shown = {0.0: "+0.0 %", 100.0: "+100.0 %", -0.04: "+0.0 %", None: "-", math.nan: "NaN"}
    assert [percent(value) for value in shown] == list(shown.values())
