"""The results of a grid's runs: one dictionary for every run and target, results.csv, and paired differences."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.ablation.grid import Grid, Run
from lightning_modules.ablation.run import RUNS, models_file, read_result, refuse_other
from lightning_modules.ablation.scoring import GENERAL
from lightning_modules.ablation.statistics import Paired, paired
from lightning_modules.files import write_text
from lightning_modules.metrics.functional import UTILITY_METRICS

Result = Mapping[str, Any]

REFERENCE = "never saw the forget set"
"""What a table and a picture call the reference."""

_SCORES = (
    "retain_probability",
    "retain_nll",
    "retain_rouge_l_recall",
    "forget_probability",
    "forget_nll",
    "forget_rouge_l_recall",
    "forget_truth_ratio",
    "ks_statistic",
    "ks_pvalue",
    "ks_log10_pvalue",
    "ks_n",
    "retain_n",
    "retain_rouge_n",
    "forget_n",
    "forget_rouge_n",
    "forget_degenerate",
    "retain_heldout_probability",
    "retain_heldout_n",
    "peak_megabytes",
    "model_utility",
    *(f"utility_retain_{score}" for score in UTILITY_METRICS),
    *(f"{split}_{score}" for split in GENERAL for score in (*UTILITY_METRICS, "n")),
)
_IDENTITY = ("id", "method", "data_seed", "model_seed", "target", "value", "reached", "reason")
_COST = ("steps", "seconds", "backward_passes", "conflicts", "raising", "weight", "share_of_start")


def read_results(grid: Grid, folder: Path) -> list[dict[str, Any]]:
    """One dictionary for every run and target of the grid.

    Where a target was not reached, a run failed, or a run is still to be done, `reached` is False and `reason` says
    why.

    Raises:
        ValueError: If a run was made with other settings than the grid's.
    """
    return [row for run in grid.runs() for row in _rows(run, folder)]


def _rows(run: Run, folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / RUNS / f"{run.id}.json"
    found: dict[str, Any] = {"status": "missing", "reason": "not run yet"}
    if path.exists():
        found = read_result(path, "status", "reason")
        refuse_other(path, found["config"], run.config)
    seeds = {"data_seed": run.data_seed, "model_seed": run.model_seed}
    identity = {"id": run.id, "method": run.method.name, **seeds}
    known = {row["target"]: row for row in found.get("targets", [])}
    for target in (f"{metric}={value}" for metric, values in vars(run.grid.targets).items() for value in values):
        row = known.get(target, {"reached": False, "reason": found["reason"]})
        steps = number(row.get("step"))
        cost = {"steps": steps, "seconds": number(row.get("seconds"))}
        before = found.get("extra_backward_passes", 0) + row.get("further_backward_passes", 0)
        cost["backward_passes"] = None if steps is None else before + steps * found["backward_passes"]
        measured = {
            name: number(row.get(name)) for name in (*_SCORES, "conflicts", "raising", "weight", "share_of_start")
        }
        said = {"target": target, "value": row.get("value"), "reached": row["reached"], "reason": row["reason"]}
        attacks = {f"attack {name}": number(value) for name, value in row.get("attacks", {}).items()}
        yield {**identity, **said, **measured, **attacks, **cost, "curve": found.get("curve", [])}


def read_models(grid: Grid, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each model seed with the scores of its `start` model and `reference`, as far as they are there."""
    for seed in grid.seeds.model:
        path = models_file(folder, seed)
        if path.exists():
            yield seed, read_result(path, "start", "reference")


def write_csv(results: Sequence[Result], path: Path) -> None:
    """One line for every run and target."""
    text = io.StringIO(newline="")
    attacks = list(dict.fromkeys(name for row in results for name in row if name.startswith("attack ")))
    columns = [*_IDENTITY, *_SCORES, *attacks, *_COST]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_text(path, text.getvalue())


def differences(ours: Sequence[Result], theirs: Sequence[Result], column: str) -> Paired | None:
    """Differences in a column between the runs of two methods that reached a target, seed by seed."""
    return paired(*({_seeds(row): row[column] for row in rows if row[column] is not None} for rows in (ours, theirs)))


def _seeds(row: Result) -> tuple[int, int]:
    return row["model_seed"], row["data_seed"]


def number(value: Any) -> float | None:
    """A number from JSON, where NaN and infinity are written as words."""
    return None if value is None else float(value)
