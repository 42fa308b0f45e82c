"""How files are written: whole or not at all, with one sentence where that is not possible."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PARTIAL = ".partial-"
"""How the names of files begin that are not finished."""


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Gives the block a temporary path beside `path`, which takes the place of `path` when the block ends.

    The block writes a file or a folder there. It is on the disk before it is renamed. If the block raises, if the disk
    is full, or if the process is killed, what was at `path` before stays whole; a killed process leaves a file whose
    name begins with `PARTIAL`, see `remove_partial`. Only a folder that replaces another is gone for the moment between
    two renames.

    Args:
        path: Of the file or folder. Its parent is created.

    Raises:
        OSError: In one sentence with the path, if it cannot be written.
    """
    temporary = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}{path.suffix}")
    try:
        with one_sentence(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            for written in (temporary, *temporary.rglob("*")):
                _sync(written)
            if temporary.is_dir() and path.is_dir():  # a folder cannot be renamed onto one that holds files
                former = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
                path.rename(former)
                try:
                    temporary.rename(path)
                except OSError:
                    former.rename(path)
                    raise
                shutil.rmtree(former)
            else:
                temporary.replace(path)
            _sync(path.parent)
    finally:
        _remove(temporary)


def write_picture(path: Path, figure: Any, dpi: int = 150) -> None:
    """Write a figure of matplotlib as PNG, the whole file or nothing; the same figure gives the same bytes."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with line ends as they are, the whole file or nothing."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)


def append_text(path: Path, text: str) -> None:
    """Add lines to a file that exists: all of them, or none if there is no room for them.

    Raises:
        OSError: In one sentence with the path.
    """
    with one_sentence(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            size, rest = os.fstat(file).st_size, text.encode("utf-8")
            try:
                while rest:
                    rest = rest[os.write(file, rest) :]
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)


@contextmanager
def one_sentence(path: Path) -> Generator[None]:
    """Says what cannot be written, instead of only why."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kind = type(error) if isinstance(error, (PermissionError, FileNotFoundError)) else OSError
        reason = getattr(error, "strerror", None) or str(error)
        said = kind(
            f"{path}: expected room and permission to write it, found: {reason}; what was there before is whole: make room, or choose "
            "another folder"
        )
        raise said from error


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder; only for one that no other process writes to."""
    for path in folder.glob(f"{PARTIAL}*"):
        _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere a folder cannot be opened
        return
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)
