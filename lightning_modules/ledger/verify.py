"""Whether a ledger, and everything that its entries name, is as it was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_modules.folder import MODEL
from lightning_modules.ledger.chain import Entry, walked
from lightning_modules.ledger.hashes import file_hash, other_files, tensors_hash
from lightning_modules.ledger.place import CRITERIA, entries_at
from lightning_modules.ledger.refusals import FORGOTTEN


class Finding(NamedTuple):
    """Something that is not as an entry says.

    Attributes:
        entry: Its number; 0 for the ledger as a whole.
        said: In words.
        gone: Whether it only is not there any more, so that nothing can be said of it.
    """

    entry: int
    said: str
    gone: bool = False


def verify(folder: Path, head: str | None = None) -> tuple[list[Entry], list[Finding]]:
    """Check the chain, and by their hashes the criteria, what was kept, and every run's files and model.

    Whoever can write to all of it can also write another ledger with right hashes. So note the hash of the last entry
    somewhere else, and give it here: it stands for everything before.

    Args:
        folder: Of the ledger.
        head: The hash that the last entry has to have; its beginning is enough, from 12 digits.

    Returns:
        The entries up to a broken one, and what was found; nothing if all is as it was.

    Raises:
        FileNotFoundError: If there is no ledger.
        ValueError: If the hash is too short.
    """
    if head is not None and len(head) < 12:
        raise ValueError(f"--head: expected at least 12 digits of a hash, found {head!r}")
    entries, broke = walked(entries_at(folder))
    found: list[Finding] = []
    if broke is not None:
        found.append(Finding(broke.entry, f"expected the entry as it was written, found {broke.found}"))
    elif head is not None and (not entries or not entries[-1]["hash"].startswith(head)):
        last = entries[-1]["hash"] if entries else "none"
        found.append(Finding(0, f"expected a last entry with the hash {head}, found {last}"))
    for before, entry in zip([None, *entries], entries, strict=False):
        found += _of_entry(folder, entry, before)
    return entries, found


def _of_entry(folder: Path, entry: Entry, before: Entry | None) -> Iterator[Finding]:
    number, run = entry["number"], (folder / entry["run"]).resolve()
    if before is not None and entry["model"]["before"] != before["model"]["after"]:
        yield Finding(number, "expected it to begin with the model that the entry before left, found another")
    criteria = entry["criteria"]["sha256"]
    if criteria is not None:
        yield from _file(number, folder / CRITERIA / f"{criteria}.yaml", criteria, "the criteria")
    for what, kept in entry["kept"].items():
        yield from _file(number, folder / kept["file"], kept["sha256"], f"the kept {what}")
    if not run.is_dir():
        yield Finding(number, f"its run, {run}, is not there", gone=True)
        return
    for name, expected in entry["evidence"].items():
        yield from _file(number, run / name, expected, name)
    if entry["kind"] == FORGOTTEN:
        yield from _model(number, run / MODEL, entry)


def _model(number: int, folder: Path, entry: Entry) -> Iterator[Finding]:
    if not folder.is_dir():
        yield Finding(number, f"its model, {folder}, is not there", gone=True)
        return
    try:
        found = tensors_hash(folder)
    except ValueError as error:
        yield Finding(number, str(error))
        return
    if found != entry["model"]["after"]:
        yield Finding(
            number, f"{folder}: expected tensors with the hash {entry['model']['after'][:12]}, found {found[:12]}"
        )
    there, expected = other_files(folder), entry["model"]["files"]
    for name in sorted({*there, *expected}):
        if there.get(name) != expected.get(name):
            what = "is not there" if name not in there else "was not there" if name not in expected else "is another"
            yield Finding(number, f"{folder / name} {what}")


def _file(number: int, path: Path, expected: str, what: str) -> Iterator[Finding]:
    if not path.is_file():
        yield Finding(number, f"{what}, {path}, is not there", gone=True)
    elif (found := file_hash(path)) != expected:
        yield Finding(number, f"{path}: expected {what} with the hash {expected[:12]}, found {found[:12]}")


def broken(findings: Sequence[Finding], *, allow_missing: bool) -> list[Finding]:
    """Those that count: all, or only what is there and is not as it was."""
    return [finding for finding in findings if not (allow_missing and finding.gone)]
