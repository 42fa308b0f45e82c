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
from lightning_modules.options import DataOptions

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


def read_evaluation(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Split -> rows of a log's reference, or of its unlearned model where it has no reference, as `Evaluation.examples`.

    Raises:
        ValueError: If there are none, or the file is no log.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [{key: _number(key, value) for key, value in row.items()} for row in rows]
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path}: expected the lines of an {EVALUATION}, found something else: {error}") from error
    models = {row.get("model") for row in rows}
    model = "reference" if "reference" in models else "after"
    if model not in models:
        raise ValueError(
            f"{path}: expected rows of a model called reference or after, found {sorted(map(str, models))}"
        )
    splits: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.pop("model") == model:
            splits.setdefault(row.pop("split"), []).append(row)
    return splits


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
