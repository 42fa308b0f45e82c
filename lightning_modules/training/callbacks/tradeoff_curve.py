"""Forgetting against retention while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_modules.data.tokenization import Encoded
from lightning_modules.training.callbacks.rows import StepRows
from lightning_modules.training.probability import mean_probabilities

_POINTS = 25  # enough for a smooth curve, few enough to cost little


class TradeoffCurve(StepRows):
    """Mean answer probability on forget and retain examples while training, and a stop once enough is forgotten.

    The numbers are those of `UnlearningModule`'s validation, of examples and at steps of your choice. The trainer's
    loggers, if there are any, get them as `curve/forget` and `curve/retain`, with the number of steps before them.
    Every process scores all examples, and takes the first one's scores: all make the same decisions.

    Args:
        encoded: Split -> tokenized examples to score.
        pad_token_id: Of the tokenizer.
        every_n_steps: Optimizer steps between scores; the start and the end are scored too. None: a 25th of the steps
            of the whole training, which depend on the number of processes and are known when training starts.
        stop_below: Stop training when the probability of the split "forget" falls below this.
        at_most: Name -> examples, and the probability that they may have when training is stopped, None for
            `stop_below`. They are scored only where the split "forget" is below `stop_below`; training goes on as long
            as one of them is above.
        batch_size: Examples a forward pass.
        path: A CSV file with a row for each point, which grows while the run goes on; None writes none.

    Attributes:
        points: One for each score, `{"step": ..., split: mean probability, ...}`; the start's step is 0.
        above: Names of `at_most` that were above when they were scored last.
    """

    def __init__(
        self,
        encoded: Mapping[str, Sequence[Encoded]],
        *,
        pad_token_id: int,
        every_n_steps: int | None = None,
        stop_below: float | None = None,
        at_most: Mapping[str, tuple[Sequence[Encoded], float | None]] | None = None,
        batch_size: int = 32,
        path: str | Path | None = None,
    ) -> None:
        super().__init__(path)
        self.encoded = dict(encoded)
        self.pad_token_id, self.every_n_steps = pad_token_id, every_n_steps
        self.stop_below, self.batch_size = stop_below, batch_size
        self.at_most = {} if at_most is None else dict(at_most)
        self.above: list[str] = []

    @property
    def points(self) -> list[dict[str, float]]:
        """The rows, which are the points of a curve."""
        return self.rows

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the start, and stop if enough is forgotten already.

        A run that is resumed scores the steps that it would have scored, and no other: it ends where it would have
        ended.
        """
        super().on_train_start(trainer)
        if self.every_n_steps is None:
            steps = trainer.estimated_stepping_batches
            self.every_n_steps = max(1, int(steps) // _POINTS) if 0 < steps < float("inf") else 1
        self.stop_below = trainer.strategy.broadcast(self.stop_below)  # the first process may have found it alone
        step = trainer.global_step
        if self.rows and self.rows[-1]["step"] == step:
            self._stop(trainer, pl_module)
        elif not self.rows or step % self.every_n_steps == 0:
            self._score(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Score every so many steps, and the last one, so that its checkpoint knows the score."""
        if trainer.global_step % (self.every_n_steps or 1) == 0 or _is_last(trainer):
            self._score(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the end."""
        self._score(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the points, also those of a checkpoint of an earlier version."""
        super().load_state_dict({"rows": state_dict["points"]} if "points" in state_dict else state_dict)

    def _score(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if self.rows and self.rows[-1]["step"] >= step:
            return
        scores = self._probabilities(trainer, pl_module, self.encoded)
        self.add(trainer, {"step": step, **scores})
        for logger in trainer.loggers:
            logger.log_metrics({f"curve/{split}": value for split, value in scores.items()}, step)
        self._stop(trainer, pl_module)

    def _probabilities(
        self, trainer: L.Trainer, pl_module: L.LightningModule, encoded: Mapping[str, Sequence[Encoded]]
    ) -> dict[str, float]:
        model = pl_module.get_submodule("model")
        scores = mean_probabilities(model, encoded, pad_token_id=self.pad_token_id, batch_size=self.batch_size)
        # The first process's scores are everybody's: what is decided by them, a stop or a checkpoint, is decided by all
        # processes alike. Each has its own last digits, and one that stops alone leaves the others waiting.
        return trainer.strategy.broadcast(scores)

    def _stop(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        below = self.stop_below
        if below is None or trainer.should_stop or not self.rows[-1].get("forget", 1.0) < below:
            return
        encoded = {name: rows for name, (rows, _) in self.at_most.items()}
        found = self._probabilities(trainer, pl_module, encoded) if encoded else {}
        limits = {name: below if limit is None else limit for name, (_, limit) in self.at_most.items()}
        self.above = [name for name, limit in limits.items() if not found[name] <= limit]
        trainer.should_stop = not self.above


def _is_last(trainer: L.Trainer) -> bool:
    """Whether the step that was just taken is the last one, if nothing stopped the training before."""
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)


def follows(follower: Callback, curve: TradeoffCurve, trainer: L.Trainer) -> None:
    """Check that a callback that reads the curve's points comes after the curve: Lightning calls callbacks in order.

    Raises:
        ValueError: If the curve comes after it, or is not among the trainer's callbacks.
    """
    order: list[Any] = list(getattr(trainer, "callbacks", []))
    if curve not in order or order.index(curve) > order.index(follower):
        name = type(follower).__name__
        raise ValueError(
            f"{name}: expected its TradeoffCurve before it among the trainer's callbacks, found it "
            f"{'after' if curve in order else 'not at all'}; L.Trainer(callbacks=[curve, {name}(curve, ...)])"
        )
