"""tradeoff.png: retention against forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.ablation.grid import Grid
from lightning_modules.ablation.methods import Method
from lightning_modules.ablation.statistics import spread
from lightning_modules.files import write_picture
from lightning_modules.run.options.names import NO_RULE

_LEAST = 1e-4  # forget probability at the right edge: smaller ones are not compared
_COLOURS = (0, 1, 2, 3, 4, 5, 6, 8, 9)  # of tab10; its grey is the baseline


def draw_tradeoff(grid: Grid, results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a panel for each method without a baseline, together with the methods that build on it.

    Further to the right a model has forgotten more; higher is better. The grid's baseline is drawn in grey in every
    panel that is not its own.

    - Lines: retain probability against forget probability on the way, mean over the seeds. Values between scored states
      are interpolated in the logarithm of the forget probability. A line ends where the first of the seeds ends.
    - Circles with bars: matches, mean and standard deviation over the seeds.
    - Squares: the same of models mixed with the start model until retention is equal.
    - Diamonds: the same of each method's own end, after its finish.

    Args:
        grid: What was compared.
        results: From `read_results`.
        path: Where the picture is written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    families = _families(grid)
    columns = min(3, len(families))
    rows = -(-len(families) // columns)
    figure = Figure(figsize=(1.0 + 4.4 * columns, 0.4 + 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (name, methods) in zip(panels, families.items(), strict=False):
        if grid.baseline is not None and grid.baseline not in [method.name for method in methods]:
            _draw(axes, grid.baseline, results, "0.6", "-")
        for number, method in enumerate(methods):
            style = "--" if method.placebo or method.rule == NO_RULE else "-"
            _draw(axes, method.name, results, colormaps["tab10"](_COLOURS[number % len(_COLOURS)]), style)
        axes.set(xscale="log", xlim=(1.1, _LEAST), ylim=(-0.02, 1.02), title=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(loc="lower left", fontsize=8, frameon=False)
    for axes in panels[len(families) :]:
        axes.set_visible(False)
    figure.supxlabel("mean forget probability", fontsize="medium")
    figure.supylabel("mean retain probability", fontsize="medium")
    write_picture(path, figure, dpi=120)


def _families(grid: Grid) -> dict[str, list[Method]]:
    """Method without a baseline -> itself and the methods whose baselines lead to it.

    If baselines go round in a circle, the last one before the circle closes stands for all.
    """
    by_name = {method.name: method for method in grid.methods}
    found: dict[str, list[Method]] = {}
    for method in grid.methods:
        passed = [method.name]
        while (above := by_name[passed[-1]].baseline) is not None and above not in passed:
            passed.append(above)
        found.setdefault(passed[-1], []).append(method)
    return found


def _draw(axes: Any, name: str, results: Sequence[Mapping[str, Any]], colour: Any, style: str) -> None:
    import numpy as np

    at = np.geomspace(1.0, _LEAST, 201)
    rows = [row for row in results if row["method"] == name]
    runs = [[row for row in rows if row["id"] == run] for run in dict.fromkeys(row["id"] for row in rows)]
    lines = [_interpolated(run, at) for run in runs if run[0]["curve"]]
    if lines:
        axes.plot(at, np.mean(lines, axis=0), style, color=colour, lw=1.6, label=name)
    for target in dict.fromkeys(row["target"] for row in rows):
        reached = [row for row in rows if row["target"] == target and row["reached"]]
        x, y = (spread([row[f"{split}_probability"] for row in reached]) for split in ("forget", "retain"))
        if x is not None and y is not None:
            marker = {"retained": "s", "end": "D"}.get(target.partition("=")[0], "o")
            axes.errorbar(x.mean, y.mean, y.sd or 0.0, fmt=marker, color=colour, ms=4, capsize=2, lw=1)


def _interpolated(run: Sequence[Mapping[str, Any]], at: Any) -> Any:
    """The run's retain probability at these forget probabilities; NaN at those that it never had."""
    import numpy as np

    # Neither a mixed model nor one after its finish is a state of the training.
    met = [row for row in run if row["reached"] and row["target"].partition("=")[0] not in ("retained", "end")]
    scored = [*run[0]["curve"], *met]
    points = sorted((float(point["forget_probability"]), float(point["retain_probability"])) for point in scored)
    x, y = (np.array(values) for values in zip(*points, strict=True))
    return np.interp(np.log(at), np.log(np.maximum(x, 1e-30)), y, left=np.nan, right=np.nan)
