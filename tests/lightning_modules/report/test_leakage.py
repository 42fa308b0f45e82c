"""Reproduced text and membership inference in the report: shown where measured, and nothing where not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_modules import folder as outputs
from lightning_modules.report import mean_interval, table
from lightning_modules.report.finished import COLUMNS, MEMORY, SCORES, columns, read
from lightning_modules.report.leakage import Attack, explained, membership, percent
from lightning_modules.report.over_seeds import scores_over_seeds
from lightning_modules.report.terminal import sentences, tables
from lightning_modules.run.report import draw
from tests.lightning_modules.report.reports import Page, make, make_seed, read_metrics, read_seeds, write_rows

NEW = {"exact_memorization": "exact memorization", "extraction_strength": "extraction strength"}


def measured(folder: Path, names: tuple[str, ...] = tuple(NEW)) -> Path:
    """A run whose examples have the new scores."""
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    for row in rows:
        for power, name in enumerate(names, start=2):
            row[name] = row["probability"] ** power
    write_rows(folder, rows)
    return folder


def rendered(drawn: list[Any]) -> str:
    console = Console(width=200, record=True, stderr=True)
    with console.capture() as capture:
        console.print(*drawn)
    return capture.get()


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
        assert said.count("lower means that less is reproduced") == 2


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
    text = rendered([table(read_metrics(old))])
    assert rendered([table(read_metrics(new))]) == text
    assert "memorization" not in text
    assert "memorization" in rendered([table(read_metrics(new), SCORES)])  # what a table of everything would look like


def test_every_view_has_the_same_headings(tmp_path: Path) -> None:
    made = measured(make(tmp_path))
    drawn = tables(read_metrics(made), 80)
    assert [str(column.header).replace("\n", " ") for column in drawn[1].columns] == [
        "split",
        "model",
        *NEW.values(),
        "n",
    ]
    assert dict(MEMORY) == NEW
    assert columns(read(made)) == SCORES


def test_the_spread_over_seeds_has_them_and_counts_older_runs(tmp_path: Path) -> None:
    made = [measured(make_seed(tmp_path / str(seed), seed)) for seed in (0, 1)] + [make_seed(tmp_path / "2", 2)]
    counts = {row.heading: row.n for row in scores_over_seeds(read_seeds(made[0], made[1:]))}
    assert counts["exact memorization"] == counts["extraction strength"] == 2
    assert counts["NLL"] == 3
    assert not set(NEW.values()) & {row.heading for row in scores_over_seeds(read_seeds(made[2], made[:2]))}


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
        assert "1 if it always does, 0.5 if it cannot tell them apart" in said
        assert "0 is best, below 0 the forget set is still remembered" in said
    assert not page.open


LEFT = {"loss": attack(0.9, 0.75, None, None), "zlib": attack(0.9, 0.75, None, None)}
ALL = {"loss": attack(0.9, 0.75, 0.75, -0.04), "zlib": attack("NaN", "NaN", 0.5, "NaN")}
PERFECT = {"<b>z|lib</b>": attack(0.9, 0.75, 1.0, None), "loss": attack(0.9, 0.75, 0.5, -50.0)}


@pytest.mark.parametrize(
    ("attacks", "more", "said", "not_said"),
    [
        (LEFT, {"reference": None}, ["0.5 need not be the goal", "needs the AUCs of a reference, and there is none."], ["reference's", "PrivLeak is how far"]),
        (LEFT, {}, ["0.5 need not be the goal", "and its log has no scores of a holdout."], ["the goal is the reference's", "PrivLeak is how far"]),
        (ALL, {}, ["the goal is the reference's AUC, not 0.5", "PrivLeak is how far"], ["not computed", "not defined", "need not"]),
        (PERFECT, {}, ["the goal is the reference's AUC", "PrivLeak is how far", "not defined for <b>z|lib</b>: "], ["not computed"]),
    ],
)  # fmt: skip
def test_attacks_are_explained_once_and_alike_everywhere(
    tmp_path: Path, attacks: dict[str, Any], more: dict[str, Any], said: list[str], not_said: list[str]
) -> None:
    made = make(tmp_path, membership=attacks, **more)
    page, metrics = page_of(made), read_metrics(made)
    text = " ".join(explained(metrics))
    for part in said:
        assert part in text
    for part in not_said:
        assert part not in text
    assert sentences(metrics)[-len(explained(metrics)) :] == explained(metrics)
    markdown = (made / "report.md").read_text()
    assert "<b>" not in markdown
    assert "b" not in {tag for tag, _ in page.tags}
    plain = markdown.replace("&lt;", "<").replace("&gt;", ">").replace("\\", "")
    for everything in (page.words(), " ".join(plain.split()), " ".join(sentences(metrics))):
        assert everything.count(text) == 1
        assert everything.count("An attack's AUC is") + everything.count("an attack's AUC is") == 1


def test_the_terminal_formats_privleak_as_the_reports_do(tmp_path: Path) -> None:
    made = make(tmp_path, membership=ALL)
    cells = [percent(entry.privleak) for entry in membership(read_metrics(made))]
    assert cells == ["+0.0 %", "NaN"]
    drawn = tables(read_metrics(made), 120)[-1]
    assert list(drawn.columns[-1].cells) == cells
    for said in (page_of(made).words(), (made / "report.md").read_text(), rendered([drawn])):
        assert "+0.0 %" in said
        assert "-0.0 %" not in said
        assert "nan" not in said


@pytest.mark.parametrize("none", [{}, {"membership": None}, {"membership": {}}])
def test_no_attacks_no_table(tmp_path: Path, none: dict[str, Any]) -> None:
    made = make(tmp_path, **none)
    assert membership(read_metrics(made)) == explained(read_metrics(made)) == []
    assert "PrivLeak" not in page_of(made).words() + (made / "report.md").read_text()


def test_an_attack_keeps_its_numbers(tmp_path: Path) -> None:
    made = make(tmp_path, membership={"loss": {"auc": 0.25}, "zlib": attack(1.0, 0.5, 0.625, 0.0)})
    assert membership(read_metrics(made)) == [
        Attack("loss", None, 0.25, None, None),
        Attack("zlib", 1.0, 0.5, 0.625, 0.0),
    ]
    shown = {0.0: "+0.0 %", 100.0: "+100.0 %", -0.04: "+0.0 %", None: "-", math.nan: "NaN"}
    assert [percent(value) for value in shown] == list(shown.values())
