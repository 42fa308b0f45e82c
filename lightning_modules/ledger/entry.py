"""What an entry says of a run, from the files that the run left."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.data.files import read_json
from lightning_modules.evaluation.intervals import mean_interval
from lightning_modules.folder import CONFIG, CURVE, EVALUATION, METRICS, MODEL, PROBES, REQUEST, SURGERY, TRAINING
from lightning_modules.ledger.batch import PARTS, largest, scored
from lightning_modules.ledger.chain import Entry
from lightning_modules.ledger.criteria import verdicts
from lightning_modules.ledger.hashes import file_hash, other_files, tensors_hash
from lightning_modules.ledger.refusals import FORGOTTEN

EVIDENCE = (CONFIG, REQUEST, METRICS, TRAINING, PROBES, SURGERY, CURVE)
"""The files of a run that an entry holds the hashes of. None of them holds a text of the data."""

_SPLITS = ("forget", "retain", "retain_heldout")
_MEANS = ("probability", "nll", "rouge_l_recall", "truth_ratio", "exact_memorization", "extraction_strength", "n")


def contents(
    run: Path, ledger: Path, request: Mapping[str, Any], entries: Sequence[Entry], further: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of an entry: everything but its number, its hash and that of the entry before.

    Args:
        run: Folder of the run, which is whole.
        ledger: Folder of the ledger.
        request: What was said before the run, `request.json`.
        entries: Those before it.
        further: `time`, and what else the entry is to hold: `earlier`, `kept`.
    """
    metrics = read_json(run / METRICS, "the scores of a run")
    trained = request["kind"] == FORGOTTEN
    model: dict[str, Any] = {"before": request["model"], "after": request["model"], "files": {}}
    if trained:
        model |= {"after": tensors_hash(run / MODEL), "files": other_files(run / MODEL)}
    first = entries[0]["metrics"]["before"]["retain"]["probability"] if entries else None
    found, level = numbers_of(run, metrics, first), _level(request, metrics)
    parts: dict[str, Any] = {}
    if PARTS in request:  # every one of them has to hold by itself
        parts[PARTS] = scored(run, request[PARTS], request["criteria"]["limits"].get("forget_probability", level))
        found["forget_probability"] = largest(parts[PARTS])
    return {
        "version": 1,
        "kind": request["kind"],
        "request": {name: request[name] for name in ("id", "sha256", "rows")},
        "counts": request["counts"] | {"steps": _steps(run), "level": level},
        "begun": request["begun"],
        "run": os.path.relpath(run, ledger),
        "evidence": {name: file_hash(run / name) for name in EVIDENCE if (run / name).exists()},
        "model": model,
        "protected": request["protected"],
        "seed": metrics["seed"],
        "versions": metrics["versions"],
        "seconds": metrics["seconds"],
        "metrics": _metrics(run, metrics),
        "probes": probes_of(run),
        "criteria": {"sha256": request["criteria"]["sha256"], "limits": request["criteria"]["limits"]},
        "verdicts": verdicts(request["criteria"]["limits"], found) if trained else [],
        **parts,
        **further,
    }


def numbers_of(run: Path, metrics: Mapping[str, Any], first: float | None) -> dict[str, float | None]:
    """Criterion -> the number that the run left; None where it did not measure it.

    Args:
        run: Its folder.
        metrics: The contents of its metrics.json.
        first: The retain probability before the first request of the ledger; None if this is the first.
    """
    after, before = metrics["after"], metrics["before"] or metrics["after"]
    start = first if first is not None else before["retain"]["probability"]
    relearned = probes_of(run).get("relearn", {})
    ends = [relearned.get(name, {}).get("after") for name in ("model", "control")]
    utility = (metrics.get("model_utility") or {}).get("after")
    return {
        "forget_probability": finite(after["forget"]["probability"]),
        "forget_quality": finite((metrics["forget_quality"] or {}).get("pvalue")),
        "relearning_gap": None if None in ends else ends[0] - ends[1],
        "retention": _ratio(finite(after["retain"]["probability"]), finite(start)),
        "model_utility": finite(utility),
    }


def limit_of(entry: Entry) -> float:
    """The forget probability that a request had to reach: its criterion, or else what its run was to end at."""
    return float(entry["criteria"]["limits"].get("forget_probability", entry["counts"]["level"]))


def _level(request: Mapping[str, Any], metrics: Mapping[str, Any]) -> float:
    """The forget probability that the run was to reach: what it settled itself, where nobody had named it."""
    target = metrics.get("target") or {}
    return (
        request["counts"]["level"] if request["asked"] else target.get("forget_probability", request["counts"]["level"])
    )


def _ratio(value: float | None, start: float | None) -> float | None:
    return None if value is None or not start else value / start


def finite(value: object) -> float | None:
    """A finite number; None for NaN, for what stands for it in JSON, and for nothing."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _steps(run: Path) -> int:
    path = run / SURGERY
    return max(0, len(path.read_text(encoding="utf-8").splitlines()) - 1) if path.exists() else 0


def _metrics(run: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The means of each model and split, with the interval of the probability; no text."""
    values: dict[tuple[str, str], list[float]] = {}
    path = run / EVALUATION
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        value = row.get("probability")
        if isinstance(value, (int, float)):
            values.setdefault((row["model"], row["split"]), []).append(float(value))
    found: dict[str, Any] = {}
    for model in ("before", "after", "reference"):
        splits = metrics.get(model) or {}
        found[model] = {
            split: {name: splits[split].get(name) for name in _MEANS}
            | {"interval": _interval(values.get((model, split), []))}
            for split in _SPLITS
            if split in splits
        }
    quality, utility = metrics.get("forget_quality"), metrics.get("model_utility")
    return found | {"forget_quality": quality, "model_utility": utility}


def _interval(values: Sequence[float]) -> list[float] | None:
    found = mean_interval(values)
    return None if found is None else [found.low, found.high]


def probes_of(run: Path) -> dict[str, Any]:
    """Where the answers that were not taught again went, of the model and of its control, for each relearning probe."""
    path = run / PROBES
    if not path.exists():
        return {}
    found: dict[str, Any] = {}
    for name, probe in read_json(path, "the results of probes").items():
        if not isinstance(probe, Mapping) or "refused" in probe or "model" not in probe:
            continue
        ends = {of: _ends(probe[of]) for of in ("model", "control") if probe.get(of) and "points" in probe[of]}
        if ends:
            found[name] = ends
    return found


def _ends(probe: Mapping[str, Any]) -> dict[str, Any]:
    points, interval = probe["points"], probe.get("interval")
    return {
        "steps": probe.get("steps"),
        "lr": probe.get("lr"),
        "before": finite(points[0].get("rest")),
        "after": finite(points[-1].get("rest")),
        "interval": interval if interval and None not in map(finite, interval) else None,
    }
