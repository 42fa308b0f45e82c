"""Pulling weights back to an anchor after every step."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

import gradsurgery as gs
from lightning_modules.training.module import UnlearningModule


class AnchorPull(Callback):
    """Pulls the weights of a training back after every optimizer step that was taken, with the step's learning rate.

    That is the first parameter group's. A guard's measured change is of the step before the pull. Put it before
    callbacks that score or save the weights.

    Args:
        anchor: That has watched forward passes of examples to keep, as from `anchoring.anchored`.
    """

    def __init__(self, anchor: gs.LayerAnchor) -> None:
        self.anchor, self._step, self._lr = anchor, 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A training that is resumed has pulled for the steps before.

        Raises:
            RuntimeError: If the training has other weights than the anchor: sharded since, or merged.
        """
        self._step = trainer.global_step
        if not self.anchor.holds(pl_module.parameters()):
            raise RuntimeError(
                "AnchorPull: expected a module with the weights that the anchor was made of, found others: make the anchor of the model "
                "that is trained, after adapters are put on, and do not shard it"
            )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:  # noqa: ARG002 (Lightning's signature)
        """Read the learning rate, which a schedule changes right after the step."""
        self._lr = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Pull if this batch ended with a step."""
        step, self._step = self._step, trainer.global_step
        record = pl_module.surgery.record if isinstance(pl_module, UnlearningModule) else None
        skipped = record is not None and not record.applied  # by a GradScaler
        if self._step > step and not skipped:
            self.anchor.pull(self._lr)
