"""Model utility in the reports and for a terminal: shown where a model has it, and nothing where none has."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_modules.metrics.functional import UTILITY_NAMES
from lightning_modules.report.terminal import sentences, tables
from lightning_modules.report.utility import utility_explained, utility_rows
from lightning_modules.run.report import draw
from tests.lightning_modules.report.reports import Page, make, read_metrics

NAMES = [f"{split}: {metric}" for split in ("retain", "real_authors", "world_facts") for metric in ("probability", "ROUGE-L recall", "truth ratio")]  # fmt: skip


def utilities(**models: float | str | None) -> dict[str, Any]:
    """Entries of metrics.json; the inputs are different numbers, none of them the utility."""
    draw = random.Random(0)
    inputs = {
        model: None if value is None else {name: draw.uniform(0.1, 0.9) for name in UTILITY_NAMES}
        for model, value in models.items()
    }
    return {"model_utility": models, "model_utility_inputs": inputs}


def rendered(metrics: dict[str, Any], width: int = 200) -> str:
    console = Console(width=width, record=True, stderr=True)
    with console.capture() as capture:
        console.print(*tables(metrics, width))
        console.print(*sentences(metrics))
    return capture.get()


def test_every_view_has_the_utility_and_its_nine_inputs(tmp_path: Path) -> None:
    made = make(tmp_path, **utilities(before=0.62271, after=0.58593, reference=0.61372))
    draw(made)
    metrics = read_metrics(made)
    page = Page((made / "report.html").read_text(encoding="utf-8"))
    text, terminal = (made / "report.md").read_text(encoding="utf-8"), rendered(metrics)
    assert not page.open
    rows = utility_rows(metrics)
    assert [row.name for row in rows] == ["model utility", *NAMES]
    inputs = metrics["model_utility_inputs"]
    for row, name in zip(rows[1:], UTILITY_NAMES, strict=True):
        assert row[1:] == tuple(inputs[model][name] for model in ("before", "after", "reference"))
    for name, *values in rows:
        cells = [f"{value:.3f}" for value in values]
        assert f"| {name.replace('_', chr(92) + '_')} | {' | '.join(cells)} |" in text
        assert "".join([name, *cells]).replace(" ", "") in page.words().replace(" ", "")
        line = next(line for line in terminal.splitlines() if line.startswith(f"│ {name} "))
        assert [cell.strip() for cell in line.strip("│").split("│")][1:] == cells
    (said,) = utility_explained(metrics)
    for everything in (page.words(), text.replace("\\", ""), " ".join(terminal.split())):
        assert everything.count(said) == 1
    assert "the answer's share among the options" in said


def test_a_model_without_it_has_a_dash_and_no_column_in_the_terminal(tmp_path: Path) -> None:
    made = make(tmp_path, **utilities(before=None, after=0.5, reference="NaN"))
    draw(made)
    assert "| model utility | - | 0.500 | NaN |" in (made / "report.md").read_text()
    drawn = tables(read_metrics(made), 200)[-1]
    assert [column.header for column in drawn.columns] == ["mean", "after", "reference"]


@pytest.mark.parametrize("none", [{}, {"model_utility": None}, utilities(before=None, after=None, reference=None)])
def test_no_utility_no_table(tmp_path: Path, none: dict[str, Any]) -> None:
    made = make(tmp_path, **none)
    draw(made)
    metrics = read_metrics(made)
    assert utility_rows(metrics) == utility_explained(metrics) == []
    for said in ((made / "report.html").read_text(), (made / "report.md").read_text(), rendered(metrics)):
        assert "tility" not in said


@pytest.mark.parametrize("width", [80, 100])
def test_no_name_is_cut_in_a_terminal(tmp_path: Path, width: int) -> None:
    found = rendered(read_metrics(make(tmp_path, **utilities(before=0.1, after=0.2, reference=0.3))), width)
    assert all(name in found for name in NAMES)
    assert max(map(len, found.splitlines())) <= width
