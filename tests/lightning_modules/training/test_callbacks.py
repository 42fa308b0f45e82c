"""Callbacks: the checkpoint that is kept, the alarm, and probes that never touch the model."""

from __future__ import annotations

import copy
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
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lightning_modules as lm
from lightning_modules.data.tokenization import Encoded
from lightning_modules.run.methods import watching
from lightning_modules.run.options import TrainingOptions
from lightning_modules.training.adapters import with_adapters
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
    quantization_probe,
    quantize_,
    relearn_probe,
    round_to_nearest,
)
from lightning_modules.training.callbacks.notes import note
from tests.reference import callbacks as oracle
from tests.tolerances import Tolerance, close

pytestmark = pytest.mark.filterwarnings("ignore:.*computes all its logits.*", "ignore:.*checkpoint.*")

VOCABULARY = 11
ROUNDED = Tolerance(
    1e-6, "a float32 product and quotient of numbers of order 1; no value is near the middle of two levels"
)
RELEARNED = Tolerance(2e-5, "as STEPPED_FLOAT32: eight float32 steps of AdamW on numbers of order 1")


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


# ---- RelearnProbe


@pytest.mark.parametrize("mode", [True, False])
def test_the_probe_is_a_plain_loop_on_a_copy(mode: bool) -> None:
    model, forget, retain = Bigram().train(mode), examples(8, 3), examples(3, 4)
    model.table.grad = torch.ones_like(model.table)
    before, state = model.table.detach().clone(), torch.get_rng_state()
    with torch.no_grad():  # Lightning may call from there
        found = relearn_probe(model, forget, retain, pad_token_id=0, steps=8, every=3, lr=0.05, batch_size=2)
    assert torch.equal(model.table, before)
    assert torch.equal(model.table.grad, torch.ones_like(before))
    assert model.training is mode
    assert torch.equal(torch.get_rng_state(), state)
    taught, rest = [forget[2], forget[6]], [row for index, row in enumerate(forget) if index not in (2, 6)]
    assert [point["step"] for point in found["points"]] == [0, 3, 6, 8]
    assert (found["taught"], found["rest"]) == (2, 6)
    for point in found["points"]:
        table = oracle.relearned(before, taught, point["step"], 0.05)
        for name, rows in (("taught", taught), ("rest", rest), ("retain", retain)):
            expected = sum(oracle.probability(table, *row) for row in rows) / len(rows)
            close(torch.tensor(point[name]), torch.tensor(expected), RELEARNED)
    assert found["points"][-1]["taught"] > found["points"][0]["taught"]


def test_batches_of_a_part_see_every_taught_answer_in_turn() -> None:
    seen: list[int] = []

    class Watched(Bigram):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
            if torch.is_grad_enabled():
                seen.extend(input_ids[:, 0].tolist())
            return super().forward(input_ids)

    forget = [Encoded([first, 1, 2], [-100, 1, 2]) for first in range(8)]
    relearn_probe(Watched(), forget, pad_token_id=0, steps=4, batch_size=2, share=0.5)
    assert sorted(seen) == sorted([1, 3, 5, 7] * 2)
    assert sorted(seen[:4]) == [1, 3, 5, 7]


def test_a_bfloat16_model_is_taught_in_float32() -> None:
    model = Bigram().to(torch.bfloat16)
    found = relearn_probe(model, examples(8, 3), pad_token_id=0, steps=4, lr=1e-4)
    assert found["points"][-1]["taught"] > found["points"][0]["taught"]
    assert model.table.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"every": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": math.inf}, {"share": 0.0}, {"share": 1.0}],
)
def test_a_probe_outside_its_domain_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="relearn_probe: expected"):
        relearn_probe(Bigram(), examples(4, 0), pad_token_id=0, **wrong)


# ---- QuantizationProbe


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_takes_the_nearest_level_of_the_row(bits: int) -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(bits))
    weight[2] = 0.0
    weight[3, 4:] = 0.0
    found = round_to_nearest(weight, bits)
    close(found.double(), oracle.rounded(weight, bits), ROUNDED, scale=weight.abs().amax())
    assert torch.equal(round_to_nearest(weight.T, bits, dim=0), found.T)
    assert all(len(row.unique()) <= 2**bits - 1 for row in found)
    assert torch.equal(round_to_nearest(found, bits), found) or bits > 2  # levels of two bits are exact


def test_rounding_hides_no_nan_and_refuses_other_bits() -> None:
    weight = torch.tensor([[1.0, math.nan], [math.inf, 1.0], [1.0, 0.5]])
    found = round_to_nearest(weight, 4)
    assert found[0].isnan().all()
    assert found[1].isnan().any()
    assert found[2].isfinite().all()
    assert round_to_nearest(torch.ones(2, 2, dtype=torch.bfloat16), 4).dtype == torch.bfloat16
    for bits in (1, 17):
        with pytest.raises(ValueError, match="2 to 16 bits"):
            round_to_nearest(weight, bits)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes)).eval()


def test_every_linear_weight_but_the_head_is_rounded() -> None:
    model, plain = llama(), llama()
    quantize_(model, 3)
    for (name, found), (_, weight) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        linear = ("_proj" in name) and name.endswith("weight")
        assert torch.equal(found, round_to_nearest(weight, 3) if linear else weight), name
        assert not linear or not torch.equal(found, weight)


def test_gpt2_has_its_neurons_in_columns() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    quantize_(model, 3)
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, round_to_nearest(weight.T, 3).T)
    assert torch.equal(model.lm_head.weight, head)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="linear layers"):
        quantize_(Bigram(), 4)


def test_the_probe_scores_rounded_copies_and_leaves_the_model() -> None:
    model, splits = llama(), {"forget": examples(3, 1), "retain": examples(3, 2)}
    before = copy.deepcopy(model.state_dict())
    points = quantization_probe(model, splits, pad_token_id=0, bits=(8, 2))["points"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [point["bits"] for point in points] == [None, 8, 2]
    for point, rounded in zip(points, (llama(), quantize_(llama(), 8), quantize_(llama(), 2)), strict=True):
        assert point == {"bits": point["bits"], **mean_probabilities(rounded, splits, pad_token_id=0)}
    assert len({point["forget"] for point in points}) == 3


def test_adapters_are_merged_before_rounding_and_stay_in_the_model() -> None:
    adapted, splits = with_adapters(llama(), rank=2), {"forget": examples(3, 1)}
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    points = quantization_probe(adapted, splits, pad_token_id=0, bits=(3,))["points"]
    assert any("lora_B" in name for name, _ in adapted.named_parameters())
    merged = quantize_(copy.deepcopy(adapted).merge_and_unload(), 3)
    assert points[1]["forget"] == mean_probabilities(merged, splits, pad_token_id=0)["forget"]


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
