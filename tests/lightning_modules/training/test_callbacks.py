"""Callbacks: the checkpoint that is kept, the alarm, and probes that never touch the model."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_modules as lm
from lightning_modules.data.tokenization import Encoded
from lightning_modules.run.methods import watching
from lightning_modules.run.options import TrainingOptions
from lightning_modules.training.callbacks import (
    BestTradeoff,
    CollapseAlarm,
    QuantizationProbe,
    RelearnProbe,
    SurgeryLogger,
    TradeoffCurve,
    collapse,
    is_better,
    mean_probabilities,
)
from lightning_modules.training.callbacks.notes import note
from lightning_modules.training.displacement import Displacement
from tests.reference import callbacks as oracle

pytestmark = pytest.mark.filterwarnings("ignore:.*computes all its logits.*", "ignore:.*checkpoint.*")

VOCABULARY = 11


class Bigram(nn.Module):
    """The smallest causal language model: logits of the next token from this one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def examples(count: int, seed: int) -> list[Encoded]:
    tokens = torch.randint(VOCABULARY, (count, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Encoded(row, [-100, -100, *row[2:]]) for row in tokens]


def batches(number: int) -> list[dict[str, dict[str, Tensor]]]:
    def batch(rows: list[Encoded]) -> dict[str, Tensor]:
        tokens = torch.tensor([row.input_ids for row in rows])
        labels = torch.tensor([row.labels for row in rows])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    return [{"forget": batch(examples(4, 1)), "retain": batch(examples(4, 2))} for _ in range(number)]


def make_curve(**options: Any) -> TradeoffCurve:
    return TradeoffCurve(
        {"forget": examples(4, 1), "retain": examples(4, 2)}, pad_token_id=0, every_n_steps=1, **options
    )


def fit(callbacks: list[Any], steps: int = 6, lr: float = 0.3, **options: Any) -> tuple[L.Trainer, Bigram]:
    module = lm.UnlearningModule(Bigram(), optimizer=partial(torch.optim.SGD, lr=lr))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    options = {"max_epochs": 1, "enable_checkpointing": False} | options
    path = options.pop("ckpt_path", None)
    trainer = L.Trainer(callbacks=callbacks, **quiet | options)
    trainer.fit(module, DataLoader(batches(steps), batch_size=None), ckpt_path=path)
    return trainer, module.model


class Scripted(TradeoffCurve):
    """A curve that is told the scores of the steps, so that any of them can be the best or the worst."""

    def __init__(self, *scores: tuple[float, float]) -> None:
        super().__init__({"forget": [], "retain": []}, pad_token_id=0, every_n_steps=1)
        self.scores = scores

    def _score(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if not self.points or self.points[-1]["step"] < step:
            self.points.append({"step": step, "forget": self.scores[step][0], "retain": self.scores[step][1]})


SIX = ((0.9, 0.9), (0.5, 0.8), (0.04, 0.6), (0.01, 0.7), (0.005, 0.3), (0.001, 0.2), (0.02, 0.1))


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_it_goes_on_until_the_others_are_at_most_at_their_limits_too(level: float) -> None:
    alone = make_curve(stop_below=0.9)
    fit([alone])
    curve = make_curve(stop_below=0.9, at_most={"earlier": (examples(3, 5), level), "always": (examples(2, 6), 1.0)})
    trainer, _ = fit([curve])
    assert trainer.global_step == (6 if level == 0.0 else alone.points[-1]["step"])
    assert set(curve.points[0]) == {"step", "forget", "retain"}


class Weights(L.Callback):
    """The model after every step."""

    def __init__(self) -> None:
        self.tables: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.tables.append(module.model.table.detach().clone())

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.tables.append(module.model.table.detach().clone())


# ---- BestTradeoff

SCORES = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.05, 0.5, 1.0, math.nan]))


@given(st.lists(st.tuples(SCORES, SCORES), max_size=12), st.sampled_from([0.05, 0.5, 1.0]))
def test_the_best_kept_along_the_way_is_the_best_of_all(scores: list[tuple[float, float]], target: float) -> None:
    points = [{"step": step, "forget": f, "retain": r} for step, (f, r) in enumerate(scores)]
    kept = None
    for point in points:
        kept = point if is_better(point, kept, target=target) else kept
    expected = oracle.best(points, target)
    assert (kept is None and expected is None) or kept is expected


@pytest.mark.parametrize(("target", "step"), [(0.05, 3), (0.95, 0), (0.008, 4), (1e-4, 5)])
def test_training_ends_with_the_best_weights_and_leaves_them_on_the_disk(
    tmp_path: Path, target: float, step: int
) -> None:
    curve, weights = Scripted(*SIX), Weights()
    keep = BestTradeoff(curve, target=target, path=tmp_path / "best.ckpt", folder=tmp_path)
    trainer, model = fit([curve, keep, weights])
    assert keep.best == oracle.best(curve.points, target) == curve.points[step]
    assert trainer.global_step == 6
    assert len({tuple(table.flatten().tolist()) for table in weights.tables}) == 7
    assert torch.equal(model.table, weights.tables[step])
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]["model.table"]
    assert torch.equal(saved, weights.tables[step])
    found = json.loads((tmp_path / "training.json").read_text())["best"]
    assert (found["step"], found["last_step"], found["restored"]) == (step, 6, True)


def test_without_restoring_the_last_weights_stay(tmp_path: Path) -> None:
    curve, weights = Scripted(*SIX), Weights()
    _, model = fit([curve, BestTradeoff(curve, target=0.05, path=tmp_path / "best.ckpt", restore=False), weights])
    assert torch.equal(model.table, weights.tables[-1])
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]["model.table"]
    assert not torch.equal(saved, weights.tables[-1])


def test_a_run_that_is_interrupted_after_its_last_step_keeps_the_best_when_it_is_resumed(tmp_path: Path) -> None:
    class Interrupted(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            raise ValueError("power cut")

    def callbacks() -> list[Any]:
        curve = Scripted(*SIX)
        checkpoint = L.pytorch.callbacks.ModelCheckpoint(
            tmp_path, filename="last", save_top_k=1, enable_version_counter=False
        )
        return [curve, BestTradeoff(curve, target=0.05, path=tmp_path / "best.ckpt"), weights, checkpoint]

    weights = Weights()
    with pytest.raises(ValueError, match="power cut"):
        fit([Interrupted(), *callbacks()], enable_checkpointing=True)
    last = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert last["global_step"] == 6
    assert torch.equal(last["state_dict"]["model.table"], weights.tables[6])
    _, model = fit(callbacks(), enable_checkpointing=True, ckpt_path=str(tmp_path / "last.ckpt"))
    assert torch.equal(model.table, weights.tables[3])


def test_weights_of_another_step_than_the_best_are_not_loaded(tmp_path: Path) -> None:
    class Replaced(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "best.ckpt", weights_only=True)  # as an interrupted run would have

    curve, weights = Scripted(*SIX), Weights()
    keep = BestTradeoff(curve, target=0.05, path=tmp_path / "best.ckpt", folder=tmp_path)
    with pytest.warns(UserWarning, match="the last weights stay"):
        _, model = fit([curve, keep, Replaced(), weights])
    assert torch.equal(model.table, weights.tables[-1])
    assert json.loads((tmp_path / "training.json").read_text())["best"]["restored"] is False


def test_nothing_is_kept_of_a_run_that_is_nan_throughout(tmp_path: Path) -> None:
    curve = Scripted(*[(0.01, math.nan), (math.nan, 0.9)] * 4)
    with pytest.warns(UserWarning, match="every scored point has a NaN"):
        fit([curve, BestTradeoff(curve, target=0.5, path=tmp_path / "best.ckpt")])
    assert not (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize("make", [partial(BestTradeoff, target=0.1, path="unused"), CollapseAlarm])
def test_a_curve_that_comes_later_or_not_at_all_is_refused(make: Any) -> None:
    for order in (lambda curve, other: [other, curve], lambda curve, other: [other]):
        curve = make_curve()
        with pytest.raises(ValueError, match="expected its TradeoffCurve before it"):
            fit(order(curve, make(curve)))


def test_arguments_outside_their_domain_are_refused() -> None:
    curve = make_curve()
    for target in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="target"):
            BestTradeoff(curve, target=target, path="unused")
    for limits in ({"below": 0.0}, {"below": 1.0}, {"below": None, "drop": 2.0}, {"below": None}):
        with pytest.raises(ValueError, match="CollapseAlarm"):
            CollapseAlarm(curve, **limits)
    only = TradeoffCurve({"forget": examples(1, 0)}, pad_token_id=0, every_n_steps=1)
    with pytest.raises(ValueError, match="retain"):
        BestTradeoff(only, target=0.1, path="unused")
    with pytest.raises(ValueError, match="retain"):
        CollapseAlarm(only)


# ---- CollapseAlarm


def run_of(*retain: float) -> list[dict[str, float]]:
    return [{"step": step, "forget": 0.5, "retain": value} for step, value in enumerate(retain)]


@pytest.mark.parametrize(
    ("retain", "limits", "said"),
    [
        ((0.8, 0.081), {"below": 0.1}, None),
        ((0.8, 0.079), {"below": 0.1}, "below 0.1 times the 0.800"),
        ((0.8, 0.5, 0.3), {"drop": 0.25}, None),
        ((0.8, 0.6, 0.3), {"drop": 0.25}, "more than 0.25 below the 0.600 of step 1"),
        ((0.8, math.nan), {"below": 0.1}, "not a number"),
        ((0.0, 0.0), {"below": 0.5, "drop": 0.1}, None),
        ((), {"below": 0.5}, None),
    ],
)
def test_what_a_collapse_is(retain: tuple[float, ...], limits: dict[str, float], said: str | None) -> None:
    reason = collapse(run_of(*retain), **limits)
    assert reason is None if said is None else said in (reason or "")


def test_the_alarm_stops_the_run_at_the_first_collapsed_score(tmp_path: Path) -> None:
    curve = Scripted(*SIX)
    alarm = CollapseAlarm(curve, below=0.5, folder=tmp_path)
    with pytest.warns(UserWarning, match="training stops here"):
        trainer, _ = fit([curve, alarm])
    assert trainer.global_step == 4
    found = json.loads((tmp_path / "training.json").read_text())["collapse"]
    assert found["step"] == 4
    assert found["reason"] == alarm.reason


def test_a_quiet_run_raises_no_alarm(tmp_path: Path) -> None:
    curve = Scripted(*SIX)
    alarm = CollapseAlarm(curve, below=0.11, drop=0.41, folder=tmp_path)
    trainer, _ = fit([curve, alarm])
    assert trainer.global_step == 6
    assert alarm.reason is None
    assert not (tmp_path / "training.json").exists()


# ---- together


def test_probes_run_at_the_end_on_the_kept_model_and_write_for_the_report(tmp_path: Path) -> None:
    class Linear(Bigram):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(VOCABULARY, VOCABULARY)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
            return SimpleNamespace(logits=self.layer(self.table[input_ids]))

    forget, retain = examples(4, 1), examples(4, 2)
    quantization = QuantizationProbe({"forget": forget}, pad_token_id=0, bits=(4,), folder=tmp_path)
    relearn = RelearnProbe(forget, retain, pad_token_id=0, control=Linear, folder=tmp_path, steps=2, every=2)
    module = lm.UnlearningModule(Linear(), optimizer=partial(torch.optim.SGD, lr=0.1))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, callbacks=[quantization, relearn], enable_checkpointing=False, **quiet)
    trainer.fit(module, DataLoader(batches(2), batch_size=None))
    found = json.loads((tmp_path / "probes.json").read_text())
    assert found == {"quantization": quantization.result, "relearn": relearn.result}
    expected = mean_probabilities(module.model, {"forget": forget}, pad_token_id=0)["forget"]
    assert found["quantization"]["points"][0]["forget"] == pytest.approx(expected, rel=1e-12)
    assert found["relearn"]["control"]["points"][0] != found["relearn"]["model"]["points"][0]


def test_notes_keep_each_other_and_refuse_what_is_not_theirs(tmp_path: Path) -> None:
    path = tmp_path / "new" / "notes.json"
    note(path, "first", {"a": 1.0})
    note(path, "second", {"b": math.nan})
    note(path, "first", {"a": 2.0})
    assert json.loads(path.read_text()) == {"first": {"a": 2.0}, "second": {"b": "NaN"}}
    for text in ("[]", "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"notes\.json"):
            note(path, "third", {})
        assert path.read_text() == text


def test_the_command_watches_as_its_options_say(tmp_path: Path) -> None:
    curve = make_curve()
    default = watching(TrainingOptions(), tmp_path, curve)
    assert [type(callback) for callback in default] == [CollapseAlarm]
    assert watching(TrainingOptions(collapse_below=None), tmp_path, curve) == []
    both = watching(TrainingOptions(collapse_below=0.3, best_below=0.02), tmp_path, curve)
    assert [type(callback) for callback in both] == [CollapseAlarm, BestTradeoff]
    assert (both[0].below, both[1].target) == (0.3, 0.02)
    for name in ("collapse_below", "best_below"):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
            TrainingOptions(**{name: 1.5}).check()


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan")])
def test_a_threshold_that_no_probability_can_fall_below_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"--stop-below.*found {value}"):
        TrainingOptions(stop_below=value).check()


@pytest.mark.parametrize("value", [None, 0.0, 0.05])
def test_thresholds_to_stop_at(value: float | None) -> None:
    TrainingOptions(stop_below=value).check()


def test_public_names() -> None:
    for name in (
        "SurgeryLogger",
        "BestTradeoff",
        "RelearnProbe",
        "QuantizationProbe",
        "TradeoffCurve",
        "CollapseAlarm",
    ):
        assert issubclass(getattr(lm.callbacks, name), L.Callback)
    assert lm.callbacks.SurgeryLogger is SurgeryLogger


def test_a_way_from_zero_has_no_relative_length() -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    way = Displacement(model)
    nn.init.ones_(model.weight)
    assert way.to(model) == (2.0, float("inf"))
