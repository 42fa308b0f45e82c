"""What a ledger refuses before anything is trained, from hashes alone."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_modules.ledger.batch import hashes_in, names_of
from lightning_modules.ledger.chain import Entry
from lightning_modules.ledger.hashes import request_hash

NOT_MEMORISED = "not memorised"
FORGOTTEN = "forgotten"
_NAMED = 5


def check_rows(entries: Sequence[Entry], forget: Sequence[str], retain: Sequence[str], name: str | None = None) -> None:
    """Refuse a request that was done before, or that overlaps what is to be kept, and kept rows that were forgotten.

    Args:
        entries: Of the ledger.
        forget: Hash of every row to forget.
        retain: Of every row to keep.
        name: Of the request, where a run has several.

    Raises:
        ValueError: In each of these cases; the message names the entry and the rows.
    """
    whole, where = request_hash(forget), "--ledger" if name is None else f"--requests, {name!r}"
    file = "--forget" if name is None else "its file"
    done: dict[str, int] = {}
    for entry in entries:
        if whole in hashes_in(entry) and entry["kind"] == FORGOTTEN:
            raise ValueError(
                f"{where}: expected a new request, found that of entry {entry['number']}, {entry['request']['id']!r}, done on "
                f"{entry['time'][:10]}; there is nothing to do"
            )
        if entry["kind"] == FORGOTTEN:
            done |= dict.fromkeys(entry["request"]["rows"], entry["number"])
    again = [(number, done[row]) for number, row in enumerate(forget, start=1) if row in done]
    if again:
        raise ValueError(
            f"{where}: expected rows to forget that are new, found {len(again)} of {len(forget)} that were forgotten before, row "
            f"{_pairs(again, 'entry')}; take them out of {file}"
        )
    places = {row: number for number, row in reversed(list(enumerate(retain, start=1)))}
    both = [(number, places[row]) for number, row in enumerate(forget, start=1) if row in places]
    if both:
        raise ValueError(
            f"{where}: expected rows to forget that are not to be kept, found {len(both)} of {len(forget)} in the retain set too, row "
            f"{_pairs(both, 'retain row')}; take them out of the retain set"
        )
    kept = [(number, done[row]) for number, row in enumerate(retain, start=1) if row in done]
    if kept:
        raise ValueError(
            f"--ledger: expected rows to keep that no earlier request had forgotten, found {len(kept)}, retain row "
            f"{_pairs(kept, 'entry')}; take them out of the retain set, which would teach them again"
        )


def _pairs(found: Sequence[tuple[int, int]], what: str) -> str:
    return ", ".join(f"{one} ({what} {other})" for one, other in found[:_NAMED]) + " and more" * (len(found) > _NAMED)


def check_name(entries: Sequence[Entry], name: str) -> None:
    """Refuse the name of an earlier request.

    Raises:
        ValueError: If an entry has it.
    """
    for entry in entries:
        if name in names_of(entry):
            raise ValueError(
                f"expected a new name, found {name!r} of entry {entry['number']}; choose another (--request, or the name in the file of "
                "--requests)"
            )


def check_model(entries: Sequence[Entry], model: str, name: str) -> None:
    """Refuse a model that is not the one that the last entry left. The first entry begins with any.

    Args:
        entries: Of the ledger.
        model: Hash of the model's tensors.
        name: Of the model, for the message.

    Raises:
        ValueError: If it is another one.
    """
    if entries and entries[-1]["model"]["after"] != model:
        last = entries[-1]
        done = [entry for entry in entries if entry["kind"] == FORGOTTEN]  # the others left no model of their own
        way = (
            f"give --model {done[-1]['run']}/model, as seen from the ledger's folder"
            if done
            else f"give the model that entry {entries[0]['number']} began with"
        )
        raise ValueError(
            f"--ledger: expected the model that entry {last['number']}, {last['request']['id']!r}, left, whose tensors have the hash "
            f"{last['model']['after'][:12]}, found {name} with {model[:12]}; {way}, or begin "
            "another ledger"
        )
