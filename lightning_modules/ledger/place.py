"""The folder of a ledger: the names in it, and that one process at a time works with it."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lightning_modules.files import remove_partial
from lightning_modules.folder import check_writable, locked

LEDGER, CRITERIA, TEXTS, SKETCHES = "ledger.jsonl", "criteria", "texts", "sketches"
PICTURE, PAGE = "requests.png", "report.html"


def entries_at(folder: Path) -> Path:
    """The file with the entries.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = folder / LEDGER
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: expected a ledger, found no {LEDGER}; `gradsurgery unlearn --ledger {folder}` begins one"
        )
    return path


def check_place(folder: Path) -> None:
    """Refuse a folder in which no ledger can be written, before anything else is made for it. Nothing is created.

    Raises:
        PermissionError: If a file is in its way, or nobody may write there.
    """
    there, found = folder, None
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            found = "no folder"
    except PermissionError:  # a folder on the way may not be entered
        found = "in a folder that this user may not enter"
    if found is None and not os.access(there, os.W_OK | os.X_OK):
        found = "a folder that this user may not write to"
    if found is not None:
        raise PermissionError(f"--ledger: expected a folder that can be written, found {folder}: {there} is {found}")


@contextmanager
def held(folder: Path) -> Generator[None]:
    """Keeps other processes from writing to a ledger as long as the block runs; the lock dies with the process.

    Raises:
        FileExistsError: If another process works with it.
        PermissionError: If the folder cannot be created.
    """
    check_writable(folder, "--ledger")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except FileExistsError as error:
            raise FileExistsError(
                f"--ledger: expected a ledger that no other run works with, found another process at work in {folder}; wait for it: each "
                "request begins with the model that the one before left"
            ) from error
        for place in (folder, folder / CRITERIA, folder / TEXTS, folder / SKETCHES):
            remove_partial(place)
        yield
