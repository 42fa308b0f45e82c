"""The record of every step, as rows of a CSV file and in the trainer's loggers."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules.training.callbacks.rows import GrowingRows
from lightning_modules.training.module import UnlearningModule


class SurgeryLogger(Callback):
    """One row of a CSV file for every optimizer step, from its `gradsurgery.Record`.

    | column | content |
    |---|---|
    | `step` | number of the optimizer step, from 1 |
    | `loss_<objective>` | loss of the step's last batch, of all processes |
    | `norm_<objective>` | of the objective's row, over all blocks |
    | `update_norm` | of the combined gradient |
    | `cosine` | between the first two rows; with several blocks the mean over them |
    | `coefficient_<objective>` | the rule's answer; with several blocks the mean; not for elementwise rules |
    | `conflict` | 1 if a protected row conflicts with the first, otherwise 0 |
    | `predicted_change_<objective>` | of the loss, to first order, per unit of learning rate |
    | `actual_change_<protected objective>` | of the loss, to first order, by the parameter change; only with a guard |

    Norms and cosines are in the metric of the Gram matrix.

    All of the trainer's loggers get the same numbers but for the step, as `surgery/cosine`, `surgery/conflict` and so
    on, every `log_every_n_steps` of the trainer. Their steps are Lightning's, which begin at 0.

    Args:
        path: Of the file. Training starts it anew, and it grows every `flush_every` steps. None writes no file.
        flush_every: Steps between writes.
    """

    def __init__(self, path: str | Path | None = None, flush_every: int = 1) -> None:
        self.path, self.flush_every = None if path is None else Path(path), flush_every
        self.rows: list[dict[str, float]] = []
        self._file = None if path is None else GrowingRows(path)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Start the file anew, with the rows of the checkpoint that is resumed."""
        if trainer.is_global_zero and self._file is not None:
            self._file.restart()
            self._write(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Drop the rows of an earlier fit by another trainer: this one's steps begin at 0 again."""
        kept = [row for row in self.rows if row["step"] <= trainer.global_step]
        if len(kept) == len(self.rows):
            return
        self.rows = kept
        if self._file is not None and trainer.is_global_zero:
            self._file.restart()
            self._write(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Add a row if this batch ended with a step."""
        step = trainer.global_step
        if not isinstance(pl_module, UnlearningModule) or (self.rows and self.rows[-1]["step"] >= step) or step == 0:
            return
        record = pl_module.surgery.record
        if record is None or not record.applied:
            return  # a GradScaler skipped the step
        names, gram = record.objectives, record.gram if record.blocks is None else record.gram.sum(0)
        coefficients = record.coefficients  # None: the rule is elementwise
        if coefficients is not None and record.blocks is not None:
            coefficients = coefficients.mean(0)
        row: dict[str, float] = {"step": step}
        row |= {f"loss_{name}": _of_all(pl_module.losses[name], trainer) for name in names}
        row |= {f"norm_{name}": value for name, value in zip(names, gram.diagonal().sqrt().tolist(), strict=True)}
        row |= {"update_norm": float(record.update_norm), "cosine": float(record.cosines[..., 0, 1].mean())}
        if coefficients is not None:
            row |= {f"coefficient_{name}": value for name, value in zip(names, coefficients.tolist(), strict=True)}
        row["conflict"] = float(record.conflict)
        row |= {f"predicted_change_{n}": v for n, v in zip(names, record.predicted_change.tolist(), strict=True)}
        if record.actual_change is not None:
            row |= {f"actual_change_{n}": v for n, v in zip(names[1:], record.actual_change.tolist(), strict=True)}
        self.rows.append(row)
        told = {f"surgery/{name}": value for name, value in row.items() if name != "step"}
        pl_module.log_dict(told, on_step=True, on_epoch=False)
        if len(self.rows) % self.flush_every == 0:
            self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Write what is left."""
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Write the steps that led to the exception."""
        with suppress(OSError):  # a full disk would hide the exception
            if self._file is not None and self._file.begun:
                self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Write the rows of a run that is resumed after its last step: there is no `on_train_end` then."""
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, so that a resumed run goes on with them."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows."""
        self.rows = list(state_dict["rows"])

    def _write(self, trainer: L.Trainer) -> None:
        if self._file is not None and trainer.is_global_zero and self.rows:
            self._file.write(list(self.rows[0]), self.rows[self._file.written :])


def _of_all(loss: Tensor, trainer: L.Trainer) -> float:
    """The mean over the processes: each divides by the mean count of tokens, so it is that over all tokens."""
    if trainer.world_size > 1:
        loss = cast("Tensor", trainer.strategy.reduce(loss.clone(), reduce_op="mean"))  # in place: others read it too
    return float(loss)
