"""The picture of ratios: what stands in RESULTS.md as a multiple of something, table by table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from lightning_modules.files import write_picture

_RATIO = re.compile(r"(\d+\.\d+)\**(?=$| \()")  # and what stands in brackets behind it
_RULE = re.compile(r"\|[-:| ]+")


class Panel(NamedTuple):
    """A table of ratios.

    Attributes:
        title: Where it stands, and what its numbers are multiples of.
        rows: What was measured, from top to bottom.
        cases: Case -> row -> ratio; a row may miss in a case.
    """

    title: str
    rows: Sequence[str]
    cases: dict[str, dict[str, float]]


def panels(name: str, text: str) -> Iterator[Panel]:
    """The tables in Markdown whose first word is "times".

    Args:
        name: Of what the text says.
        text: With tables and without.

    Example:
        >>> list(panels("here", "| times a copy | long |\\n|---|---:|\\n| ours | **1.20** (best 1.1) |\\n| all | 3 ms |"))
        [Panel(title='here: times a copy', rows=['ours'], cases={'long': {'ours': 1.2}})]
    """
    for is_table, block in groupby(text.splitlines(), lambda line: line.startswith("|")):
        if is_table and (cells := [_cells(line) for line in block if not _RULE.fullmatch(line)])[0][0].startswith(
            "times"
        ):
            (corner, *heads), *lines = cells
            cases: dict[str, dict[str, float]] = {head: {} for head in heads}
            for row, *found in lines:
                for head, cell in zip(heads, found, strict=True):
                    if ratio := _RATIO.match(cell):
                        cases[head][row] = float(ratio[1])
            rows = [row for row, *_ in lines if any(row in case for case in cases.values())]
            if rows:
                yield Panel(f"{name}: {corner}", rows, {case: ratios for case, ratios in cases.items() if ratios})


def _cells(line: str) -> list[str]:
    return [cell.strip().strip("*").replace("`", "") for cell in line.strip().strip("|").split("|")]


def draw(found: Iterable[Panel], path: Path) -> bool:
    """Draw a panel for each table: a line a row, a point a case, 1 marked; a wide range is logarithmic.

    Returns:
        Whether there was anything to draw; nothing is written if not.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    drawn = list(found)
    if not drawn:
        return False
    columns = min(2, len(drawn))
    lines = [drawn[place : place + columns] for place in range(0, len(drawn), columns)]
    heights = [1.6 + 0.24 * max(len(panel.rows) for panel in line) for line in lines]
    figure = Figure(figsize=(0.5 + 7.5 * columns, sum(heights)), layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for places, line in zip(grid, lines, strict=True):
        for axes in places[len(line) :]:
            axes.set_visible(False)
        for axes, panel in zip(places, line, strict=False):
            for case, ratios in panel.cases.items():
                axes.plot(list(ratios.values()), [panel.rows.index(row) for row in ratios], "o", ms=4, label=case)
            axes.axvline(1.0, color="grey", lw=0.8)
            axes.set(ylim=(len(panel.rows) - 0.5, -0.5))
            axes.set_yticks(range(len(panel.rows)), panel.rows, fontsize=8)
            axes.set_title(panel.title, fontsize=10, loc="left")
            every = [1.0, *(ratio for ratios in panel.cases.values() for ratio in ratios.values())]
            if max(every) > 3 * min(every):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(ScalarFormatter())
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(axis="x", alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    write_picture(path, figure, dpi=100)
    return True
