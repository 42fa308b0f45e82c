"""The chain: one line of JSON a request, each with the hash of the line before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_modules.files import replacing
from lightning_modules.ledger.hashes import canonical, sha256

Entry = dict[str, Any]

START = "0" * 64
"""What the first entry names as the one before it."""


class BrokenChainError(ValueError):
    """A ledger of which some entry is not as it was written.

    Attributes:
        entry: Its number, from 1.
    """

    def __init__(self, path: Path, entry: int, found: str) -> None:
        super().__init__(f"{path}, entry {entry}: expected the entry as it was written, found {found}")
        self.entry = entry


def sealed(contents: Mapping[str, Any], entries: list[Entry]) -> Entry:
    r"""The entry that follows others: its contents with its number, the hash of the entry before, and its own.

    $$h_n = \mathrm{SHA256}(\mathrm{canonical}(\text{entry}_n \text{ without } h_n)), \qquad
    \text{entry}_n \ni h_{n-1}$$

    Raises:
        ValueError: If JSON cannot hold the contents.
    """
    entry = {**contents, "number": len(entries) + 1, "previous": entries[-1]["hash"] if entries else START}
    return entry | {"hash": sha256(canonical(entry))}


def read_chain(path: Path) -> list[Entry]:
    """The entries of a ledger; none where there is no file.

    Raises:
        BrokenChainError: At the first entry that is not as it was written: a byte of it differs, its hash or that of
            the entry before does not hold, or the line is torn.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:
        raise BrokenChainError(path, len(lines), "a line without its end")
    entries: list[Entry] = []
    for number, line in enumerate(lines[:-1], start=1):
        entries.append(_entry(path, number, line, entries[-1]["hash"] if entries else START))
    return entries


def _entry(path: Path, number: int, line: bytes, previous: str) -> Entry:
    try:
        entry = json.loads(line)
        same = isinstance(entry, dict) and canonical(entry) == line
    except (ValueError, RecursionError) as error:
        raise BrokenChainError(path, number, f"no JSON ({error})") from error
    if not same:
        raise BrokenChainError(path, number, "JSON that is written in another way")
    if entry.get("hash") != sha256(canonical({key: value for key, value in entry.items() if key != "hash"})):
        raise BrokenChainError(path, number, "contents that do not have its hash")
    if entry.get("number") != number or entry.get("previous") != previous:
        raise BrokenChainError(path, number, f"number {entry.get('number')}, and another entry before it")
    return entry


def append(path: Path, contents: Mapping[str, Any]) -> Entry:
    """Add an entry: the file with it takes the place of the file without it, in one rename, on the disk before.

    A process that is killed at any moment leaves the ledger with or without the whole entry. Only a process that holds
    the ledger's lock may call it.

    Raises:
        BrokenChainError: If the chain before it is broken. Nothing is written then.
        OSError: In one sentence, if the disk is full or cannot be written.
    """
    entries = read_chain(path)
    entry = sealed(contents, entries)
    before = path.read_bytes() if path.exists() else b""
    with replacing(path) as temporary:
        temporary.write_bytes(before + canonical(entry) + b"\n")
    return entry
