"""What benchmarks report of a run's models, from the scored examples of their tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lightning_modules.data.tasks import CHOICE, CONTINUATION, MEMBERSHIP, TASK, apart
from lightning_modules.metrics.functional import accuracy_interval, auc, priv_leak

Examples = Mapping[str, Sequence[Mapping[str, Any]]]
Scores = dict[str, float | int | None]


def benchmark_scores(models: Mapping[str, Examples | None]) -> dict[str, dict[str, Scores]]:
    """Returns the entry of metrics.json about benchmarks.

    For a split of continuations `<split>/rouge_l_f1`, the mean over its examples; for one of multiple choice
    `<split>/accuracy` with its 95 % interval; for the two splits `<name>_forget` and `<name>_holdout` of a membership
    task `<name>/min_k_auc`, how well Min-K% (k = 40 %) tells them apart, and, where there is a reference,
    `<name>/privleak`, in percent, by that AUC (`metrics.functional.priv_leak`).

    Args:
        models: "before", "after" and "reference" -> split -> scored examples; `None` where there is no such model.

    Returns:
        `{"benchmarks": {"<split>/<score>": {"before", "after", "reference", "n", ...}}}`, `None` for a model that was
        not scored, and an accuracy's limits as `before_low`, `before_high` and so on. Empty if there are no tasks.
    """
    tasks = {model: apart(examples)[1] if examples else {} for model, examples in models.items()}
    found: dict[str, dict[str, Any]] = {}
    for split in dict.fromkeys(split for splits in tasks.values() for split in splits):
        rows = {model: splits.get(split, ()) for model, splits in tasks.items()}
        kind = next(scored[0][TASK] for scored in rows.values() if scored)
        if kind == CONTINUATION:
            found[f"{split}/rouge_l_f1"] = _by_model(rows, {model: _mean(rows[model], "rouge_l_f1") for model in rows})
        elif kind == CHOICE:
            found[f"{split}/accuracy"] = _accuracies(rows)
        elif kind == MEMBERSHIP and split.endswith("_forget"):
            name = split.removesuffix("_forget")
            found |= _leaks(name, rows, {model: splits.get(f"{name}_holdout", ()) for model, splits in tasks.items()})
    return {"benchmarks": found} if found else {}


def _by_model(rows: Mapping[str, Sequence[Any]], values: Mapping[str, float | None]) -> Scores:
    return {**values, "n": max(map(len, rows.values()))}


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return fmean(row[name] for row in rows) if rows else None


def _accuracies(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Scores:
    means = {model: _mean(scored, "correct") for model, scored in rows.items()}
    found = _by_model(rows, means)
    for model, mean in means.items():
        if mean is not None:
            found[f"{model}_low"], found[f"{model}_high"] = accuracy_interval(mean, len(rows[model]))
    return found


def _leaks(name: str, forget: Mapping[str, Sequence[Any]], holdout: Mapping[str, Sequence[Any]]) -> dict[str, Scores]:
    areas: dict[str, float | None] = {}
    for model in forget:
        sets = [[row["min_k_score"] for row in rows[model]] for rows in (forget, holdout)]
        areas[model] = auc(*sets) if all(sets) else None
    if not any(area is not None for area in areas.values()):
        return {}
    found = {f"{name}/min_k_auc": _by_model(forget, areas)}
    goal = areas.get("reference")
    if goal is not None and goal != 1.0:  # where PrivLeak is not defined
        leaks = {model: None if area is None else priv_leak(area, goal) for model, area in areas.items()}
        found[f"{name}/privleak"] = _by_model(forget, leaks)
    return found
