"""A request that is under way: what the ledger is to say of it, and the earlier ones that it must not bring back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_modules.data.examples import Example, read_examples
from lightning_modules.data.files import existing_file
from lightning_modules.files import write_text
from lightning_modules.ledger.batch import PARTS, divided, largest
from lightning_modules.ledger.chain import Entry, read_chain
from lightning_modules.ledger.entry import finite, limit_of
from lightning_modules.ledger.hashes import canonical, file_hash, request_hash, row_hash
from lightning_modules.ledger.place import LEDGER
from lightning_modules.ledger.refusals import FORGOTTEN
from lightning_modules.ledger.sketch import load_sketch

ROW = "earlier_{}"
"""Names of the protected rows."""


@dataclass(frozen=True)
class Request:
    """A request, from before its run until its entry.

    Attributes:
        said: What request.json holds: everything about it that is known before the training.
        texts: Protected row -> the requests that take turns in it, each as its examples.
        sketches: Protected row -> the files of the sketches that take turns in it.
        limits: Of what `kept_texts` finds, that which was at most at its limit before: it has to be at the end too.
    """

    said: Mapping[str, Any]
    texts: Mapping[str, Sequence[Sequence[Example]]] = field(default_factory=dict)
    sketches: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    limits: Mapping[str, tuple[Sequence[Sequence[Example]], float]] = field(default_factory=dict)

    @property
    def memorised(self) -> bool:
        """Whether there is something to forget."""
        return self.said["kind"] == FORGOTTEN

    def gradients(self) -> dict[str, list[dict[str, Any]]]:
        """Protected row -> its sketches, as dense tensors."""
        return {name: [load_sketch(path) for path in paths] for name, paths in self.sketches.items()}


def protected(
    ledger: Path, entries: Sequence[Entry], rows: int
) -> tuple[dict[str, list[list[Example]]], dict[str, list[Path]]]:
    """The protected rows of a ledger's requests: of those whose texts it kept, and of those whose sketches.

    Where there are more requests than rows, request number n of a kind is in row n mod (rows of that kind); each kind
    has at least one row, and otherwise they are divided as the requests are.

    Args:
        ledger: Its folder.
        entries: Its entries.
        rows: At most so many in all, but at least one of each kind.

    Raises:
        FileNotFoundError: If something that was kept is gone.
        ValueError: If it is not as it was kept.
    """
    done = [entry for entry in entries if entry["kind"] == FORGOTTEN]
    texts = [read_examples(_kept(ledger, entry, "text")) for entry in done if "text" in entry["kept"]]
    sketches = [_kept(ledger, entry, "sketch") for entry in done if "sketch" in entry["kept"]]
    all_of_them = len(texts) + len(sketches)
    of_text = 0
    if texts:
        share = round(min(rows, all_of_them) * len(texts) / all_of_them)
        of_text = min(len(texts), max(1, share - (share == rows and bool(sketches) and rows > 1)))
    of_sketch = min(len(sketches), max(1, rows - of_text)) if sketches else 0
    names = [ROW.format(number) for number in range(of_text + of_sketch)]
    return (
        {name: texts[number::of_text] for number, name in enumerate(names[:of_text])},
        {name: sketches[number::of_sketch] for number, name in enumerate(names[of_text:])},
    )


def held_last(entries: Sequence[Entry]) -> set[str]:
    """Numbers of the entries whose requests were all at most at their limits when they were last measured."""
    found: dict[int, bool] = {}
    for entry in entries:
        if entry["kind"] == FORGOTTEN:
            parts, limit = entry.get(PARTS, ()), limit_of(entry)
            value = largest(parts) if parts else finite(entry["metrics"]["after"]["forget"]["probability"])
            found[entry["number"]] = value is not None and value <= limit
        found |= {one["number"]: one["holds"] for one in entry["earlier"]}
    return {str(number) for number, holds in found.items() if holds}


def kept_texts(ledger: Path, entries: Sequence[Entry]) -> dict[str, tuple[list[Sequence[Example]], float]]:
    """Number of an entry that kept its text -> the rows of each of its requests, and the probability each may have.

    Raises:
        FileNotFoundError: If something that was kept is gone.
        ValueError: If it is not as it was kept.
    """
    found: dict[str, tuple[list[Sequence[Example]], float]] = {}
    for entry in entries:
        if entry["kind"] == FORGOTTEN and "text" in entry["kept"]:
            rows = read_examples(_kept(ledger, entry, "text"))
            found[str(entry["number"])] = (divided(entry.get(PARTS, ()), rows) or [rows], limit_of(entry))
    return found


def _kept(ledger: Path, entry: Entry, what: str) -> Path:
    """The file of what an entry kept, if it is as it was."""
    kept, name = entry["kept"][what], f"the {what} that entry {entry['number']} kept"
    path = existing_file(ledger / kept["file"], name)
    if (found := file_hash(path)) != kept["sha256"]:
        raise ValueError(
            f"{path}: expected {name}, with the hash {kept['sha256'][:12]}, found {found[:12]}: what it says now is not what is to be "
            "protected; put a copy in its place that was whole"
        )
    return path


def row_counts(ledger: str | None, rows: int) -> tuple[int, int]:
    """How many protected rows a run would have, and how many sketches it would hold for them.

    Args:
        ledger: Its folder; None for none.
        rows: At most so many.
    """
    entries = [] if ledger is None else read_chain(Path(ledger) / LEDGER)
    texts, sketches = protected(Path(ledger or ""), entries, rows)
    return len(texts) + len(sketches), sum(map(len, sketches.values()))


def keep_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of a request as JSON lines that `read_examples` reads, the whole file or nothing."""
    write_text(path, "".join(canonical(_as_given(row)).decode() + "\n" for row in rows))


def _as_given(row: Mapping[str, Any]) -> dict[str, Any]:
    """Plain text is an example with an empty question, which no file may have."""
    if row["question"]:
        return dict(row)
    rest = {name: value for name, value in row.items() if name not in ("question", "answer")}
    return rest | {"text": row["answer"]}


def hashes_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The hash of a request, and of each of its rows in their order."""
    each = [row_hash(row) for row in rows]
    return {"sha256": request_hash(each), "rows": each}
