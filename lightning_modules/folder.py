"""The output folder: the names of its files, and how they are written so that no run is overwritten or left in half."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import yaml

import gradsurgery as gs
from lightning_modules.files import one_sentence, remove_partial, replacing, write_text

Log = dict[str, list[dict[str, Any]]]
"""Split -> scored examples, in the order of the file."""

METRICS, CONFIG, CURVE, SURGERY, EVALUATION, START_MODEL, G_EFFECT = (
    "metrics.json",
    "config.yaml",
    "curve.csv",
    "surgery.csv",
    "evaluation.jsonl",
    "start_model.safetensors",
    "g_effect.csv",
)
CHECKPOINTS = "checkpoints"  # as long as the run goes on
LAST_CHECKPOINT = f"{CHECKPOINTS}/last.ckpt"
LOCK = ".lock"
_TEXTS = ("question", "answer", "generation", "model", "split", "task", "answers_hash", "tokens_hash")
TRAINING, PROBES = "training.json", "probes.json"  # written by callbacks, read by the report
REQUEST = "request.json"  # of a run with --ledger: what was said before it
REPORT = ("report.html", "report.md", "curves.png", "g_effect.png")
MODEL, LOGS = "model", "logs"
BASE = "base"  # the model from scratch, or a taught one, if an adapter is kept for it
LEFT = (
    *(METRICS, EVALUATION, CONFIG, SURGERY, CURVE, G_EFFECT, START_MODEL, TRAINING, PROBES, REQUEST),
    *REPORT,
    *(MODEL, BASE, CHECKPOINTS, LOGS),
)
"""Every name that a run may leave in its folder: one of them is enough to tell that the folder is somebody's."""


def check_free(folder: Path) -> None:
    """Refuse a folder that already holds a run, or a single file of one. Nothing is created.

    Raises:
        FileExistsError: If the folder holds files of a run.
    """
    found = [name for name in LEFT if os.path.lexists(folder / name)]
    if found:
        way = (
            "remove it, or go on with --resume if it was interrupted" if CONFIG in found else "or remove what is in it"
        )
        raise FileExistsError(
            f"--output: expected a new or empty folder, found {', '.join(found)} of an earlier run in {folder}; choose another folder, "
            f"{way}"
        )


def claim(folder: Path) -> None:
    """Create the folder, or refuse it if it already holds a run, or a single file of one.

    What an earlier run left would be read as this one's: callbacks add to probes.json, the report draws what is there.

    Raises:
        FileExistsError: If the folder holds files of a run.
        PermissionError: If the folder cannot be created or written to.
    """
    check_free(folder)
    check_writable(folder)


def check_writable(folder: Path, option: str = "--output") -> None:
    """Create the folder, or refuse it if it cannot be written to.

    Args:
        folder: Afterwards it exists.
        option: Named in the message.

    Raises:
        PermissionError: If the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: no name of a file, such as one with a NUL
        raise PermissionError(f"{option}: expected a folder that can be written, found {folder}: {error}") from error


@contextmanager
def occupied(folder: Path, *, resume: bool = False) -> Generator[None]:
    """A run's folder, for this process alone as long as the block runs, without what a killed run left half-written.

    Args:
        folder: Of the run.
        resume: Whether the run in it goes on; otherwise a folder that holds one is refused.

    Raises:
        FileExistsError: If the folder holds files of a run, or another process works there.
        PermissionError: If the folder cannot be created or written to.
    """
    if not resume:
        claim(folder)
    with locked(folder):
        if not resume:
            claim(folder)  # another process may have filled it meanwhile
        for place in (folder, folder / CHECKPOINTS):
            remove_partial(place)
        yield


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Keeps other processes out of a run's folder as long as the block runs; the lock dies with the process.

    Where the system has no such locks (Windows, some network disks) nobody is kept out.

    Args:
        folder: It exists.

    Raises:
        FileExistsError: If another process works there.
        OSError: In one sentence, if the folder cannot be written to.
    """
    path = folder / LOCK
    with _held(path) as file:
        try:
            with one_sentence(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n")
                file.flush()
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _held(path: Path) -> IO[str]:
    """The lock file, locked by this process."""
    while True:
        with one_sentence(path):
            file = path.open("a+", encoding="utf-8")
        if not _lock(file.fileno()):
            file.seek(0)
            with file:
                raise FileExistsError(
                    f"--output: expected a folder in which no other run works, found {file.read().strip() or 'another process'} at work "
                    f"in {path.parent}; wait for it, or choose another folder"
                )
        # The process that held it may have removed the file in between; then others lock a new one.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _lock(file: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks
        return True
    return True


def check_links(folder: Path) -> None:
    """Refuse a folder of a run in which a link leads out of it: what is written there would be written elsewhere.

    Raises:
        PermissionError: If there is such a link, as in an archive of somebody else's.
    """
    home, logs = folder.resolve(), folder / LOGS  # what a logger leaves in it is the logger's
    found = [
        path
        for path in folder.rglob("*")
        if path.is_symlink() and logs not in path.parents and not path.resolve().is_relative_to(home)
    ]
    if found:
        raise PermissionError(
            f"{folder}: expected a run with its files in it, found {', '.join(str(path.relative_to(folder)) for path in found)} leading "
            "out of it; remove these links"
        )


def cache_folder(name: str) -> Path:
    """A folder for results that can be computed again: `$XDG_CACHE_HOME/gradsurgery/<name>`, or in `~/.cache`.

    It is not created.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradsurgery" / name


def write_config(folder: Path, command: str, values: Mapping[str, Any]) -> None:
    """Write all options of a run: `gradsurgery COMMAND --config config.yaml --output ELSEWHERE` repeats it.

    Args:
        folder: The run's folder.
        command: The command that made it.
        values: Option -> value, in the order in which they are written.
    """
    text = f"# gradsurgery {command} --config {CONFIG} --output ANOTHER_FOLDER repeats this run.\n"
    dumped = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    write_text(folder / CONFIG, text + dumped)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON, either the whole file or nothing. NaN, which JSON does not have, becomes the string "NaN"."""
    write_text(path, json.dumps(_strict(value), indent=2, allow_nan=False) + "\n")


def write_evaluation(path: Path, evaluations: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]] | None]) -> None:
    """Write one JSON line for every model, split and example, either the whole file or nothing.

    Every aggregate in metrics.json can be computed again from these lines.

    Args:
        path: Of the file.
        evaluations: Model ("before", "after", "reference") -> split -> scored examples; a model that is None is left
            out.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for name, splits in evaluations.items():
            for split, rows in (splits or {}).items():
                file.writelines(json.dumps(_strict({"model": name, "split": split, **row})) + "\n" for row in rows)


def read_evaluation(path: Path) -> tuple[str, Log]:
    """Read the scores of a model that never saw the forget set from a log that `write_evaluation` wrote.

    In a log of `unlearn` these are the rows of its "reference". A log of `gradsurgery evaluate --log` has no reference;
    there the rows called "after" are taken, whatever model was evaluated. The "after" of `unlearn` is never taken,
    because that model saw what it forgot.

    Returns:
        "reference" or "after", and split -> rows as in `Evaluation.examples`.

    Raises:
        ValueError: If the file is not such a log, or holds neither of the two.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        rows = [_object(number, line) for number, line in enumerate(lines, start=1)]
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


def _object(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"row {number} of it is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"row {number} is a {type(row).__name__} and no object")
    return row


def _check_row(row: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a line lacks what identifies an example, or half of its truth ratio."""
    expected = ["model", "split", "question", "answer"]
    lacking = [name for name in expected if not isinstance(row.get(name), str)]
    if row.get("perturbed_nll") is not None:
        lacking += [] if isinstance(row["perturbed_nll"], list) else ["perturbed_nll as a list"]
        lacking += (
            [] if isinstance(row.get("paraphrase_nll"), (int, float)) else ["paraphrase_nll with its perturbed_nll"]
        )
    numbers = {key: value for key, value in row.items() if key not in _TEXTS}
    lacking += [
        f"{key} as {'numbers' if key == 'perturbed_nll' else 'a number'}"
        for key, value in numbers.items()
        if any(
            isinstance(entry, (list, dict))
            for entry in (value if isinstance(value, list) and key == "perturbed_nll" else [value])
        )
    ]
    if lacking:
        raise ValueError(
            f"{where}: expected a line of an {EVALUATION}, found one without {', '.join(lacking)} (it has {', '.join(row) or 'nothing'}); "
            "give the file as `gradsurgery unlearn` or `gradsurgery evaluate --log` left it"
        )


def _number(key: str, value: Any) -> Any:
    """Turn "NaN" and "Infinity", as `write_evaluation` spells them, back into numbers; texts stay as they are."""
    if key in _TEXTS:
        return value
    if isinstance(value, list):
        return [_number(key, entry) for entry in value]
    return float(value) if isinstance(value, str) else value


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that determine a run's numbers."""
    found = {"python": platform.python_version()}
    found["gradsurgery"] = gs.__version__
    for name in ("torch", "lightning", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _strict(value: Any) -> Any:
    """The same value with strings for the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value).replace("nan", "NaN").replace("inf", "Infinity")
    return value
