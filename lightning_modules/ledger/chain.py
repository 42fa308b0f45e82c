"""The chain: one line of JSON a request, each with the hash of the line before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_modules.files import replacing
from lightning_modules.ledger.hashes import canonical, sha256

Entry = dict[str, Any]

START = "0" * 64
"""What the first entry names as the one before it."""


class Broken(NamedTuple):
    """Where a ledger is not as it was written.

    Attributes:
        entry: The number of the first such entry, from 1.
        found: What was found there, in words.
    """

    entry: int
    found: str


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
        ValueError: If one of them is not as it was written, see `walked`; the message names it.
    """
    entries, broken = walked(path)
    if broken is not None:
        raise ValueError(
            f"{path}, entry {broken.entry}: expected the entry as it was written, found {broken.found}; `gradsurgery ledger verify` says "
            "what else is not, and a copy that was whole has to take its place"
        )
    return entries


def walked(path: Path) -> tuple[list[Entry], Broken | None]:
    """The entries of a ledger up to the first that is not as it was written, and where that is.

    An entry is broken if a byte of it differs, if its hash or that of the entry before does not hold, or if the line is
    torn.
    """
    entries: list[Entry] = []
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        if number == len(lines):
            return entries, Broken(number, "a line without its end") if line else None
        entry = _entry(number, line, entries[-1]["hash"] if entries else START)
        if isinstance(entry, str):
            return entries, Broken(number, entry)
        entries.append(entry)
    return entries, None


def _entry(number: int, line: bytes, previous: str) -> Entry | str:
    """The entry of a line, or what is wrong with it."""
    try:
        entry = json.loads(line)
        same = isinstance(entry, dict) and canonical(entry) == line
    except (ValueError, RecursionError) as error:
        return f"no JSON ({error})"
    if not same:
        return "JSON that is written in another way"
    if entry.get("hash") != sha256(canonical({key: value for key, value in entry.items() if key != "hash"})):
        return "contents that do not have its hash"
    if entry.get("number") != number or entry.get("previous") != previous:
        return f"number {entry.get('number')}, and another entry before it"
    return entry


def append(path: Path, contents: Mapping[str, Any]) -> Entry:
    """Add an entry: the file with it takes the place of the file without it, in one rename, on the disk before.

    A process that is killed at any moment leaves the ledger with or without the whole entry. Only a process that holds
    the ledger's lock may call it.

    Raises:
        ValueError: If the chain before it is broken. Nothing is written then.
        OSError: In one sentence, if the disk is full or cannot be written.
    """
    entries = read_chain(path)
    entry = sealed(contents, entries)
    before = path.read_bytes() if path.exists() else b""
    with replacing(path) as temporary:
        temporary.write_bytes(before + canonical(entry) + b"\n")
    return entry
