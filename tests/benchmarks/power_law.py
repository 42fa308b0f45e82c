"""How a time grows with a size: the exponent of a power law, as a row of a table and as a line of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, linear_regression, median, quantiles
from typing import Any, NamedTuple

from lightning_modules.files import replacing
from tests.benchmarks import telling


@dataclass(frozen=True)
class Series:
    """What was measured while one thing grew.

    Attributes:
        name: Of the line.
        seconds: Size -> seconds in every round, two rounds or more; the rounds of all sizes are interleaved.
    """

    name: str
    seconds: Mapping[int, Sequence[float]]

    def medians(self) -> dict[int, float]:
        """Size -> median seconds."""
        return {size: median(rounds) for size, rounds in self.seconds.items()}


@dataclass(frozen=True)
class Study:
    """Series over the same sizes.

    Attributes:
        title: Of the panel of the picture, and of the table.
        grows: What grows, the axis.
        series: The lines.
        note: What a reader has to know about the table.
        floor: Name of the series that the others are divided by, in brackets behind their times; None for none.
    """

    title: str
    grows: str
    series: Sequence[Series]
    note: str = ""
    floor: str | None = None


class Fit(NamedTuple):
    r"""A power law $t = a\, n^b$, by least squares on the logarithms.

    Attributes:
        exponent: b, the median of those that single rounds give.
        low: First quartile of the rounds' exponents: how far noise moves it.
        high: Third quartile.
        height: $\log a$, of the medians.
        off: The largest factor between a median and the law: 1 where the times are a power law.
    """

    exponent: float
    low: float
    high: float
    height: float
    off: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ({self.low:.2f} to {self.high:.2f})"


def fit(series: Series) -> Fit:
    """The power law of a series.

    Raises:
        ValueError: If it has fewer than two sizes or two rounds, or rounds that differ in number.
    """
    sizes, rounds = list(series.seconds), list(zip(*series.seconds.values(), strict=True))
    if len(sizes) < 2 or len(rounds) < 2:
        raise ValueError(
            f"{series.name}: expected two sizes and two rounds or more, found {len(sizes)} sizes and {len(rounds)} rounds"
        )
    x = [math.log(size) for size in sizes]
    slopes = [linear_regression(x, [math.log(seconds) for seconds in times]).slope for times in rounds]
    low, slope, high = quantiles(slopes, n=4, method="inclusive")
    heights = [math.log(t) - slope * at for at, t in zip(x, series.medians().values(), strict=True)]
    height = fmean(heights)
    return Fit(slope, low, high, height, math.exp(max(abs(each - height) for each in heights)))


def table(study: Study) -> str:
    """The medians of a study in milliseconds, and the exponents, in Markdown."""
    sizes = list(study.series[0].seconds)
    heads = [study.grows, *(short(size) for size in sizes), "exponent (quartiles)", "off by"]
    rows = [heads]
    floor = next((each.medians() for each in study.series if each.name == study.floor), None)
    for series in study.series:
        found, law = series.medians(), fit(series)
        over = {} if floor is None or series.name == study.floor else floor
        times = [milliseconds(found[size]) + (f" ({found[size] / over[size]:.2f})" if over else "") for size in sizes]
        rows.append([series.name, *times, str(law), f"{law.off:.2f}"])
    return telling.lines(rows)


def short(size: float) -> str:
    """A size for a reader.

    Example:
        >>> short(3_000_000), short(1_500_000_000), short(300)
        ('3M', '1500M', '300')
    """
    return f"{size / 1e6:.3g}M" if 1e6 <= size < 1e9 else f"{size / 1e6:.0f}M" if size >= 1e9 else f"{size:g}"


def milliseconds(seconds: float) -> str:
    """Two digits or three of them.

    Example:
        >>> milliseconds(0.0000413), milliseconds(0.00346), milliseconds(1.31134)
        ('0.041', '3.5', '1311')
    """
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 99.5 else f"{value:#.2g}" if value < 9.95 else f"{value:.1f}"


def draw(studies: Sequence[Study], path: Path) -> None:
    """Draw a panel for each study, both axes logarithmic: medians as points, quartiles as bars, the laws as thin lines.

    Args:
        studies: One or more.
        path: Of the picture; its ending says which kind.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    columns = min(3, len(studies))
    rows = -(-len(studies) // columns)
    figure = Figure(figsize=(1.0 + 4.4 * columns, 0.4 + 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, study in zip(panels, studies, strict=False):
        for number, series in enumerate(study.series):
            _line(axes, series, colormaps["tab10"](number % 10))
        sizes = list(study.series[0].seconds)
        axes.set(xscale="log", yscale="log", title=study.title, xlabel=study.grows)
        axes.set_xticks(sizes, [short(size) for size in sizes])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False, title="exponent", title_fontsize=8)
    for axes in panels[len(studies) :]:
        axes.set_visible(False)
    figure.supylabel("milliseconds", fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _line(axes: Any, series: Series, colour: Any) -> None:
    found, law = series.medians(), fit(series)
    sizes, times = list(found), [1e3 * seconds for seconds in found.values()]
    quartiles = [
        quantiles([1e3 * seconds for seconds in rounds], n=4, method="inclusive") for rounds in series.seconds.values()
    ]
    below = [time - low for time, (low, _, _) in zip(times, quartiles, strict=True)]
    above = [high - time for time, (_, _, high) in zip(times, quartiles, strict=True)]
    axes.errorbar(
        sizes,
        times,
        [below, above],
        fmt="o",
        color=colour,
        ms=4,
        capsize=2,
        lw=1,
        label=f"{series.name}: {law.exponent:.2f}",
    )
    axes.plot(
        sizes, [1e3 * math.exp(law.height) * size**law.exponent for size in sizes], color=colour, lw=0.8, alpha=0.6
    )
