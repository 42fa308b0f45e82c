"""The heat map of the G-effect by layer and step, drawn from the file that `GEffectLogger` writes.

`lightning_modules.training.callbacks.g_effect` says what the G-effect is, and has the logger, which this module shows
too: `lm.g_effect` is both.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.files import write_picture
from lightning_modules.training.callbacks.g_effect import GEffectLogger

__all__ = ["GEffectLogger", "heat_map"]

_LAYER = re.compile(r"^(?P<before>.*?)layer (?P<number>\d+)(?P<after>.*)$")


def heat_map(csv_path: str | Path, png_path: str | Path) -> None:
    """Draw the cosines in a `GEffectLogger`'s file: red where forgetting hurts retention, blue where both agree.

    Steps run from left to right, layers from top to bottom. Layers of one kind (attention, mlp, ...) stand together, by
    their number. The colours are symmetric around 0 and reach to the largest absolute cosine. Cells that are missing or
    not finite are grey. Several protected objectives are drawn side by side.

    Args:
        csv_path: The file.
        png_path: The image; an existing one is overwritten.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no rows of a `GEffectLogger`.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with Path(csv_path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [column.removeprefix("cosine_") for column in (rows[0] if rows else {}) if column.startswith("cosine_")]
    if not names or list(rows[0])[:2] != ["step", "layer"] or not list(rows[0])[2].startswith("norm_"):
        raise ValueError(
            f"{csv_path}: expected rows that a GEffectLogger wrote, found {list(rows[0]) if rows else 'none'}"
        )
    first = next(column.removeprefix("norm_") for column in rows[0] if column.startswith("norm_"))
    steps = sorted({int(row["step"]) for row in rows})
    groups = _grouped(dict.fromkeys(row["layer"] for row in rows))
    layers = [layer for _, members in groups for layer in members]
    cosines = {name: _table(rows, f"cosine_{name}", steps, layers) for name in names}
    finite = torch.cat([table[table.isfinite()] for table in cosines.values()])
    limit = float(finite.abs().max()) if finite.numel() and bool((finite != 0.0).any()) else 1.0

    height = min(1.5 + max(0.16 * len(layers), 1.2), 11.0)
    figure = Figure(figsize=(4.5 + 4.5 * len(names), height), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    round_steps = MaxNLocator(8, integer=True).tick_values(steps[0], steps[-1])
    ticks = [(steps.index(step), step) for step in map(int, round_steps) if step in steps]
    grey = "#9ca3af"
    colours = ScalarMappable(Normalize(-limit, limit), colormaps["RdBu"].with_extremes(bad=grey))
    for axes, (name, table) in zip(panels, cosines.items(), strict=True):
        axes.imshow(table.numpy(), aspect="auto", cmap=colours.cmap, norm=colours.norm, interpolation="nearest")
        axes.set(xlabel="optimizer step", title=f"G-effect by layer: {first} on {name}")
        axes.set_xticks([at for at, _ in ticks], [str(step) for _, step in ticks])
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
        edge = -0.5
        for _, members in groups[:-1]:
            edge += len(members)
            axes.axhline(edge, color="white", lw=2)
    _label(panels[0], groups)
    figure.colorbar(colours, ax=list(panels), label="cosine (red: conflict)", fraction=0.05, pad=0.02)
    write_picture(Path(png_path), figure)


def _table(rows: Sequence[Mapping[str, str]], column: str, steps: Sequence[int], layers: Sequence[str]) -> Tensor:
    """A column as ``[layers, steps]``, NaN where there is no row."""
    across, down = {step: x for x, step in enumerate(steps)}, {layer: y for y, layer in enumerate(layers)}
    table = torch.full((len(layers), len(steps)), torch.nan, dtype=torch.float64)
    x = torch.tensor([across[int(row["step"])] for row in rows])
    y = torch.tensor([down[row["layer"]] for row in rows])
    table[y, x] = torch.tensor([float(row[column]) for row in rows], dtype=torch.float64)
    return table


def _grouped(layers: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Kind -> layers that differ in their number only, by number; the kinds in the order of their first layers."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for layer in layers:
        found = _LAYER.match(layer)
        kind = layer if found is None else (found["before"] + found["after"].strip()).strip() or "layer"
        groups.setdefault(kind, []).append((-1 if found is None else int(found["number"]), layer))
    return [(kind, [layer for _, layer in sorted(members)]) for kind, members in groups.items()]


def _label(axes: Any, groups: Sequence[tuple[str, Sequence[str]]], most: int = 12) -> None:
    """Label the layers with their numbers, at most about `most` of a kind, and each kind at the middle of its group."""
    ticks: list[tuple[int, str]] = []
    start = 0
    for kind, members in groups:
        numbers = [found["number"] for found in map(_LAYER.match, members) if found is not None]
        if numbers:
            every = -(-len(numbers) // most)
            ticks += [(start + index, number) for index, number in enumerate(numbers) if index % every == 0]
            middle = start + (len(numbers) - 1) / 2
            axes.annotate(
                kind,
                (0, middle),
                xycoords=("axes fraction", "data"),
                xytext=(-30, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontweight="bold",
            )
        else:
            ticks.append((start, kind))
        start += len(members)
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=7)
