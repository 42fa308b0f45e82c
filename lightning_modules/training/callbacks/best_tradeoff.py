"""The checkpoint with the best trade-off between forgetting and retention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_modules.folder import TRAINING
from lightning_modules.training.callbacks.notes import note
from lightning_modules.training.callbacks.tradeoff_curve import TradeoffCurve, follows


def is_better(point: Mapping[str, float], best: Mapping[str, float] | None, *, target: float) -> bool:
    """Whether one scored point is a better trade-off than another.

    A point has forgotten enough if its mean forget probability is below `target`.

    - Of two points that have forgotten enough, the one with the larger mean retain probability is better.
    - A point that has forgotten enough is better than one that has not.
    - Of two points that have not, the one with the smaller mean forget probability is better.

    Of two equals the earlier stays. A point with a NaN is never better.

    Args:
        point: With "forget" and "retain", mean probabilities.
        best: The best so far; None if there is none yet.
        target: The forget probability below which enough is forgotten.

    Example:
        >>> forgotten, kept = {"forget": 0.01, "retain": 0.6}, {"forget": 0.04, "retain": 0.8}
        >>> is_better(kept, forgotten, target=0.05), is_better(kept, forgotten, target=0.02)
        (True, False)
    """
    if math.isnan(point["forget"]) or math.isnan(point["retain"]):
        return False
    return best is None or _worth(point, target) > _worth(best, target)


def _worth(point: Mapping[str, float], target: float) -> tuple[bool, float]:
    enough = point["forget"] < target
    return enough, point["retain"] if enough else -point["forget"]


class BestTradeoff(Callback):
    """Keeps the weights of the scored point with the best trade-off (`is_better`), and ends the training with them.

    It reads the points of a `TradeoffCurve`, which must come before it among the trainer's callbacks. So it chooses
    among the steps that the curve scored, start and end included, by the curve's examples.

    Every point that is better than all before it is written to `path`, weights only. Until the target is reached that
    is nearly every point, so score a large model seldom. At the end of training the best weights are loaded back into
    the module, in every process, and `path` stays on the disk. Optimizer states are not restored: to go on from the
    best weights is a new training.

    Lightning's `ModelCheckpoint` follows a single number, and no fixed sum of the two probabilities says "the best
    retention among those that have forgotten enough".

    Args:
        curve: Scores "forget" and "retain" while training.
        target: The mean forget probability below which enough is forgotten.
        path: The checkpoint, usually `best.ckpt`.
        folder: The run's folder, to tell the report in `training.json` which step was kept; None tells nobody.
        restore: False leaves the last weights in the module and the best ones in `path`.

    Attributes:
        best: The best point so far, or None.
        restored: Whether the module has its weights.

    Raises:
        ValueError: If the target is not in (0, 1], or the curve does not score both splits; when training starts, if
            the curve does not come first.
    """

    def __init__(
        self,
        curve: TradeoffCurve,
        *,
        target: float,
        path: str | Path,
        folder: str | Path | None = None,
        restore: bool = True,
    ) -> None:
        if not 0.0 < target <= 1.0:
            raise ValueError(f"BestTradeoff: expected a target probability in (0, 1], found {target}")
        missing = {"forget", "retain"} - set(curve.encoded)
        if missing:
            raise ValueError(
                f"BestTradeoff: expected a curve of forget and retain, found none of {', '.join(sorted(missing))}"
            )
        self.curve, self.target, self.path, self.restore = curve, target, Path(path), restore
        self.folder = None if folder is None else Path(folder)
        self.best: dict[str, float] | None = None
        self.restored = False
        self._seen = -1.0
        self._ended = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002 (Lightning's signature)
        """Check the order of the callbacks."""
        follows(self, self.curve, trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Keep the weights of the start, which may stay the best."""
        self._ended = False
        if trainer.global_step == 0:  # or a second fit would compare with the first one's weights
            self.best, self._seen = None, -1.0
        self._look(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Keep this step's weights if they are the best."""
        self._look(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the best weights."""
        self._look(trainer)
        self._end(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the best weights in a run that is resumed after its last step: there is no `on_train_end` then."""
        if not self._ended and self.curve.points:
            self._end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The best point, so that a resumed run goes on comparing with it."""
        return {"best": self.best, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best point."""
        self.best, self._seen = state_dict["best"], state_dict["seen"]

    def _end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = True
        if self.best is None:
            rank_zero_warn(
                f"BestTradeoff: every scored point has a NaN; the last weights stay, and nothing is in {self.path}"
            )
            return
        last = self.curve.points[-1]["step"]
        self.restored = self.restore
        if self.restore and self.best["step"] != last:
            checkpoint = trainer.strategy.load_checkpoint(self.path, weights_only=True)
            self.restored = checkpoint["global_step"] == self.best["step"]
            if self.restored:
                pl_module.load_state_dict(checkpoint["state_dict"])
            else:
                rank_zero_warn(
                    f"BestTradeoff: expected the weights of step {self.best['step']:.0f} in {self.path}, found those of step "
                    f"{checkpoint['global_step']}, which an interrupted run went on to; the last weights stay"
                )
        if not trainer.is_global_zero:
            return
        said = {**self.best, "target": self.target, "last_step": last, "restored": self.restored}
        if self.folder is not None:
            note(self.folder / TRAINING, "best", said)
        rank_zero_info(f"BestTradeoff: best is step {self.best['step']:.0f} of {last:.0f}: {said}")

    def _look(self, trainer: L.Trainer) -> None:
        point = self.curve.points[-1]
        if point["step"] == self._seen:
            return
        self._seen = point["step"]
        if is_better(point, self.best, target=self.target):
            self.best = dict(point)
            trainer.save_checkpoint(self.path, weights_only=True)
