"""The numbers of every step in Lightning's loggers: those of surgery.csv and of the curve, in one logger and in several."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import DataLoader

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.training.callbacks import SurgeryLogger, TradeoffCurve
from tests.lightning_modules.training.test_callbacks import Bigram, batches, examples


class Recorded(Logger):
    """A logger of somebody's own: it keeps what it is told."""

    name, version = "recorded", 0

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[tuple[str, int], float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            if name != "epoch":
                assert step is not None
                assert self.told.setdefault((name, step), float(value)) == float(value), "told twice"

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


def fit(loggers: list[Logger], path: Path | None, **options: Any) -> tuple[SurgeryLogger, TradeoffCurve]:
    curve = TradeoffCurve({"forget": examples(4, 1), "retain": examples(4, 2)}, pad_token_id=0, every_n_steps=2)
    surgery_log = SurgeryLogger(path)
    surgery = partial(gs.GRU, accumulate=True, guard="measure", scope=options.pop("scope", "global"))
    module = lm.UnlearningModule(Bigram(), optimizer=partial(torch.optim.SGD, lr=0.3), surgery=surgery)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        callbacks=[surgery_log, curve], logger=loggers, accelerator="cpu", max_epochs=1, **quiet,
        **{"accumulate_grad_batches": 3, "log_every_n_steps": 1} | options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches(13), batch_size=None))
    return surgery_log, curve


def expected(surgery_log: SurgeryLogger, curve: TradeoffCurve) -> dict[tuple[str, int], float]:
    """(name, step) -> number, from the rows and points themselves."""
    rows = {(f"surgery/{name}", int(row["step"]) - 1): value for row in surgery_log.rows for name, value in row.items()}
    points = {(f"curve/{name}", int(point["step"])): value for point in curve.points for name, value in point.items()}
    return {key: value for key, value in (rows | points).items() if not key[0].endswith("/step")}


def ours(told: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    return {key: value for key, value in told.items() if key[0].startswith(("surgery/", "curve/"))}


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_every_logger_gets_the_numbers_of_every_step(scope: str, tmp_path: Path) -> None:
    recorded, other = Recorded(), Recorded()
    table = CSVLogger(tmp_path, name="csv")
    surgery_log, curve = fit([recorded, table, other], tmp_path / "surgery.csv", scope=scope)
    wanted = expected(surgery_log, curve)
    assert len(surgery_log.rows) == 5
    names = {
        "cosine",
        "conflict",
        "update_norm",
        "norm_forget",
        "norm_retain",
        "coefficient_forget",
        "coefficient_retain",
    }
    assert {f"surgery/{name}" for name in names} <= {name for name, _ in wanted}
    close = partial(pytest.approx, rel=1e-6, abs=1e-7)  # Lightning's own store is float32
    assert ours(recorded.told) == close(wanted)
    assert ours(other.told) == ours(recorded.told)
    with (Path(table.log_dir) / "metrics.csv").open(newline="") as file:
        cells = {
            (name, int(row["step"])): value for row in csv.DictReader(file) for name, value in row.items() if value
        }
    assert ours({key: float(value) for key, value in cells.items()}) == close(wanted)


def test_the_trainer_says_how_often(tmp_path: Path) -> None:
    recorded = Recorded()
    surgery_log, _ = fit([recorded], None, log_every_n_steps=2, accumulate_grad_batches=1)
    assert len(surgery_log.rows) == 13
    assert [step for name, step in recorded.told if name == "surgery/cosine"] == [1, 3, 5, 7, 9, 11]
    assert not list(tmp_path.iterdir())


def test_logging_changes_no_number(tmp_path: Path) -> None:
    silent, logged = fit([], tmp_path / "a.csv"), fit([Recorded()], tmp_path / "b.csv")
    assert silent[0].rows == logged[0].rows
    assert silent[1].points == logged[1].points


def test_tensorboard_holds_the_same(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(tmp_path, name="board")
    wanted = expected(*fit([board, CSVLogger(tmp_path, name="csv")], None))
    events = EventAccumulator(str(board.log_dir)).Reload()
    tags = events.Tags()["scalars"]
    found = {(tag, event.step): event.value for tag in tags for event in events.Scalars(tag)}
    assert ours(found) == pytest.approx(wanted, rel=1e-6, abs=1e-7)
