"""Where each benchmark writes in RESULTS.md: between two comment lines of its own."""

from __future__ import annotations

import time
from pathlib import Path

from tests.marked import marked, write_marked

RESULTS = Path(__file__).with_name("RESULTS.md")
_FAILED = "Not measured on "


def begin(name: str) -> str:
    return f"<!-- {name}: python -m tests.benchmarks {name} --write -->"


def end(name: str) -> str:
    return f"<!-- /{name} -->"


def written(path: Path, name: str) -> str | None:
    """What stands in a place; None where there is none."""
    return marked(path.read_text(encoding="utf-8"), begin(name), end(name))


def write(path: Path, name: str, text: str) -> None:
    """Replace what stands in a place.

    Raises:
        ValueError: If there is none; the file is as it was then.
    """
    write_marked(path, begin(name), end(name), text.strip())


def write_failure(path: Path, name: str, reason: str) -> None:
    """Say in a line why nothing was found; what was found before stays below it.

    Raises:
        ValueError: If there is no such place; the file is as it was then.
    """
    older = written(path, name) or ""
    if older.startswith(_FAILED):
        older = older.partition("\n")[2].strip()
    said = f"{_FAILED}{time.strftime('%Y-%m-%d')}: {' '.join(reason.split())}"
    said = f"{said.removesuffix('.')}."
    write(path, name, f"{said} What follows is older.\n\n{older}" if older else said)
