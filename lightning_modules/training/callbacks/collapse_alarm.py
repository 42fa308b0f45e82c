"""Stops a run whose retention collapses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.folder import TRAINING
from lightning_modules.training.callbacks.notes import note
from lightning_modules.training.callbacks.tradeoff_curve import TradeoffCurve, follows


def collapse(
    points: Sequence[Mapping[str, float]], *, below: float | None = None, drop: float | None = None
) -> str | None:
    """Why the last of these points is a collapse of retention; None if it is not.

    It is a collapse if its mean retain probability is NaN, or less than `below` times that of the first point, or more
    than `drop` less than that of the point before it.

    Args:
        points: In order, each with "step" and "retain".
        below: A fraction of the start; None for no such limit.
        drop: A probability; None for no such limit.

    Example:
        >>> points = [{"step": 0, "retain": 0.9}, {"step": 1, "retain": 0.8}, {"step": 2, "retain": 0.05}]
        >>> collapse(points[:2], below=0.1, drop=0.5)
        >>> collapse(points, below=0.1)
        'retain probability 0.050 at step 2 is below 0.1 times the 0.900 of the start'
    """
    if not points:
        return None
    start, now = points[0]["retain"], points[-1]["retain"]
    here = f"retain probability {now:.3f} at step {points[-1]['step']:.0f}"
    if math.isnan(now):
        return f"{here} is not a number"
    if below is not None and now < below * start:
        return f"{here} is below {below:g} times the {start:.3f} of the start"
    if drop is not None and len(points) > 1 and points[-2]["retain"] - now > drop:
        return f"{here} is more than {drop:g} below the {points[-2]['retain']:.3f} of step {points[-2]['step']:.0f}"
    return None


class CollapseAlarm(Callback):
    """Stops training when the retain probability collapses (see `collapse`), warns, and tells the report.

    It reads the points of a `TradeoffCurve`, which must come before it among the trainer's callbacks. So it sees a
    collapse at the next score, not at the step where it begins. Training ends as if it were complete: the model is
    evaluated and saved as it then is, unless `BestTradeoff` puts a better one back.

    Args:
        curve: Scores "retain" while training.
        below: Stop when the retain probability is less than this fraction of what it was at the start.
        drop: Stop when it falls by more than this from one score to the next.
        folder: The run's folder, to tell the report in `training.json`; None tells only the log.

    Attributes:
        reason: Why it stopped the run, or None.

    Raises:
        ValueError: If a limit is not in (0, 1), if there is no limit, or if the curve does not score "retain"; when
            training starts, if the curve does not come first.
    """

    def __init__(
        self,
        curve: TradeoffCurve,
        *,
        below: float | None = 0.1,
        drop: float | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if below is None and drop is None:
            raise ValueError(
                "CollapseAlarm: expected below or drop, found neither; leave the callback out for no alarm"
            )
        for name, limit in (("below", below), ("drop", drop)):
            if limit is not None and not 0.0 < limit < 1.0:
                raise ValueError(f"CollapseAlarm: expected {name} in (0, 1), found {limit}")
        if "retain" not in curve.encoded:
            raise ValueError(
                f"CollapseAlarm: expected a curve of retain, found one of {', '.join(curve.encoded) or 'nothing'}"
            )
        self.curve, self.below, self.drop = curve, below, drop
        self.folder = None if folder is None else Path(folder)
        self.reason: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002 (Lightning's signature)
        """Check the order of the callbacks."""
        follows(self, self.curve, trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Look at the score of the start: a resumed run may have collapsed already."""
        self.reason = None
        self._look(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Look at the last score."""
        self._look(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Look at the score of the end: nothing is left to stop, but the report is told."""
        self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        if self.reason is not None:
            return
        self.reason = collapse(self.curve.points, below=self.below, drop=self.drop)
        if self.reason is None:
            return
        trainer.should_stop = True
        rank_zero_warn(
            f"CollapseAlarm: {self.reason}; training stops here. A smaller learning rate, a larger retain weight or "
            "guard='update' keep more."
        )
        if self.folder is not None and trainer.is_global_zero:
            limits = {"below": self.below, "drop": self.drop}
            note(self.folder / TRAINING, "collapse", {"reason": self.reason, **self.curve.points[-1], **limits})
