"""A ledger as a table: one line a request, and every request's probability after every later one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightning_modules.ledger.batch import PARTS, largest
from lightning_modules.ledger.chain import Entry
from lightning_modules.ledger.entry import finite, limit_of
from lightning_modules.ledger.refusals import FORGOTTEN
from lightning_modules.report.finished import shown as score_shown

HEADINGS = ("entry", "request", "date", "rows", "forget", "limit", "retain", "criteria", "earlier", "hash")


def lines(entries: Sequence[Entry]) -> list[list[str]]:
    """The cells of every entry, under `HEADINGS`; below that of a batch, those of its requests."""
    return [line for entry in entries for line in (_line(entry), *map(_part, entry.get(PARTS, ())))]


def _part(part: Mapping[str, Any]) -> list[str]:
    forget = f"{shown(part['before'])} -> {shown(part['after'])}"
    verdict = "holds" if part["holds"] else "does not hold"
    return ["", f"- {part['id']}", "", str(part["rows"]), forget, f"{part['limit']:g}", "", verdict, "", ""]


def _line(entry: Entry) -> list[str]:
    before, after = entry["metrics"]["before"], entry["metrics"]["after"]
    trained = entry["kind"] == FORGOTTEN
    forget, retain = (
        f"{shown(before[of]['probability'])} -> {shown(after[of]['probability'])}" for of in ("forget", "retain")
    )
    return [
        str(entry["number"]),
        entry["request"]["id"],
        entry["time"][:10],
        str(entry["counts"]["forget"]),
        forget if trained else f"{shown(entry['counts']['known'])}, {entry['kind']}",
        f"{limit_of(entry):g}",
        retain if trained else shown(before["retain"]["probability"]),
        held(entry["verdicts"]),
        held(entry["earlier"]),
        entry["hash"][:12],
    ]


def held(verdicts: Sequence[dict[str, Any]]) -> str:
    """How many of some verdicts hold.

    Example:
        >>> held([{"holds": True}, {"holds": False}]), held([])
        ('1 of 2', '-')
    """
    return f"{sum(one['holds'] for one in verdicts)} of {len(verdicts)}" if verdicts else "-"


def shown(value: object) -> str:
    """A number of a table."""
    if value is None:
        return "not measured"
    return score_shown(value)


def over_time(entries: Sequence[Entry]) -> tuple[list[Entry], list[list[float | None]]]:
    """Every forgotten request, and its probability after every entry: None before it, and where nobody knows.

    An earlier request is known where the ledger kept its text. Of a batch it is the highest of its requests.
    """
    requests = [entry for entry in entries if entry["kind"] == FORGOTTEN]
    found: list[list[float | None]] = []
    for request in requests:
        row: list[float | None] = []
        for entry in requests:
            later = {one["number"]: one["probability"] for one in entry["earlier"]}
            own = (
                largest(entry[PARTS]) if PARTS in entry else finite(entry["metrics"]["after"]["forget"]["probability"])
            )
            row.append(own if entry is request else later.get(request["number"]))
        found.append(row)
    return requests, found


def table(entries: Sequence[Entry], title: str) -> Table:
    """The table for a terminal: of criteria and earlier requests it says how many hold.

    Dates and hashes are left to the report, for which a terminal is wide enough.
    """
    drawn = Table(title=escape(title), title_style="bold", header_style="bold")
    shown_here = [place for place, heading in enumerate(HEADINGS) if heading not in ("date", "hash")]
    for place in shown_here:
        drawn.add_column(HEADINGS[place], overflow="fold")
    for cells in lines(entries):
        drawn.add_row(*(escape(cells[place]) for place in shown_here))
    return drawn
