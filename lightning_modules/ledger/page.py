"""report.html of a ledger: what was asked, what was done and what that proves, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_modules.files import write_picture, write_text
from lightning_modules.ledger.batch import PARTS
from lightning_modules.ledger.chain import Entry
from lightning_modules.ledger.criteria import KINDS
from lightning_modules.ledger.entry import limit_of
from lightning_modules.ledger.picture import figure
from lightning_modules.ledger.place import PAGE, PICTURE
from lightning_modules.ledger.refusals import FORGOTTEN
from lightning_modules.ledger.table import over_time, shown
from lightning_modules.ledger.verify import Finding
from lightning_modules.report.html import templates
from lightning_modules.report.svg import inline

_HERE = Path(__file__).parent
_TITLE = "Mean probability of each request's answers after each later request"


def write_page(folder: Path, entries: Sequence[Entry], findings: Sequence[Finding]) -> None:
    """Write report.html and, where something was forgotten, requests.png into a ledger's folder."""
    from markupsafe import Markup

    environment = templates(_HERE)
    requests, values = over_time(entries)
    drawn = None
    if requests:
        names, limits = [entry["request"]["id"] for entry in requests], [limit_of(entry) for entry in requests]
        picture = figure(names, values, limits, _TITLE, numbers=[entry["number"] for entry in requests])
        write_picture(folder / PICTURE, picture)
        drawn = Markup(inline(picture, "requests", _words(requests, values)))
    page = environment.get_template("page.html.jinja").render(
        style=Markup((_HERE.parent / "report" / "page.css").read_text(encoding="utf-8")),
        requests=[said(entry) for entry in entries],
        findings=[f"Entry {finding.entry}: {finding.said}." if finding.entry else finding.said for finding in findings],
        picture=drawn,
        head=entries[-1]["hash"] if entries else "",
        count=len(entries),
    )
    write_text(folder / PAGE, page)


def _words(requests: Sequence[Entry], values: Sequence[Sequence[float | None]]) -> str:
    last = [row[-1] for row in values]
    known = [value for value in last if value is not None]
    return (
        f"{_TITLE}: {len(requests)} requests; after the last one the largest known probability is {max(known):.3f}."
        if known
        else f"{_TITLE}: {len(requests)} requests."
    )


def said(entry: Entry) -> dict[str, Any]:
    """An entry in sentences."""
    counts, metrics = entry["counts"], entry["metrics"]
    before, after = metrics["before"], metrics["after"]
    told = [
        f"On {entry['time'][:10]} it was asked that {counts['forget']} {_plural(counts['forget'], 'question')} with "
        f"{_plural(counts['forget'], 'its answer', 'their answers')} be forgotten; {counts['retain']} others were to be kept."
    ]
    if entry["kind"] != FORGOTTEN:
        told.append(
            f"The model gave these answers a mean probability of {shown(counts['known'])} before anything was done, at most the limit "
            f"of {limit_of(entry):g}: it had not memorised them, and was left as it was."
        )
        return {"title": _title(entry), "sentences": told, "verdicts": [], "each": [], "hash": entry["hash"]}
    told.append(
        f"Before, the model gave the right answers a mean probability of {shown(before['forget']['probability'])}; afterwards "
        f"{shown(after['forget']['probability'])}{_between(after['forget'])}. Of the answers to keep it was "
        f"{shown(before['retain']['probability'])} before and {shown(after['retain']['probability'])} afterwards."
    )
    relearned = entry["probes"].get("relearn", {})
    if "model" in relearned:
        beside = relearned.get("control")
        told.append(
            "When some of the forgotten answers were taught to a copy again, the probability of the others rose from "
            f"{shown(relearned['model']['before'])} to {shown(relearned['model']['after'])}"
            + (f"; in a model that had never seen them, to {shown(beside['after'])}." if beside else ".")
        )
    else:
        told.append("Whether the answers come back when some of them are taught again was not measured.")
    if entry["earlier"]:
        above = [one for one in entry["earlier"] if not one["holds"]]
        told.append(
            f"Of {len(entry['earlier'])} earlier {_plural(len(entry['earlier']), 'request')} whose text was kept, "
            + (
                f"{len(above)} rose above their limit: entry {', '.join(str(one['number']) for one in above)}."
                if above
                else "all stayed at or below their limits."
            )
        )
    parts = entry.get(PARTS, [])
    if parts:
        above = [part["id"] for part in parts if not part["holds"]]
        told.append(
            f"{len(parts)} requests were done together, and each has to be at or below the limit by itself: "
            + (f"{', '.join(above)} {'is' if len(above) == 1 else 'are'} not." if above else "all are.")
        )
    rows = [
        {
            "what": KINDS[one["criterion"]].words,
            "limit": f"{one['rule']} {one['limit']:g}",
            "found": shown(one["found"]),
            "verdict": "holds" if one["holds"] else "does not hold",
        }
        for one in entry["verdicts"]
    ]
    each = [
        {
            **{name: part[name] for name in ("id", "rows")},
            "before": shown(part["before"]),
            "after": shown(part["after"]),
            "limit": f"at most {part['limit']:g}",
            "verdict": "holds" if part["holds"] else "does not hold",
        }
        for part in parts
    ]
    return {"title": _title(entry), "sentences": told, "verdicts": rows, "each": each, "hash": entry["hash"]}


def _title(entry: Entry) -> str:
    return f"{entry['number']}. {entry['request']['id']}: {entry['kind']}"


def _between(scores: dict[str, Any]) -> str:
    interval = scores.get("interval")
    return "" if interval is None else f" (95 % interval {shown(interval[0])} to {shown(interval[1])})"


def _plural(count: int, one: str, many: str | None = None) -> str:
    return one if count == 1 else many or f"{one}s"
