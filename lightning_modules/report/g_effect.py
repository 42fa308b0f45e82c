r"""The G-effect by layer and step: where in the model forgetting and retention pull against each other.

The G-effect of an objective on a data set is the inner product of two gradients, the objective's and that of the loss on the data:

.. math:: e = \langle \nabla L_{\mathrm{forget}}, \nabla L_{\mathrm{retain}} \rangle = \sum_{\mathrm{layers}} e_{\mathrm{layer}} .

A gradient step on the forget loss changes the retain loss by minus the learning rate times e, to first order: below 0 it hurts. It is
the entry of the Gram matrix that surgery looks at anyway, so that the callback here costs no pass over the gradients.

Source: Rethinking LLM Unlearning Objectives (2502.19301, ICLR 2025). Its code runs three backward passes for it, one for the risk on the
forget set too, averages each gradient with weights 0.6 and 0.4, and adds up thirds of a 7B model; here the retain row is what the rule
saw (its EMA, where there is one), the forget row is the step's own, and layers are told apart. The effect on the forget set itself, which
needs the gradient of its plain loss, is not here: make that loss one more objective to have it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import gradsurgery as gs

_LAYER = re.compile(r"^(?P<before>.*?)layer (?P<number>\d+)(?P<after>.*)$")


class GEffectLogger(Callback):
    """Rows of a CSV file for every optimizer step, one for each layer, from `gradsurgery.Record.block_gram`.

    Columns: step, layer, norm_<objective>, and for each protected objective g_effect_<objective> (the inner product of its row with the
    first, in the step's metric) and cosine_<objective>, 0 where a row is 0 in that layer. A protected row is its EMA where it has one.

    It works with any LightningModule whose optimizer is one `gradsurgery.GradientSurgery` with a ``record_scope``, and waits for the
    device only when it writes. A step that a GradScaler skipped has no rows.

    Args:
        path: The file; it is written anew at the start, and grows every `flush_every` steps.
        flush_every: Steps between writes.

    Raises:
        ValueError: When training starts, if there is no such optimizer, or a checkpoint's layers are not this model's.

    Example:
        >>> from functools import partial
        >>> surgery = partial(gs.GRU, record_scope=gs.scope.by_layer)  # lm.UnlearningModule(model, surgery=surgery)
        >>> logger = GEffectLogger("g_effect.csv")  # L.Trainer(callbacks=[logger])
    """

    def __init__(self, path: str | Path, flush_every: int = 20) -> None:
        self.path, self.flush_every = Path(path), flush_every
        self.objectives: tuple[str, ...] = ()
        self.layers: tuple[str, ...] = ()
        self.steps: list[int] = []
        self._grams: list[Tensor] = []
        self._written = 0

    @property
    def gram(self) -> Tensor:
        """Gram matrices of every step and layer so far, float64 ``[T, R, K, K]`` on the CPU."""
        if not self._grams:
            return torch.zeros(0, len(self.layers), len(self.objectives), len(self.objectives), dtype=torch.float64)
        self._grams = [gram.cpu() for gram in self._grams]
        return torch.stack(self._grams)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Refuse a run that would leave no rows."""
        self._surgery(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Keep the step's Gram matrices if this batch ended with a step."""
        step = trainer.global_step
        record = self._surgery(trainer).record
        if step == 0 or (self.steps and self.steps[-1] >= step) or record is None or not record.applied:
            return
        if record.block_gram is None or record.block_names is None:
            return  # of a step before record_scope was set
        if self.steps and (record.objectives, record.block_names) != (self.objectives, self.layers):
            raise ValueError(
                f"GEffectLogger: expected the objectives {self.objectives} and {len(self.layers)} layers of the steps so far, found "
                f"{record.objectives} and {len(record.block_names)}; resume with the model and the record_scope of the checkpoint"
            )
        self.objectives, self.layers = record.objectives, record.block_names
        self.steps.append(step)
        self._grams.append(record.block_gram)
        if len(self.steps) % self.flush_every == 0:
            self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (so)
        """Write what is left."""
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:  # noqa: ARG002 (so)
        """Write what led there."""
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Everything so far, so that a resumed run goes on where the checkpoint was made."""
        return {
            "steps": list(self.steps),
            "gram": self.gram,
            "layers": list(self.layers),
            "objectives": list(self.objectives),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it; the file is written anew."""
        self.steps, self._grams = list(state_dict["steps"]), list(state_dict["gram"].unbind())
        self.layers, self.objectives = tuple(state_dict["layers"]), tuple(state_dict["objectives"])
        self._written = 0

    def _surgery(self, trainer: L.Trainer) -> gs.GradientSurgery:
        found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, gs.GradientSurgery)]
        if len(found) != 1 or found[0].record_scope is None:
            what = "a GradientSurgery without record_scope" if len(found) == 1 else f"{len(found)} GradientSurgery"
            raise ValueError(
                f"GEffectLogger: expected one GradientSurgery with a record_scope, found {what}; construct it with "
                "record_scope=gradsurgery.scope.by_layer"
            )
        return found[0]

    def _write(self, trainer: L.Trainer) -> None:
        new = slice(self._written, len(self.steps))
        if not trainer.is_global_zero or not self.steps[new]:
            return
        grams = self.gram[new]
        with self.path.open("a" if self._written else "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(_columns(self.objectives)))
            if not self._written:
                writer.writeheader()
            writer.writerows(_rows(self.steps[new], self.layers, self.objectives, grams))
        self._written = len(self.steps)


def _columns(objectives: Sequence[str]) -> list[str]:
    effects = [f"{what}_{name}" for name in objectives[1:] for what in ("g_effect", "cosine")]
    return ["step", "layer", *(f"norm_{name}" for name in objectives), *effects]


def _rows(
    steps: Sequence[int], layers: Sequence[str], objectives: Sequence[str], grams: Tensor
) -> list[dict[str, float | int | str]]:
    norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = norms[..., :1] * norms[..., 1:]
    effects = grams[..., 0, 1:]
    cosines = torch.where(lengths == 0.0, 0.0, effects / torch.where(lengths == 0.0, 1.0, lengths))
    numbers = torch.cat([norms, torch.stack([effects, cosines], -1).flatten(-2)], -1).tolist()
    columns = _columns(objectives)
    return [
        dict(zip(columns, (step, layer, *values), strict=True))
        for step, of_step in zip(steps, numbers, strict=True)
        for layer, values in zip(layers, of_step, strict=True)
    ]


def heat_map(csv_path: str | Path, png_path: str | Path) -> None:
    """Draw the cosines of `GEffectLogger`'s file, steps across and layers down: red where forgetting hurts, blue where both agree.

    Rows of one kind (attention, mlp, ...) stand together in the order of the layers. The colours are symmetric around 0, and reach to the
    largest absolute cosine. What is missing or not finite is grey. Several protected objectives are drawn side by side.

    Args:
        csv_path: The file.
        png_path: The image, overwritten.

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
    figure.colorbar(
        colours, ax=list(panels), label="cosine of the rows: below 0 they conflict", fraction=0.05, pad=0.02
    )
    figure.savefig(png_path, dpi=150)


def _table(rows: Sequence[Mapping[str, str]], column: str, steps: Sequence[int], layers: Sequence[str]) -> Tensor:
    """``[layers, steps]``, NaN where there is no row."""
    across, down = {step: x for x, step in enumerate(steps)}, {layer: y for y, layer in enumerate(layers)}
    table = torch.full((len(layers), len(steps)), torch.nan, dtype=torch.float64)
    x = torch.tensor([across[int(row["step"])] for row in rows])
    y = torch.tensor([down[row["layer"]] for row in rows])
    table[y, x] = torch.tensor([float(row[column]) for row in rows], dtype=torch.float64)
    return table


def _grouped(layers: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Layers that differ in their number only, together and in its order; where the first of them was."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for layer in layers:
        found = _LAYER.match(layer)
        kind = layer if found is None else (found["before"] + found["after"].strip()).strip() or "layer"
        groups.setdefault(kind, []).append((-1 if found is None else int(found["number"]), layer))
    return [(kind, [layer for _, layer in sorted(members)]) for kind, members in groups.items()]


def _label(axes: Any, groups: Sequence[tuple[str, Sequence[str]]], most: int = 12) -> None:
    """Numbers of layers, thinned out where they are many, and the kind at the middle of each group."""
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
