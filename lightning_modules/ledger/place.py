"""The folder of a ledger: the names in it, and that one process at a time works with it."""

from __future__ import annotations

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
