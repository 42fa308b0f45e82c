"""report.md and curves.png, from what a run left in its folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from lightning_modules.outputs import CONFIG, CURVE, EVALUATION, METRICS, SURGERY

_COLUMNS = (
    ("probability", "probability"),
    ("rouge_l_recall", "ROUGE-L recall"),
    ("truth_ratio", "truth ratio"),
    ("nll", "NLL"),
)
_MODELS = ("before", "after", "reference")


def table(metrics: Mapping[str, Any]) -> Table:
    """Forget and retain, before and after, and a model that never saw the forget set, for a terminal."""
    drawn = Table(title="What the model knows", title_style="bold", header_style="bold")
    drawn.add_column("split")
    drawn.add_column("model")
    for _, heading in _COLUMNS:
        drawn.add_column(heading, justify="right")
    drawn.add_column("n", justify="right")
    for split, rows in _cells(metrics):
        for index, row in enumerate(rows):
            drawn.add_row(split if index == 0 else "", *row, end_section=index == len(rows) - 1)
    return drawn


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """What the numbers of `table` mean."""
    said = []
    if metrics["reference"]:
        said.append("The reference stands for a model that never saw the forget set: its row is the value to reach.")
    if quality := metrics["forget_quality"]:
        said.append(
            f"Forget quality: KS statistic {quality['statistic']:.3f}, p = {quality['pvalue']:.2g} "
            f"(log10 p = {quality['log10_pvalue']:.1f}, n = {quality['n']}) between the truth ratios of this model and the reference; "
            "a high p: they cannot be told apart. Compare p at equal n only."
        )
    return said


def draw(folder: Path) -> None:
    """Write report.md and curves.png.

    Raises:
        FileNotFoundError: If the folder holds no finished run.
    """
    if not (folder / METRICS).exists():
        raise FileNotFoundError(
            f"report: expected a finished run, found no {METRICS} in {folder}; give the folder of `gradsurgery unlearn`"
        )
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    surgery, curve = _read(folder / SURGERY), _read(folder / CURVE)
    lines = ["# Unlearning report", ""]
    lines += ["| split | model | " + " | ".join(heading for _, heading in _COLUMNS) + " | n |"]
    lines += ["|---|---|" + "---:|" * (len(_COLUMNS) + 1)]
    lines += [f"| {split} | " + " | ".join(row) + " |" for split, rows in _cells(metrics) for row in rows]
    lines += ["", "Probability, ROUGE and truth ratio are means over examples; NLL in nats a token."]
    lines += [line for sentence in sentences(metrics) for line in ("", sentence)]
    if surgery and curve:
        _plot(folder / "curves.png", curve, surgery, metrics)
        conflicts = sum(float(row["conflict"]) for row in surgery)
        cosine = sum(float(row["cosine"]) for row in surgery) / len(surgery)
        lines += ["", "![Forgetting against retention, and the conflict over the steps](curves.png)", ""]
        lines += [
            f"The forget and the retain gradient conflicted in {conflicts:.0f} of {len(surgery)} steps, with a mean cosine "
            f"of {cosine:+.3f} over all of them. Every step is a row of `{SURGERY}`."
        ]
    lines += _generations(folder / EVALUATION)
    seconds = metrics["seconds"]
    lines += ["", "## How it was made", ""]
    lines += [
        f"Training took {seconds['train']:.1f} s, evaluation {seconds['evaluate']:.1f} s, seed {metrics['seed']}; "
    ]
    lines[-1] += ", ".join(f"{name} {number}" for name, number in metrics["versions"].items()) + "."
    if (folder / CONFIG).exists():
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        lines += ["", "```yaml", yaml.safe_dump(config, sort_keys=False).rstrip(), "```"]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cells(metrics: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    splits = list(metrics["after"])
    return [
        (
            split,
            [
                [key, *(_number(metrics[key][split][column]) for column, _ in _COLUMNS), str(metrics[key][split]["n"])]
                for key in _MODELS
                if metrics[key] and split in metrics[key]
            ],
        )
        for split in splits
    ]


def _number(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.3f}"


def _generations(path: Path, count: int = 3) -> list[str]:
    """A few questions of each split with the answers before and after, side by side."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = ["", "## What it says now"]
    for split in ("forget", "retain"):
        by_model = {
            name: [row for row in rows if row["model"] == name and row["split"] == split]
            for name in ("before", "after")
        }
        if not by_model["after"] or by_model["after"][0]["generation"] is None:
            continue
        lines += ["", f"| {split}: question | answer to {split} | before | after |", "|---|---|---|---|"]
        step = max(1, len(by_model["after"]) // count)
        for index in range(0, min(count * step, len(by_model["after"])), step):
            after = by_model["after"][index]
            before = by_model["before"][index]["generation"] if by_model["before"] else ""
            cells = (after["question"], after["answer"], before, after["generation"])
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return lines


def _cell(text: Any, words: int = 30) -> str:
    """A text on one line of a table, and no longer than is read."""
    found = str(text).replace("|", "\\|").split()
    return " ".join(found[:words]) + (" ..." if len(found) > words else "")


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _plot(
    path: Path, curve: Sequence[Mapping[str, str]], surgery: Sequence[Mapping[str, str]], metrics: Mapping[str, Any]
) -> None:
    from matplotlib.figure import Figure

    forget, retain, calm = "#c2410c", "#1d4ed8", "#9ca3af"
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.set_xlabel("optimizer step")
    steps = [float(point["step"]) for point in curve]
    for split, colour in (("retain", retain), ("forget", forget)):
        values = [float(point[split]) for point in curve]
        left.plot(steps, values, color=colour, lw=2, marker="o", ms=3)
        left.annotate(
            f" {split}", (steps[-1], values[-1]), color=colour, va="center", fontweight="bold", annotation_clip=False
        )
    if metrics["reference"]:
        level = metrics["reference"]["forget"]["probability"]
        left.axhline(level, color=forget, lw=1, ls=":")
        left.annotate("never saw the forget set", (steps[0], level), color=forget, fontsize=8, va="bottom")
    left.set(ylim=(-0.03, 1.05), ylabel="mean answer probability", title="Forgetting against retention")
    left.margins(x=0.02)
    x = [float(row["step"]) for row in surgery]
    cosine = [float(row["cosine"]) for row in surgery]
    right.bar(x, cosine, color=[forget if value < 0 else calm for value in cosine], width=0.8)
    right.axhline(0, color="black", lw=0.8)
    conflicts = sum(float(row["conflict"]) for row in surgery)
    right.set(
        ylabel="cosine of forget and retain gradient", title=f"Conflict in {conflicts:.0f} of {len(surgery)} steps"
    )
    figure.savefig(path, dpi=150)
