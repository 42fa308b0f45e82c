"""Several requests that one run forgets together, and what its entry says of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

from lightning_modules.data.examples import Example
from lightning_modules.folder import EVALUATION
from lightning_modules.ledger.hashes import request_hash, row_hash

Item = TypeVar("Item")

PARTS = "requests"
"""Key of an entry, and of request.json: the requests of a batch, in the order of their rows. Others have none."""


def name_of_batch(names: Sequence[str]) -> str:
    """The name of the entry of some requests."""
    return ", ".join(names)


def names_of(entry: Mapping[str, Any]) -> list[str]:
    """Every name that an entry takes: its own, and those of its requests."""
    return [entry["request"]["id"], *(part["id"] for part in entry.get(PARTS, ()))]


def hashes_in(entry: Mapping[str, Any]) -> list[str]:
    """The hash of an entry's rows together, and of each of its requests."""
    return [entry["request"]["sha256"], *(part["sha256"] for part in entry.get(PARTS, ()))]


def check_apart(requests: Mapping[str, Sequence[Example]]) -> None:
    """Refuse a row that two requests of a batch have.

    Raises:
        ValueError: If there is one; the message names both places.
    """
    places: dict[str, tuple[str, int]] = {}
    for name, rows in requests.items():
        for number, row in enumerate(map(row_hash, rows), start=1):
            other, place = places.setdefault(row, (name, number))
            if other != name:
                raise ValueError(
                    f"--requests: expected different rows in each request, found row {number} of {name!r} in {other!r} too, row {place}: "
                    "whose verdict would it count for? Take it out of one of them"
                )


def parts_of(requests: Mapping[str, Sequence[Example]], known: Mapping[str, float]) -> list[dict[str, Any]]:
    """What request.json says of each request: name, hash, number of rows, and how well the model knows it."""
    return [
        {"id": name, "sha256": request_hash([row_hash(row) for row in rows]), "rows": len(rows), "known": known[name]}
        for name, rows in requests.items()
    ]


def divided(parts: Sequence[Mapping[str, Any]], items: Sequence[Item]) -> list[Sequence[Item]]:
    """What belongs to each request, of something that every row has one of, in the order of the rows.

    Example:
        >>> divided([{"rows": 1}, {"rows": 2}], ["a", "b", "c"])
        [['a'], ['b', 'c']]
    """
    ends = [0, *accumulate(part["rows"] for part in parts)]
    return [items[start:end] for start, end in pairwise(ends)]


def scored(run: Path, parts: Sequence[Mapping[str, Any]], limit: float) -> list[dict[str, Any]]:
    """What the entry says of each request: its mean forget probability before and after, and whether that holds.

    Args:
        run: Folder of the run. One that trained nothing has no evaluation.jsonl: what was known is left.
        parts: From request.json.
        limit: Of the entry; each request has to be at most there by itself.
    """
    values: dict[str, list[Any]] = {"before": [], "after": []}
    path = run / EVALUATION
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        if row["split"] == "forget" and row["model"] in values:
            values[row["model"]].append(row.get("probability"))
    count = sum(part["rows"] for part in parts)
    means = {
        model: [mean(part) for part in divided(parts, found)] if len(found) == count else [None] * len(parts)
        for model, found in values.items()
    }
    if not path.exists():
        means = {model: [part["known"] for part in parts] for model in values}
    return [
        {
            **{name: part[name] for name in ("id", "sha256", "rows")},
            "before": before,
            "after": after,
            "limit": limit,
            "holds": after is not None and after <= limit,
        }
        for part, before, after in zip(parts, means["before"], means["after"], strict=True)
    ]


def mean(values: Sequence[Any]) -> float | None:
    """The mean of some probabilities; None where one of them is none, such as NaN, which JSON has as a word."""
    numbers = [value for value in values if isinstance(value, (int, float)) and value == value]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def largest(parts: Sequence[Mapping[str, Any]]) -> float | None:
    """The largest probability that a request of a batch is left with; None where one of them is not known."""
    found = [part["after"] for part in parts]
    return None if None in found else max(found)
