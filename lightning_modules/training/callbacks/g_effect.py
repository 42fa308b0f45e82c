r"""The G-effect by layer and step: where in the model forgetting and retention pull against each other.

The G-effect of the forget objective on the retain objective is the inner product of their gradients, and it is a sum
over layers:

$$e = \langle \nabla L_{\mathrm{forget}}, \nabla L_{\mathrm{retain}} \rangle =
\sum_{\mathrm{layers}} e_{\mathrm{layer}} .$$

To first order, a gradient step on the forget loss changes the retain loss by minus the learning rate times e, so e
below 0 hurts retention. It is an entry of the Gram matrix that surgery computes anyway, so this callback needs no
further pass over the gradients.

Source: Rethinking LLM Unlearning Objectives (2502.19301, ICLR 2025). The authors' code runs three backward passes for
it (one is for the risk on the forget set), averages each gradient with weights 0.6 and 0.4, and adds up thirds of a 7B
model. Here the retain row is the one that the rule got (its EMA, where there is one), the forget row is that of the
step, and every layer has its own number. The effect on the forget set itself needs the gradient of its plain loss: make
that loss one more objective to log it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import gradsurgery as gs
from lightning_modules.training.callbacks.rows import GrowingRows


class GEffectLogger(Callback):
    """Writes a CSV file with a row for each optimizer step and layer, from `gradsurgery.Record.block_gram`.

    Columns: step, layer, norm_<objective>, and for each protected objective g_effect_<objective> and
    cosine_<objective>. The G-effect is the inner product of that objective's row (its EMA, where it has one) with the
    first row, in the step's metric. The cosine is 0 where one of the rows is 0 in that layer.

    It works with any LightningModule whose optimizer is one `gradsurgery.GradientSurgery` with a ``record_scope``. It
    waits for the device only when it writes. A step that a GradScaler skipped has no rows.

    Args:
        path: The file; training starts it anew, and it grows every `flush_every` steps.
        flush_every: Steps between writes.

    Raises:
        ValueError: When training starts, if there is no such optimizer; during training, if the checkpoint that was
            resumed has other objectives or layers than the model.

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
        self._file = GrowingRows(path)

    @property
    def gram(self) -> Tensor:
        """The Gram matrices of all T steps and R layers so far, float64 ``[T, R, K, K]`` on the CPU."""
        if not self._grams:
            return torch.zeros(0, len(self.layers), len(self.objectives), len(self.objectives), dtype=torch.float64)
        self._grams = [gram.cpu() for gram in self._grams]
        return torch.stack(self._grams)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Start the file anew, with the rows of the checkpoint that is resumed."""
        if trainer.is_global_zero:
            self._file.restart()
            self._write(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Refuse an optimizer that records no layers, and drop the rows of an earlier fit by another trainer."""
        self._surgery(trainer)
        kept = sum(step <= trainer.global_step for step in self.steps)
        if kept < len(self.steps):
            self.steps, self._grams = self.steps[:kept], self._grams[:kept]
            if trainer.is_global_zero:
                self._file.restart()
                self._write(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Keep the step's Gram matrices if this batch ended with a step."""
        step = trainer.global_step
        record = self._surgery(trainer).record
        if step == 0 or (self.steps and self.steps[-1] >= step) or record is None or not record.applied:
            return
        if record.block_gram is None or record.block_names is None:
            return  # a step before record_scope was set
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

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (the same)
        """Write the remaining rows."""
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:  # noqa: ARG002 (the same)
        """Write the rows of the steps before the exception."""
        with suppress(OSError):  # a full disk would hide the exception
            if self._file.begun:
                self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Write the rows of a run that is resumed after its last step: there is no `on_train_end` then."""
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """All rows so far, so that the file of a resumed run is complete."""
        return {
            "steps": list(self.steps),
            "gram": self.gram,
            "layers": list(self.layers),
            "objectives": list(self.objectives),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows."""
        self.steps, self._grams = list(state_dict["steps"]), list(state_dict["gram"].unbind())
        self.layers, self.objectives = tuple(state_dict["layers"]), tuple(state_dict["objectives"])

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
        new = slice(self._file.written // max(1, len(self.layers)), len(self.steps))
        if trainer.is_global_zero and self.steps[new]:
            rows = _rows(self.steps[new], self.layers, self.objectives, self.gram[new])
            self._file.write(_columns(self.objectives), rows)


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
