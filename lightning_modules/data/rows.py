"""The rows of a file as they are: JSON, JSON lines, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.data.files import existing_file, read_text

_EXPECTED = "a file of examples"
_NAMES = ("question", "answer", "prompt", "response", "messages", "text")
_OPTIONAL = ("paraphrased_answer", "paraphrased_question", "perturbed_answer")


def read_rows(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yields the rows of a file as they are, each with its place in the file, "row 3" or "line 3".

    Args:
        path: `.json`, `.jsonl`, `.csv` or `.parquet`, as in `read_examples`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken, or ends in something else.
        ImportError: for Parquet without pyarrow.
    """
    path = existing_file(path, _EXPECTED)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"expected {path} to end in {', '.join(_READERS)}, found {path.suffix or 'no ending'!r}: plain text can be "
            'given as JSON lines, {"text": "..."} on each line; an archive has to be unpacked'
        )
    return reader(path)


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    text = read_text(path, _EXPECTED)
    if text.lstrip().startswith("["):
        rows = _parsed(text, str(path), ": expected an array of objects", within=True)
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return
    # Not splitlines(), which also splits at separators such as U+2028 that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield (
                f"line {number}",
                _parsed(line, f"{path}, line {number}", ": expected an array of objects, or one object a line"),
            )


def _parsed(text: str, where: str, expected: str, *, within: bool = False) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}" if within else where
        raise ValueError(f"{place}: this is not valid JSON ({error.msg}){expected}") from error
    except (ValueError, RecursionError) as error:  # a key twice, a number of 5000 digits, 10000 brackets
        raise ValueError(f"{where}: this is not the JSON of examples ({error}){expected}") from error


def _object(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(entries)
    if len(row) < len(entries):
        names = [name for name, _ in entries]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice in one object")
    return row


def _csv_rows(path: Path) -> Iterator[tuple[str, object]]:
    names, rows = _csv_table(path)
    if twice := [name for name in names if name in (*_NAMES, *_OPTIONAL) and list(names).count(name) > 1]:
        raise ValueError(f"{path}, line 1: the column {twice[0]} is there twice: expected every name once")
    for number, (line, row) in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, row {number} (line {line}): expected {len(names)} "
                "values, as many as the first line names: a value that contains a comma needs quotes"
            )
        yield f"row {number}", {name: value for name, value in row.items() if value or name not in _OPTIONAL}


def _csv_table(path: Path) -> tuple[Sequence[str], list[tuple[int, dict[Any, Any]]]]:
    """The names in the first line, and every row with the line in which it ends."""
    text = read_text(path, _EXPECTED)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit()  # 131072 characters, of all readers of the process: a chapter may be longer
    csv.field_size_limit(max(limit, len(text)))
    try:
        return reader.fieldnames or (), [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: this is not valid CSV ({error}): expected as many values a row as the first names"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install datasets") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:  # of a damaged page, pyarrow says OSError
        said = " ".join(str(error).split())
        raise ValueError(f"{path} is not a valid Parquet file ({said}): expected {_EXPECTED}, make it again") from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


_READERS = {".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
