"""depth.png: what is kept against what comes back, where each method ends by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.ablation.grid import Grid
from lightning_modules.ablation.results import REFERENCE, read_models
from lightning_modules.ablation.statistics import Spread, spread
from lightning_modules.files import write_picture

_LEAST = 1e-3  # a smaller probability is drawn as this one
HELD_OUT, SEEN = "retain_heldout_probability", "retain_probability"


def draw_depth(grid: Grid, results: Sequence[Mapping[str, Any]], folder: Path, path: Path) -> None:
    """Draw a panel for each relearning attack, with a numbered point for each method and a star for the reference.

    Further to the right less comes back, higher is better. Upwards is the retain probability, of examples that no
    method's training sees where the grid has some. Means over the seeds; bars are standard deviations. Nothing is drawn
    for a grid without attacks, or where no method has ended.

    Args:
        grid: What was compared.
        results: From `read_results`.
        folder: With the scores of the references.
        path: Where the picture is written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    attacks = grid.evaluate.attacks
    ends = [row for row in results if row["target"].startswith("end=") and row["reached"]]
    if not attacks or not ends:
        return
    kept = HELD_OUT if any(row[HELD_OUT] is not None for row in ends) else SEEN
    names = [method.name for method in grid.methods]
    figure = Figure(figsize=(4.6 * len(attacks), 4.4 + 0.18 * (len(names) + 1)), layout="constrained")
    panels = figure.subplots(1, len(attacks), sharey=True, squeeze=False)[0]
    references = _references(grid, folder)
    colours = [colormaps["tab20"](place) for place in (*range(0, 20, 2), *range(1, 20, 2))]  # the pale ones last
    for axes, (attack, how) in zip(panels, attacks.items(), strict=True):
        for number, name in reversed(list(enumerate(names, start=1))):  # the first ones on top
            rows = [row for row in ends if row["method"] == name]
            _point(axes, _means(rows, f"attack {attack}", kept), f"{number}", colours[(number - 1) % 20], name)
        _point(axes, _means(references, f"attack {attack}", kept), "*", "black", REFERENCE)
        steps = f"{how['steps']:.0f} steps at {how['lr']:g}" if {"steps", "lr"} <= set(how) else "its attack"
        axes.set(xscale="log", xlim=(1.1, 0.8 * _LEAST), title=f"{attack}: after {steps}")
        axes.set_xlabel("mean forget probability; better to the right")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set(ylim=(-0.02, 1.05), ylabel=f"mean retain probability, {'held out' if kept == HELD_OUT else 'seen'}")
    drawn = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    order = [name for name in (*names, REFERENCE) if name in drawn]
    figure.legend(
        [drawn[name] for name in order], order, loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    write_picture(path, figure, dpi=120)


def _references(grid: Grid, folder: Path) -> list[dict[str, Any]]:
    """The scores of each model seed's reference, by the columns' names."""
    scores = [known["reference"] for _, known in read_models(grid, folder) if known["reference"] is not None]
    return [row | {f"attack {name}": value for name, value in row.get("attacks", {}).items()} for row in scores]


def _means(rows: Sequence[Mapping[str, Any]], attack: str, kept: str) -> tuple[Spread | None, Spread | None]:
    x, y = ([float(row[name]) for row in rows if row.get(name) is not None] for name in (attack, kept))
    return spread(x), spread(y)


def _point(axes: Any, at: tuple[Spread | None, Spread | None], mark: str, colour: Any, label: str) -> None:
    x, y = at
    if x is None or y is None:
        return
    axes.errorbar(max(x.mean, _LEAST), y.mean, y.sd or 0.0, x.sd or 0.0, fmt="none", ecolor=colour, lw=1, capsize=2)
    size = 5 + 4 * len(mark)
    axes.plot(max(x.mean, _LEAST), y.mean, marker=f"${mark}$", ms=size, color=colour, ls="none", label=label)
