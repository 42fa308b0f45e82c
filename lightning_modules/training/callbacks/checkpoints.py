"""The checkpoint from which a run goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy

NEW, FORMER = "new.ckpt", "former.ckpt"
"""Folders of shards: one that is not finished, and one whose successor is being put in its place."""


class Checkpoints(Checkpoint):
    """Saves the training after every epoch, and every so many steps, always to the same file.

    Lightning's `ModelCheckpoint` saves by steps or by epochs, and after a resume once more in the middle of an
    accumulation window. With this one a killed run loses at most `every_n_steps` steps.

    Args:
        path: Of the file, usually `last.ckpt`.
        every_n_steps: Optimizer steps between checkpoints; None for epochs only.
        run: What the run is: option -> value, of plain types. It is saved, and a checkpoint of another run is refused;
            an option that only one of them knows is not compared.

    Attributes:
        step: Optimizer steps so far.
        earlier: Seconds that the training had taken when the checkpoint was saved from which it goes on.

    Raises:
        ValueError: If `every_n_steps` is below 1; when a checkpoint of another run is loaded.
    """

    def __init__(
        self, path: str | Path, *, every_n_steps: int | None = None, run: Mapping[str, Any] | None = None
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"Checkpoints: expected every_n_steps to be at least 1, or None, found {every_n_steps}")
        self.path, self.every_n_steps, self.run = Path(path), every_n_steps, None if run is None else dict(run)
        self.step = 0
        self.earlier = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the training started, and those of the training that it goes on with."""
        return self.earlier + (0.0 if self._started is None else time.perf_counter() - self._started)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Count the steps from where a resumed run was, and the seconds from now."""
        self.step, self._started = trainer.global_step, time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save if this batch ended with a step whose turn it is. The end of an epoch is saved anyway."""
        step = trainer.global_step
        stepped, self.step = step != self.step, step
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self.every_n_steps is not None and stepped and step % self.every_n_steps == 0 and not last:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (the same)
        """Save the epoch."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            trainer.save_checkpoint(self.path)
            return
        # Shards are a folder, which Lightning would overwrite file by file: a process killed meanwhile would leave half
        # of one checkpoint and half of another.
        new, former = (self.path.with_name(name) for name in (NEW, FORMER))
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            shutil.rmtree(former, ignore_errors=True)
            if self.path.exists():
                self.path.rename(former)
            new.rename(self.path)
            shutil.rmtree(former, ignore_errors=True)
        trainer.strategy.barrier()

    def state_dict(self) -> dict[str, Any]:
        """What the run is, and how long it has taken."""
        return {"run": self.run, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse the checkpoint of another run; take over its seconds."""
        run, found = self.run or {}, state_dict.get("run") or {}
        other = [name for name in sorted({*run} & {*found}) if run[name] != found[name]]
        if other:
            said = "; ".join(f"{name}: {found[name]} there, {run[name]} here" for name in other)
            raise ValueError(
                f"{self.path}: expected a checkpoint of this run, found one of another ({said}); remove it to train from the start, or "
                "put this run's in its place"
            )
        self.earlier = state_dict.get("seconds", 0.0)


def seconds_of(trainer: L.Trainer) -> float:
    """What the training of a Trainer with `Checkpoints` took: its `seconds`."""
    return next(callback.seconds for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))
