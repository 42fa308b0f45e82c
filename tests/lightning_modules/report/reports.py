"""Folders of finished runs whose numbers are known, and a reader of pages."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_modules import folder as outputs
from lightning_modules.report import seeds
from lightning_modules.report.finished import FinishedRun
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.report import defaults

VOID = {"meta", "use", "img"}


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())


def scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: fmean(row[name] for row in rows) for name in ("probability", "rouge_l_recall", "truth_ratio", "nll")
    } | {"n": len(rows)}


def example(split: str, index: int, model: str, said: str) -> dict[str, Any]:
    """Scores that differ between examples and models, and have no round means."""
    level = {
        "before": 0.01,
        "after": 1.9 if split == "forget" else 0.1,
        "reference": 2.0 if split == "forget" else 0.02,
    }
    nll = level[model] * (1.0 + math.sin(1.0 + index) / 2.0)
    own = {"question": f"{split} question {index}?", "answer": f"Answer {index}.", "generation": said}
    return own | {"nll": nll, "probability": math.exp(-nll), "rouge_l_recall": 1 / (1 + nll), "truth_ratio": nll / 5}


def make(folder: Path, said: Callable[[str, str, int], str] = lambda m, s, i: f"{m} says {s} {i}", **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"forget": 40, "retain": 30}
    rows = {
        model: {
            split: [example(split, index, model, said(model, split, index)) for index in range(count)]
            for split, count in counts.items()
        }
        for model in ("before", "after", "reference")
    }
    metrics: dict[str, Any] = {
        **{model: {split: scores(entries) for split, entries in splits.items()} for model, splits in rows.items()},
        "forget_quality": {"statistic": 0.25, "pvalue": 0.03, "log10_pvalue": -1.52, "n": 40},
        "seconds": {"train": 12.34, "evaluate": 5.0},
        "seed": 7,
        "versions": {"torch": "2.13"},
    }
    outputs.write_json(folder / "metrics.json", metrics | more)
    outputs.write_evaluation(folder / "evaluation.jsonl", rows)
    with (folder / "surgery.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = ("forget", "retain")
        head = ["step", *(f"norm_{n}" for n in names), "cosine", *(f"coefficient_{n}" for n in names), "conflict"]
        writer.writerow([*head, "actual_change_retain"])
        for step in range(1, 11):
            cosine = -0.5 if step > 3 else 0.25
            writer.writerow([step, 4.0, 0.5, cosine, 0.25, 2.0, float(cosine < 0), 0.1 if step > 8 else -0.1])
    points = [{"step": step, "forget": 1 - step / 10, "retain": 1 - step / 50} for step in range(11)]
    with (folder / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "forget", "retain"])
        writer.writeheader()
        writer.writerows(points)
    outputs.write_config(folder, "unlearn", UnlearnOptions.of(output="somewhere", rule="pcgrad").resolved().recorded())
    return folder


def make_seed(folder: Path, seed: int, *, points: int = 11, **options: Any) -> Path:
    """The same run with another seed: every NLL is a little larger, the last points of the curve are missing."""
    make(folder)
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    for row in rows:
        row["nll"] *= 1.0 + seed**2 / 100.0
        row |= {"probability": math.exp(-row["nll"]), "rouge_l_recall": 1 / (1 + row["nll"])}
    write_rows(folder, rows)
    metrics = json.loads((folder / "metrics.json").read_text())
    outputs.write_json(folder / "metrics.json", metrics | {"seed": seed})
    head, *lines = (folder / "curve.csv").read_text().splitlines()
    (folder / "curve.csv").write_text("\n".join([head, *lines[:points]]))
    chosen = UnlearnOptions.of(**{"output": str(folder), "seed": seed, **options})
    outputs.write_config(folder, "unlearn", chosen.resolved().recorded())
    return folder


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The log, and the means of every number in it."""
    means: dict[str, dict[str, Any]] = {}
    for model in ("before", "after", "reference"):
        for split in ("forget", "retain"):
            own = [row for row in rows if (row["model"], row["split"]) == (model, split)]
            names = [name for name, value in own[0].items() if isinstance(value, float)]
            means.setdefault(model, {})[split] = {n: fmean(row[n] for row in own) for n in names} | {"n": len(own)}
    metrics = json.loads((folder / "metrics.json").read_text())
    outputs.write_json(folder / "metrics.json", metrics | means)
    (folder / "evaluation.jsonl").write_text("\n".join(map(json.dumps, rows)))


def read_seeds(folder: Path, others: Sequence[Path]) -> FinishedRun:
    """As `run.report.draw` reads them, with the options' defaults."""
    return seeds.read_seeds(folder, others, defaults().plain)


def read_metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())
