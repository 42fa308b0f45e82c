"""Where training stands, in a log."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_modules.progress import Stage


class ProgressLines(Callback):
    """Says at least every half minute how many optimizer steps are done, and how long the rest may take.

    It writes where standard error is no terminal; in a terminal, use Lightning's bars. Training that stops early has
    fewer steps than it says.

    Args:
        what: The training is called.
    """

    def __init__(self, what: str = "Training") -> None:
        self.what = what
        self._stage: Stage | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Count from where a resumed run was."""
        steps = trainer.estimated_stepping_batches
        total = int(steps) if math.isfinite(steps) else None
        self._stage = Stage(f"{self.what}, optimizer steps", total, done=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Count the steps."""
        if self._stage is not None:
            self._stage.advance(trainer.global_step - self._stage.done)
