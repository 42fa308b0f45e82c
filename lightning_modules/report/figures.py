"""The figures of a run: drawn into curves.png, and as inline SVG for report.html."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_modules.files import write_picture
from lightning_modules.report.finished import FinishedRun, number
from lightning_modules.report.over_seeds import curves
from lightning_modules.report.svg import inline

# Name of a CSS variable of the page -> its colour in the light scheme, with which the figures are drawn.
COLOURS = {
    "forget": "#c2410c",
    "retain": "#1d4ed8",
    "calm": "#9ca3af",
    "ink": "#1c1917",
    "muted": "#57534e",
    "line": "#d6d3d1",
}
_BARS = 120  # more would be thinner than a pixel on a phone
_SIZE = (4.6, 2.9)

Panel = Callable[[Any, FinishedRun], None]


def panels(run: FinishedRun) -> dict[str, tuple[Panel, str]]:
    """The panels that the run has numbers for: name -> (function that draws it, what it shows in words)."""
    found: dict[str, tuple[Panel, str]] = {}
    if run.curve:
        first, last = run.curve[0], run.curve[-1]
        found["tradeoff"] = (
            _tradeoff,
            f"Line chart over optimizer steps: mean probability of retain answers from {first['retain']:.2f} to {last['retain']:.2f}, of "
            f"forget answers from {first['forget']:.2f} to {last['forget']:.2f}.{_beside(run)}",
        )
    if run.surgery:
        conflicts = sum(row["conflict"] != 0.0 for row in run.surgery)
        found["cosine"] = (
            _cosine,
            f"Bar chart over optimizer steps: cosine of forget and retain gradient; conflict in {conflicts} of {len(run.surgery)} steps.",
        )
        if any(name.startswith("coefficient_") for name in run.surgery[0]):
            words = "Line chart over optimizer steps: coefficient times norm of each gradient, its part in the update."
            found["parts"] = _parts, words
    if "model" in (relearned := run.probes.get("relearn", {})):
        points = relearned["model"]["points"]
        found["relearning"] = (
            _relearning,
            f"Line chart over relearning steps: forget answers that were not taught again go from {float(points[0]['rest']):.2f} to "
            f"{float(points[-1]['rest']):.2f}.",
        )
    return found


def write_png(path: Path, run: FinishedRun) -> bool:
    """Draw the trade-off and the conflict side by side, those that the run has; returns whether it has one."""
    chosen = [panel for name, (panel, _) in panels(run).items() if name in ("tradeoff", "cosine")]
    if chosen:
        write_picture(path, _figure(chosen, run, (5.0 * len(chosen), 3.8)))
    return bool(chosen)


def drawn(run: FinishedRun) -> dict[str, str]:
    """Every panel that the run has numbers for: name -> `<svg>` element."""
    return {name: inline(_figure([panel], run, _SIZE), name, words) for name, (panel, words) in panels(run).items()}


def _figure(chosen: Sequence[Panel], run: FinishedRun, size: tuple[float, float]) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink, line = COLOURS["ink"], COLOURS["line"]
    texts = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {**dict.fromkeys(texts, ink), "axes.edgecolor": COLOURS["muted"], "grid.color": line}
    with mpl.rc_context({**style, "text.parse_math": False}):
        figure = Figure(figsize=size, layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(chosen), squeeze=False).flatten(), chosen, strict=True):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(lw=0.6)
            axes.set_axisbelow(True)
            panel(axes, run)
    return figure


def _beside(run: FinishedRun) -> str:
    said = curves(run)
    return f" {said}" if said else ""


def _tradeoff(axes: Any, run: FinishedRun) -> None:
    steps = [point["step"] for point in run.curve]
    for other in run.others:
        for name in ("retain", "forget"):
            xs, ys = ([point[key] for point in other.curve] for key in ("step", name))
            axes.plot(xs, ys, color=COLOURS[name], lw=0.8, alpha=0.45, zorder=1)
    right = max(curve[-1]["step"] for curve in (run.curve, *(other.curve for other in run.others)) if curve)
    lines = {name: ([point[name] for point in run.curve], name, "-") for name in ("retain", "forget")}
    _lines(axes, steps, lines, right=right)
    goal = run.value("reference", "forget", "probability")
    if goal is not None:
        axes.axhline(goal, color=COLOURS["forget"], lw=1, ls=":")
        axes.annotate("never saw the forget set", (steps[0], goal), color=COLOURS["forget"], fontsize=8, va="bottom")
    best = run.training.get("best")
    if best and best["restored"] and best["step"] != steps[-1]:
        axes.axvline(best["step"], color=COLOURS["muted"], lw=1, ls="--")
        axes.annotate("kept ", (best["step"], 0.5), color=COLOURS["muted"], fontsize=8, ha="right")
    axes.set(
        ylim=(-0.03, 1.05),
        xlabel="optimizer step" + (" (thin lines: other seeds)" if any(other.curve for other in run.others) else ""),
        ylabel="mean probability",
        title="Forgetting against retention",
    )


def _relearning(axes: Any, run: FinishedRun) -> None:
    probe = run.probes["relearn"]
    points = probe["model"]["points"]
    steps = [float(point["step"]) for point in points]
    lines = {"forget": ([number(point["rest"]) for point in points], "others", "-")}
    lines["calm"] = [number(point["taught"]) for point in points], "taught", "--"
    if probe["control"]:
        lines["muted"] = [number(point["rest"]) for point in probe["control"]["points"]], "reference", "-"
    _lines(axes, steps, lines)
    axes.set(ylim=(-0.03, 1.05), xlabel="relearning step", ylabel="mean probability", title="What comes back")


def _lines(
    axes: Any,
    steps: Sequence[float],
    lines: Mapping[str, tuple[Sequence[Any], str, str]],
    right: float | None = None,
) -> None:
    """Draw lines with their names at the right end, or at `right`; names of close ends are moved apart."""
    side = steps[-1] if right is None else right
    ends = sorted((values[-1], colour) for colour, (values, _, _) in lines.items())
    heights: dict[str, float] = {}
    for end, colour in ends:
        lowest = max(heights.values(), default=float("-inf")) + 0.07
        heights[colour] = end if end != end else max(end, lowest)
    for colour, (values, name, style) in lines.items():
        axes.plot(steps, values, style, color=COLOURS[colour], lw=2, marker="o", ms=3)
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(name, (side, heights[colour]), color=COLOURS[colour], fontweight="bold", **place)
    axes.margins(x=0.02)


def _cosine(axes: Any, run: FinishedRun) -> None:
    steps, cosines, together = _binned(run, "cosine")
    colours = [COLOURS["forget"] if value < 0 else COLOURS["calm"] for value in cosines]
    axes.bar(steps, cosines, color=colours, width=0.8 * together)
    axes.axhline(0, color=COLOURS["ink"], lw=0.8)
    conflicts = sum(row["conflict"] != 0.0 for row in run.surgery)
    axes.set(
        xlabel="optimizer step" + (f" (means of {together})" if together > 1 else ""),
        ylabel="cosine, forget and retain",
        title=f"Conflict in {conflicts} of {len(run.surgery)} steps",
    )


def _parts(axes: Any, run: FinishedRun) -> None:
    names = [name for name in run.surgery[0] if name.startswith("coefficient_")]
    for label in (name.removeprefix("coefficient_") for name in names):
        steps, values, together = _binned(run, f"coefficient_{label}", f"norm_{label}")
        axes.plot(steps, values, color=COLOURS.get(label, COLOURS["calm"]), lw=2, label=label)
        axes.set_xlabel("optimizer step" + (f" (means of {together})" if together > 1 else ""))
    axes.axhline(0, color=COLOURS["ink"], lw=0.8)
    axes.legend(frameon=False, fontsize=8)
    axes.set(ylabel="coefficient x norm", title="What the update is made of")


def _binned(run: FinishedRun, *columns: str) -> tuple[list[float], list[float], int]:
    """Returns steps, the product of some columns, and how many steps each value is the mean of: 1 if they are few."""
    together = -(-len(run.surgery) // _BARS)
    groups = [run.surgery[start : start + together] for start in range(0, len(run.surgery), together)]
    steps = [fmean(row["step"] for row in group) for group in groups]
    values = [fmean(math.prod(row[name] for name in columns) for row in group) for group in groups]
    return steps, values, together
