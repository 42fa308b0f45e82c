"""The output folder: what is in it, and that nobody's run is overwritten."""

from __future__ import annotations

import json
import math
import platform
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import gradsurgery as gs
from lightning_modules.run.options import DataOptions

Log = dict[str, list[dict[str, Any]]]

METRICS, CONFIG, CURVE, SURGERY, EVALUATION, START_MODEL, G_EFFECT = (
    "metrics.json",
    "config.yaml",
    "curve.csv",
    "surgery.csv",
    "evaluation.jsonl",
    "start_model.safetensors",
    "g_effect.csv",
)
TRAINING, PROBES = "training.json", "probes.json"  # what callbacks tell the report


def claim(folder: Path) -> None:
    """Make the folder, or refuse one that holds a run.

    Raises:
        FileExistsError: If it does.
        PermissionError: If it cannot be written.
    """
    found = [
        name for name in (METRICS, EVALUATION, CONFIG, SURGERY, "model", "checkpoints") if (folder / name).exists()
    ]
    if found:
        raise FileExistsError(
            f"--output: expected a new or empty folder, found {', '.join(found)} of an earlier run in {folder}; choose another folder, "
            "remove it, or go on with --resume if it was interrupted"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(f"--output: expected a folder that can be written, found {folder}: {error}") from error


def write_config(folder: Path, command: str, options: DataOptions) -> None:
    """The options, complete: `gradsurgery COMMAND --config config.yaml --output ELSEWHERE` repeats the run."""
    values = {name: value for name, value in asdict(options).items() if name != "resume"}
    text = f"# gradsurgery {command} --config {CONFIG} --output ANOTHER_FOLDER repeats this run.\n"
    (folder / CONFIG).write_text(text + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Strict JSON, written whole or not at all; NaN becomes the string "NaN", which no reader takes for a number."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(_strict(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_evaluation(path: Path, evaluations: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]] | None]) -> None:
    """One line for every model, split and example, so that any aggregate can be computed again; whole or not at all."""
    temporary = path.with_name(f".partial-{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for name, splits in evaluations.items():
                for split, rows in (splits or {}).items():
                    file.writelines(json.dumps(_strict({"model": name, "split": split, **row})) + "\n" for row in rows)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_evaluation(path: Path) -> tuple[str, Log]:
    """The scores in a log of a model that never saw the forget set.

    They are those of its reference. Without one they are those called "after": `gradsurgery evaluate --log` leaves such a log, of whatever
    model it was given. What a run of `unlearn` calls "after" is never taken, because that model saw what it forgot.

    Returns:
        "reference" or "after", and split -> rows as in `Evaluation.examples`.

    Raises:
        ValueError: If there are none, or the file is no log.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is a {type(row).__name__} and no object")
        rows = [{key: _number(key, value) for key, value in row.items()} for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: expected the lines of an {EVALUATION}, found something else: {error}") from error
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"{path}, row {number}")
    models = {row["model"] for row in rows}
    model = "reference" if "reference" in models else "after"
    if model not in models:
        raise ValueError(f"{path}: expected rows of a model called reference or after, found {sorted(models)}")
    if model == "after" and "before" in models:
        raise ValueError(
            f"{path}: expected the scores of a model that never saw the forget set, found a log of unlearning without a reference: give "
            "the model that never saw it, or the log that `gradsurgery evaluate --log` leaves of that model"
        )
    splits: Log = {}
    for row in rows:
        if row.pop("model") == model:
            splits.setdefault(row.pop("split"), []).append(row)
    return model, splits


def _check_row(row: Mapping[str, Any], where: str) -> None:
    expected = ["model", "split", "question", "answer"]
    lacking = [name for name in expected if not isinstance(row.get(name), str)]
    if row.get("perturbed_nll") is not None:
        lacking += [] if isinstance(row["perturbed_nll"], list) else ["perturbed_nll as a list"]
        lacking += (
            [] if isinstance(row.get("paraphrase_nll"), (int, float)) else ["paraphrase_nll with its perturbed_nll"]
        )
    if lacking:
        raise ValueError(
            f"{where}: expected a line of an {EVALUATION}, found one without {', '.join(lacking)} (it has {', '.join(row) or 'nothing'}); "
            "give the file as `gradsurgery unlearn` or `gradsurgery evaluate --log` left it"
        )


def _number(key: str, value: Any) -> Any:
    """NaN and infinity, which `write_evaluation` spells out, as numbers again."""
    if key in ("question", "answer", "generation", "model", "split"):
        return value
    if isinstance(value, list):
        return [_number(key, entry) for entry in value]
    return float(value) if isinstance(value, str) else value


def versions() -> dict[str, str]:
    """What the run was made with."""
    found = {"python": platform.python_version()}
    found["gradsurgery"] = gs.__version__
    for name in ("torch", "lightning", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value).replace("nan", "NaN").replace("inf", "Infinity")
    return value
