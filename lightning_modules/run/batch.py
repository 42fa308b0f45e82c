"""The requests of a run with a ledger: one, or with --requests several, each with a name and rows of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_modules.data.examples import Example, evenly_spaced
from lightning_modules.data.pairs import VALIDATION_EXAMPLES
from lightning_modules.data.requests import read_requests, together
from lightning_modules.data.tokenization import Encoded, encode_example
from lightning_modules.ledger.batch import PARTS, check_apart, divided, name_of_batch, parts_of
from lightning_modules.ledger.chain import Entry
from lightning_modules.ledger.refusals import check_name, check_rows
from lightning_modules.ledger.request import hashes_of
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.run import Run, Splits
from lightning_modules.training.callbacks import TradeoffCurve


def batch_of(options: UnlearnOptions, splits: Splits) -> dict[str, list[Example]]:
    """Name -> rows of the requests of --requests; none without it.

    Raises:
        ValueError: If the files have changed since the rows to forget were read from them.
    """
    if options.data.requests is None:
        return {}
    found = read_requests(options.data.requests)
    if hashes_of(together(found))["rows"] != hashes_of(splits["forget"])["rows"]:
        raise ValueError(
            f"--requests: expected files that stay as they are, found that one of {options.data.requests} has changed just now; start again"
        )
    return found


def name_of(options: UnlearnOptions, splits: Splits, batch: Mapping[str, Sequence[Example]]) -> str:
    """What the entry will be called."""
    return name_of_batch(list(batch)) if batch else options.ledger.request or hashes_of(splits["forget"])["sha256"][:12]


def check_requests(options: UnlearnOptions, splits: Splits, entries: Sequence[Entry]) -> None:
    """Refuse requests that were done before, whose names were, or whose rows are elsewhere too.

    Raises:
        ValueError: See `check_rows`, `check_name` and `check_apart`; of several requests it says of which.
    """
    batch = batch_of(options, splits)
    check_apart(batch)
    retain = hashes_of(splits["retain"])["rows"]
    for name, rows in batch.items() or [(None, splits["forget"])]:
        check_rows(entries, hashes_of(rows)["rows"], retain, name)
    for name in (*batch, name_of(options, splits, batch)):
        check_name(entries, name)


def said_of(batch: Mapping[str, Sequence[Example]], known: Mapping[str, float]) -> dict[str, Any]:
    """What request.json says besides of several requests."""
    return {PARTS: parts_of(batch, known)} if batch else {}


def mean_known(batch: Mapping[str, Sequence[Example]], known: Mapping[str, float]) -> float:
    """The mean probability over all rows."""
    if not batch:
        return known["forget"]
    return sum(known[name] * len(rows) for name, rows in batch.items()) / sum(map(len, batch.values()))


def known_of_each(run: Run[UnlearnOptions]) -> list[float]:
    """How well the model knows each request of a batch before; nothing without one."""
    return [part["known"] for part in _parts(run) if isinstance(part["known"], float)]  # request.json spells NaN


def best_known(run: Run[UnlearnOptions], curve: TradeoffCurve) -> Sequence[Encoded]:
    """The examples by which it is seen how a rate forgets: of a batch those of the request that is known best."""
    parts = [rows for rows, limit in curve.at_most.values() if limit is None]
    known = known_of_each(run)
    return parts[known.index(max(known))] if len(parts) == len(known) > 0 else curve.encoded["forget"]


def held_down(run: Run[UnlearnOptions]) -> dict[str, tuple[list[Encoded], float | None]]:
    """What has to be low at a run's end beside the whole forget set: `TradeoffCurve`'s `at_most`.

    Each request of a batch, by some examples, has to be at the run's target (None); earlier requests whose texts the
    ledger kept at their own limits. Nothing without a ledger.
    """
    if run.request is None:
        return {}
    longest = run.options.data.max_length

    def encoded(rows: Sequence[Example]) -> list[Encoded]:
        return [encode_example(run.tokenizer, row, longest) for row in rows]

    parts = divided(_parts(run), run.splits["forget"])
    found: dict[str, tuple[list[Encoded], float | None]] = {
        f"part {number}": (encoded(evenly_spaced(rows, VALIDATION_EXAMPLES)), None) for number, rows in enumerate(parts)
    }
    for entry, (requests, limit) in run.request.limits.items():
        found |= {f"entry {entry}, {number}": (encoded(rows), limit) for number, rows in enumerate(requests)}
    return found


def _parts(run: Run[UnlearnOptions]) -> list[dict[str, Any]]:
    return run.request.said.get(PARTS, []) if run.request is not None else []


def check_same_batch(said: Mapping[str, Any], batch: Mapping[str, Sequence[Example]]) -> None:
    """Refuse to go on with a run whose rows belong to other requests now.

    Raises:
        ValueError: If names, hashes or their order differ from what was said before the run.
    """
    before = [(part["id"], part["sha256"], part["rows"]) for part in said.get(PARTS, ())]
    now = [(part["id"], part["sha256"], part["rows"]) for part in parts_of(batch, dict.fromkeys(batch, 0.0))]
    if before != now:
        raise ValueError(
            f"--requests: expected the requests that the run began with, {', '.join(part[0] for part in before)}, found others: their "
            "names, rows or order; put the files back as they were, and go on with --resume"
        )
