"""The loss of every step of a training that has one loss, as rows of a CSV file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_modules.training.callbacks.rows import StepRows, of_all
from lightning_modules.training.finetuning import FinetuningModule


class LossCurve(StepRows):
    """One row of a CSV file for every optimizer step of `FinetuningModule`.

    | column | content |
    |---|---|
    | `step` | number of the optimizer step, from 1 |
    | `loss` | mean cross-entropy of the answer tokens, in nats: the mean over the step's batches, of all processes |
    | `lr` | learning rate of the step |

    Args:
        path: Of the file. Training starts it anew, and it grows with every step. None writes no file.
        flush_every: Steps between writes.
    """

    def __init__(self, path: str | Path | None = None, flush_every: int = 1) -> None:
        super().__init__(path, flush_every)
        self._losses: list[Tensor] = []
        self._lr = float("nan")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:  # noqa: ARG002 (Lightning's signature)
        """Read the learning rate, which the schedule changes right after the step."""
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Add the batch's loss, and a row if this batch ended with a step."""
        if not isinstance(pl_module, FinetuningModule):
            return
        self._losses.append(pl_module.loss)
        if self.counted(trainer.global_step):
            return
        mean = torch.stack(self._losses).mean()
        self._losses = []
        row = {"step": trainer.global_step, "loss": of_all(mean, trainer), "lr": self._lr}
        self.add(trainer, row)
