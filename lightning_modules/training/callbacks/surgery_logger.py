"""The record of every step, as rows of a CSV file and in the trainer's loggers."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_modules.training.callbacks.rows import StepRows, of_all
from lightning_modules.training.module import UnlearningModule


class SurgeryLogger(StepRows):
    """One row of a CSV file for every optimizer step, from its `gradsurgery.Record`.

    | column | content |
    |---|---|
    | `step` | number of the optimizer step, from 1 |
    | `loss_<objective>` | loss of the step's last batch, of all processes |
    | `norm_<objective>` | of the objective's row, over all blocks |
    | `update_norm` | of the combined gradient |
    | `cosine` | between the first two rows; with several blocks the mean over them; not with one objective |
    | `coefficient_<objective>` | the rule's answer; with several blocks the mean; not for elementwise rules |
    | `conflict` | 1 if a protected row conflicts with the first, otherwise 0; not with one objective |
    | `predicted_change_<objective>` | of the loss, to first order, per unit of learning rate |
    | `actual_change_<protected objective>` | of the loss, to first order, by the parameter change; only with a guard |

    Norms and cosines are in the metric of the Gram matrix.

    All of the trainer's loggers get the same numbers but for the step, as `surgery/cosine`, `surgery/conflict` and so
    on, every `log_every_n_steps` of the trainer. Their steps are Lightning's, which begin at 0.

    Args:
        path: Of the file. Training starts it anew, and it grows every `flush_every` steps. None writes no file.
        flush_every: Steps between writes.
    """

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Add a row if this batch ended with a step."""
        step = trainer.global_step
        if not isinstance(pl_module, UnlearningModule) or self.counted(step):
            return
        record = pl_module.surgery.record
        if record is None or not record.applied:
            return  # a GradScaler skipped the step
        names, gram = record.objectives, record.gram if record.blocks is None else record.gram.sum(0)
        coefficients = record.coefficients  # None: the rule is elementwise
        if coefficients is not None and record.blocks is not None:
            coefficients = coefficients.mean(0)
        row: dict[str, float] = {"step": step}
        row |= {f"loss_{name}": of_all(pl_module.losses[name], trainer) for name in names}
        row |= {f"norm_{name}": value for name, value in zip(names, gram.diagonal().sqrt().tolist(), strict=True)}
        row["update_norm"] = float(record.update_norm)
        if len(names) > 1:
            row["cosine"] = float(record.cosines[..., 0, 1].mean())
        if coefficients is not None:
            row |= {f"coefficient_{name}": value for name, value in zip(names, coefficients.tolist(), strict=True)}
        if len(names) > 1:
            row["conflict"] = float(record.conflict)
        row |= {f"predicted_change_{n}": v for n, v in zip(names, record.predicted_change.tolist(), strict=True)}
        if record.actual_change is not None:
            row |= {f"actual_change_{n}": v for n, v in zip(names[1:], record.actual_change.tolist(), strict=True)}
        told = {f"surgery/{name}": value for name, value in row.items() if name != "step"}
        pl_module.log_dict(told, on_step=True, on_epoch=False)
        self.add(trainer, row)
