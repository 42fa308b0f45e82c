"""The picture of a ledger: requests from top to bottom, time from left to right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def figure(
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    limits: Sequence[float],
    title: str,
    *,
    numbers: Sequence[int] | None = None,
) -> Any:
    """Draw every request's forget probability after every later one, as a matplotlib figure.

    A field is the redder the nearer it is to 1; one above its request's limit has a bold number.

    Args:
        names: Of the requests, in the order of time.
        values: Request -> after each request; None where there is nothing, or nobody knows.
        limits: Of each request.
        title: Above it.
        numbers: Of the requests' entries; 1, 2, ... where they are not given.
    """
    import numpy as np
    from matplotlib.figure import Figure

    count = len(names)
    drawn = Figure(figsize=(2.6 + 0.85 * count, 1.5 + 0.5 * count), layout="constrained")
    axes = drawn.subplots()
    field = np.array([[math.nan if value is None else value for value in row] for row in values]).reshape(count, count)
    axes.imshow(field, cmap="Oranges", vmin=0.0, vmax=1.0, aspect="auto")
    for row, limit in zip(range(count), limits, strict=True):
        for column in range(row, count):
            value = values[row][column]
            text = "?" if value is None else f"{value:.3f}"
            above = value is not None and value > limit
            colour = "white" if value is not None and value > 0.6 else "#1c1917"
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                color=colour,
                fontsize=9,
                fontweight="bold" if above else "normal",
            )
    numbers = numbers or range(1, count + 1)
    axes.set_xticks(range(count), [f"after {number}" for number in numbers], fontsize=8)
    labels = [f"{number} {name}"[:24] for number, name in zip(numbers, names, strict=True)]
    axes.set_yticks(range(count), labels, fontsize=8, parse_math=False)
    axes.set_title(title, fontsize=10)
    return drawn
