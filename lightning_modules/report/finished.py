"""Reads the files that a run left in its folder, those that are there."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.data.files import read_json
from lightning_modules.folder import CONFIG, CURVE, EVALUATION, METRICS, PROBES, SURGERY, TRAINING
from lightning_modules.report.shape import MODELS, check_metrics

COLUMNS = (
    ("probability", "probability"),
    ("rouge_l_recall", "ROUGE-L recall"),
    ("truth_ratio", "truth ratio"),
    ("nll", "NLL"),
)
MEMORY = (("exact_memorization", "exact memorization"), ("extraction_strength", "extraction strength"))
SCORES = (*COLUMNS, *MEMORY)
ScoredExamples = list[dict[str, Any]]
"""Those of one model and one split."""


@dataclass
class FinishedRun:
    """A finished run.

    Attributes:
        metrics: metrics.json.
        surgery: surgery.csv, one row for each step.
        curve: curve.csv, one row for each point.
        examples: evaluation.jsonl as model -> split -> rows, with scores as numbers.
        config: config.yaml.
        training: training.json, what the run found out while training: "best", "target", "learning_rate", "radius",
            "chosen", and "collapse" if it happened.
        probes: probes.json: an entry for each probe that was run (`lightning_modules.probes`).
        others: Runs of the same configuration with other seeds, in the order of their seeds.
        changed: Flag -> value of the options that are not the default; None if the defaults are not known.
        missing: For each file that is missing or cannot be read, a sentence that says what the report lacks without it.
    """

    metrics: Mapping[str, Any]
    surgery: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    examples: dict[str, dict[str, ScoredExamples]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)
    others: list[FinishedRun] = field(default_factory=list)
    changed: dict[str, str] | None = None
    missing: list[str] = field(default_factory=list)

    def rows(self, model: str, split: str) -> ScoredExamples:
        """Returns the scored examples of a model and split; an empty list without a log of them."""
        return self.examples.get(model, {}).get(split, [])

    def value(self, model: str, split: str, column: str) -> float | None:
        """Returns a mean of metrics.json as a number; None where it was not measured."""
        return number((self.metrics[model] or {}).get(split, {}).get(column))


def read(folder: Path) -> FinishedRun:
    """Returns everything that is in a run's folder.

    Raises:
        FileNotFoundError: If it holds no metrics.json.
        ValueError: If metrics.json is not that of a run.
    """
    if not (folder / METRICS).exists():
        raise FileNotFoundError(
            f"report: expected a finished run, found no {METRICS} in {folder}; give the folder of `gradsurgery unlearn`"
        )
    metrics = read_json(folder / METRICS, f"the {METRICS} of a run")
    check_metrics(metrics, folder)
    run = FinishedRun(metrics)
    run.curve = _read(
        run, folder / CURVE, _table("step", "forget", "retain"), "forgetting and retention over the steps"
    )
    run.examples = _read(run, folder / EVALUATION, _examples, "generations and confidence intervals") or {}
    run.config = _read(run, folder / CONFIG, _mapping(yaml.safe_load), "what was run") or {}
    if run.config.get("method") != "uld":  # which combines no gradients
        run.surgery = _read(run, folder / SURGERY, _surgery, "the conflict of the gradients")
    for name in (TRAINING, PROBES):  # not every run has them, so nothing is missing without
        if (folder / name).exists():
            entries = _read(run, folder / name, _notes, "what it holds") or {}
            setattr(run, name.partition(".")[0], entries)
    run.missing += list(_disagreements(run))
    return run


def columns(run: FinishedRun) -> tuple[tuple[str, str], ...]:
    """Returns the scores that the report shows, with their headings: the usual ones, and those of `memory`."""
    return (*COLUMNS, *memory(run.metrics))


def memory(metrics: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Returns the scores of reproduced text that at least one model has, with their headings."""
    every = [scores for model in MODELS for scores in (metrics[model] or {}).values()]
    return tuple(entry for entry in MEMORY if any(scores.get(entry[0]) is not None for scores in every))


def number(value: Any) -> float | None:
    """Returns a number of our JSON files, in which NaN and infinity are strings; None stays None."""
    return None if value is None else float(value)


def shown(value: Any) -> str:
    """Returns a score with three decimals, or in scientific notation if it is tiny; a dash for None."""
    found = number(value)
    if found is None:
        return "-"
    if found != found:
        return "NaN"
    return f"{found:.1e}" if 0.0 < abs(found) < 5e-4 else f"{found:.3f}"


def _read(run: FinishedRun, path: Path, parse: Callable[[str], Any], without: str) -> Any:
    if not path.exists():
        run.missing.append(f"{path.name} is not in the folder; without it the report lacks {without}.")
        return []
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError, csv.Error) as error:
        run.missing.append(f"{path.name} cannot be read ({' '.join(str(error).split())}); the report lacks {without}.")
        return []


def _table(*columns: str) -> Callable[[str], list[dict[str, float]]]:
    def parse(text: str) -> list[dict[str, float]]:
        rows = list(csv.DictReader(text.splitlines()))
        lacking = [column for column in columns if not rows or column not in rows[0]]
        if lacking:
            raise ValueError(f"no column {', '.join(lacking)}" if rows else "no rows")
        return [{name: float(cell) for name, cell in row.items() if name is not None} for row in rows]

    return parse


def _surgery(text: str) -> list[dict[str, float]]:
    rows = _table("step")(text)
    if sum(name.startswith("norm_") for name in rows[0]) == 1:
        return []  # of a run of the forget gradient alone, which has nothing to conflict with
    rows = _table("step", "cosine", "conflict")(text)
    names = {name.removeprefix("coefficient_") for name in rows[0] if name.startswith("coefficient_")}
    lacking = [f"norm_{name}" for name in sorted(names) if f"norm_{name}" not in rows[0]]
    if lacking:
        raise ValueError(f"no column {', '.join(lacking)}")
    return rows


def _mapping(load: Callable[[str], Any]) -> Callable[[str], dict[str, Any]]:
    def parse(text: str) -> dict[str, Any]:
        value = load(text)
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping, found {type(value).__name__}")
        if strange := [name for name in value if not isinstance(name, str)]:
            raise ValueError(f"expected names, found {strange[0]!r}")
        return value

    return parse


def _notes(text: str) -> dict[str, Any]:
    """What callbacks wrote: a name, and what they found."""
    notes = _mapping(json.loads)(text)
    if strange := [name for name, found in notes.items() if not isinstance(found, dict)]:
        raise ValueError(f"expected an object as {strange[0]}, found {type(notes[strange[0]]).__name__}")
    return notes


def _examples(text: str) -> dict[str, dict[str, ScoredExamples]]:
    found: dict[str, dict[str, ScoredExamples]] = {}
    for line in text.splitlines():
        if line.strip():
            row = json.loads(line)
            scores = {name: number(row.get(name)) for name, _ in SCORES}
            texts = {name: str(row[name]) for name in ("question", "answer")}
            generation = None if row.get("generation") is None else str(row["generation"])
            rows = found.setdefault(row["model"], {}).setdefault(row["split"], [])
            rows.append({**scores, **texts, "generation": generation})
    return found


def _disagreements(run: FinishedRun) -> Sequence[str]:
    """Says if the log is not the one that metrics.json was computed from: its intervals would be of another run."""
    for model, splits in run.examples.items():
        for split in splits:
            if model not in MODELS or split not in (run.metrics[model] or {}):
                continue
            values = [row["nll"] for row in splits[split] if row["nll"] is not None]
            mean, stated = sum(values) / max(1, len(values)), run.value(model, split, "nll")
            if stated is not None and abs(mean - stated) > 1e-6 * max(1.0, abs(stated)):
                name = f"{EVALUATION} and {METRICS} disagree about {split} of the model {model}"
                return [f"{name} (NLL {mean:.6g} and {stated:.6g}); intervals and generations may be of another run."]
    return []
