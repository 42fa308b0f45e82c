"""How often the curve is scored: a 25th of the steps that this process takes, whatever share of the data it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_modules.training.callbacks import BestTradeoff, CollapseAlarm, SurgeryLogger, TradeoffCurve
from tests.lightning_modules.training.test_callbacks import examples, fit


@pytest.mark.parametrize(
    ("batches_of_this_process", "options", "every"),
    [(100, {}, 4), (50, {}, 2), (50, {"max_epochs": 4}, 8), (3, {}, 1)],
)
def test_the_curve_has_a_25th_of_the_steps_that_are_taken_between_two_points(
    batches_of_this_process: int, options: dict[str, Any], every: int
) -> None:
    curve = TradeoffCurve({"forget": examples(1, 1), "retain": examples(1, 2)}, pad_token_id=0)
    fit([curve], batches_of_this_process, **options)
    assert curve.every_n_steps == every
    steps = [int(point["step"]) for point in curve.points]
    assert steps == sorted({*range(0, steps[-1] + 1, every), steps[-1]})


@pytest.mark.parametrize("again", [False, True], ids=["another trainer", "resumed"])
def test_a_fit_by_another_trainer_starts_anew_and_a_resumed_one_goes_on(again: bool, tmp_path: Path) -> None:
    encoded = {"forget": examples(4, 1), "retain": examples(4, 2)}
    curve = TradeoffCurve(encoded, pad_token_id=0, every_n_steps=1, path=tmp_path / "curve.csv")
    logger = SurgeryLogger(tmp_path / "surgery.csv")
    best, alarm = BestTradeoff(curve, target=1e-9, path=tmp_path / "best.ckpt", restore=False), CollapseAlarm(curve)
    callbacks: list[Any] = [curve, logger, best, alarm]
    first, _ = fit(callbacks, 4)
    first.save_checkpoint(tmp_path / "last.ckpt")
    best.best, alarm.reason = {"step": 4.0, "forget": 0.0, "retain": 1.0}, "of the first fit"
    fit(callbacks, 6, ckpt_path=tmp_path / "last.ckpt" if again else None, max_epochs=2 if again else 1)
    last = 10 if again else 6
    assert [int(point["step"]) for point in curve.points] == list(range(last + 1))
    assert [int(row["step"]) for row in logger.rows] == list(range(1, last + 1))
    for name, rows in (("curve", last + 1), ("surgery", last)):
        assert len((tmp_path / f"{name}.csv").read_text().splitlines()) == rows + 1
    assert best.best != {"step": 4.0, "forget": 0.0, "retain": 1.0}
    assert alarm.reason is None


class SavedAt(Callback):
    """A checkpoint of one step, as a killed run leaves it."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("stop_below", [None, 2.0])
@pytest.mark.parametrize("key", ["rows", "points"], ids=["today's checkpoint", "an earlier version's"])
def test_a_resumed_run_scores_and_stops_where_it_would_have(key: str, stop_below: float | None, tmp_path: Path) -> None:
    """Also where the checkpoint is of a step between two scores, at which the undisturbed run does not look."""
    encoded = {"forget": examples(4, 1), "retain": examples(4, 2)}

    def curve() -> TradeoffCurve:
        return TradeoffCurve(encoded, pad_token_id=0, every_n_steps=4)

    whole, resumed, path = curve(), curve(), tmp_path / "last.ckpt"
    fit([whole, SavedAt(6, path)], 10)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"][resumed.state_key] = {key: checkpoint["callbacks"][resumed.state_key]["rows"]}
    torch.save(checkpoint, path)
    resumed.stop_below = stop_below
    fit([resumed], 10, ckpt_path=path)
    assert [point["step"] for point in whole.points] == [0, 4, 8, 10]
    assert resumed.points == whole.points[: None if stop_below is None else 3]
