"""GEffectLogger under Lightning."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradsurgery as gs
from gradsurgery.optimizer.scope import by_layer
from lightning_modules.training.callbacks import GEffectLogger
from lightning_modules.training.module import UnlearningModule
from tests.lightning_modules.training.test_module import Bigram, batches, fit
from tests.tolerances import SAME, close

COLUMNS = ["step", "layer", "norm_forget", "norm_retain", "g_effect_retain", "cosine_retain"]


class Layers(Bigram):
    """A Bigram whose parameters are called as in a Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(11, 11, bias=False)}) for _ in range(2)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = super().forward(input_ids, attention_mask)
        for layer in self.layers:
            output.logits = output.logits + layer["mlp"](output.logits).tanh()
        return output


def module(**options: Any) -> UnlearningModule:
    torch.manual_seed(0)
    surgery = partial(gs.GRU, **{"record_scope": by_layer, **options})
    return UnlearningModule(Layers(), optimizer=partial(torch.optim.AdamW, lr=1e-2), surgery=surgery)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Records(L.Callback):
    """Every step's record, as the module sees it."""

    def __init__(self) -> None:
        self.found: list[gs.Record] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        record = pl_module.surgery.record
        if record is not None and record.applied and (not self.found or record is not self.found[-1]):
            self.found.append(record)


@pytest.mark.parametrize("flush_every", [1, 2, 20])
def test_the_file_holds_every_steps_record(tmp_path: Path, flush_every: int) -> None:
    log, records = GEffectLogger(tmp_path / "g_effect.csv", flush_every), Records()
    fit(module(), batches(5), callbacks=[records, log])
    rows = read(log.path)
    assert list(rows[0]) == COLUMNS
    layers = ["table", "layer 0 mlp", "layer 1 mlp"]
    assert [(int(row["step"]), row["layer"]) for row in rows] == [(s, layer) for s in range(1, 6) for layer in layers]
    numbers = torch.tensor([[float(row[c]) for c in COLUMNS[2:]] for row in rows], dtype=torch.float64).view(5, 3, 4)
    for found, record in zip(numbers, records.found, strict=True):
        assert record.block_gram is not None
        assert record.block_cosines is not None
        close(found[:, 2], record.block_gram[:, 0, 1], SAME, scale=record.block_gram.abs().max())
        close(found[:, :2].square(), record.block_gram.diagonal(dim1=1, dim2=2), SAME, scale=record.gram.abs().max())
        close(found[:, 3], record.block_cosines[:, 0, 1], SAME)
        close(found[:, 2].sum(), record.gram[0, 1], SAME, scale=record.gram.abs().max())  # the numbers of surgery.csv


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    log = GEffectLogger(tmp_path / "g_effect.csv")
    trainer = fit(module(accumulate=True), batches(5), accumulate_grad_batches=2, callbacks=[log])
    assert trainer.global_step == 3
    assert log.steps == [1, 2, 3]
    assert log.gram.shape == (3, 3, 2, 2)


def test_a_resumed_run_leaves_the_file_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    data = batches(3)

    def run(folder: str, epochs: int, **options: Any) -> str:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        log = GEffectLogger(path / "g_effect.csv", flush_every=2)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[log], enable_checkpointing=False, **quiet)
        trainer.fit(module(), DataLoader(data, batch_size=None), **options)
        trainer.save_checkpoint(path / "last.ckpt")
        return log.path.read_text(encoding="utf-8")

    whole = run("whole", 2)
    first = run("cut", 1)
    assert whole.startswith(first)
    assert first != whole
    # What was written after the checkpoint, before the interruption, is not what the resumed run knows of.
    (tmp_path / "cut" / "g_effect.csv").write_text(first + "4,lost,1,1,1,1\n", encoding="utf-8")
    assert run("cut", 2, ckpt_path=str(tmp_path / "cut" / "last.ckpt"), weights_only=True) == whole


class Plain(L.LightningModule):
    """Three objectives, and nothing of ours but the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        base = torch.optim.SGD(self.named_parameters(), lr=0.1)
        return gs.GradientSurgery(base, objectives=("f", "a", "b"), record_scope=by_layer)

    def training_step(self, batch: Tensor) -> Tensor:
        outputs = self.layers[1](self.layers[0](batch).tanh())
        losses = {name: (outputs[:, k] - k).square().mean() for k, name in enumerate(("f", "a", "b"))}
        return self.optimizers(use_pl_optimizer=False).join(retain_graph=True, **losses)


def test_any_lightning_module_and_several_protected_objectives(tmp_path: Path) -> None:
    log, model = GEffectLogger(tmp_path / "g_effect.csv"), Plain()
    trainer = fit(model, [torch.randn(4, 3)], callbacks=[log])
    rows = read(log.path)
    gram = trainer.optimizers[0].record.block_gram
    assert [row["layer"] for row in rows] == ["layer 0", "layer 1"]
    for row, of_layer in zip(rows, gram, strict=True):
        for k, name in enumerate("ab", start=1):
            effect = float(of_layer[0, k])
            assert float(row[f"g_effect_{name}"]) == effect
            assert float(row[f"cosine_{name}"]) == pytest.approx(effect / float(of_layer[0, 0] * of_layer[k, k]) ** 0.5)


def test_an_update_that_was_not_stepped_has_no_rows(tmp_path: Path) -> None:
    log, model = GEffectLogger(tmp_path / "g_effect.csv"), Layers()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.named_parameters(), lr=0.1), record_scope=by_layer)
    trainer = SimpleNamespace(optimizers=[optimizer], global_step=1, is_global_zero=True)
    optimizer.join(forget=model.table.sum(), retain=model.table[0].sum()).backward()
    log.on_train_batch_end(trainer)  # as after a GradScaler's skip
    assert log.steps == []
    optimizer.step()
    log.on_train_batch_end(trainer)
    assert log.steps == [1]


def test_an_exception_leaves_the_steps_before_it(tmp_path: Path) -> None:
    class Broken(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
            if index == 3:
                raise RuntimeError("broken")

    log = GEffectLogger(tmp_path / "g_effect.csv")
    with pytest.raises(RuntimeError, match="broken"):
        fit(module(), batches(5), callbacks=[log, Broken()])
    assert [int(row["step"]) for row in read(log.path)] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_an_optimizer_that_records_no_layers_is_refused_before_the_first_step(tmp_path: Path) -> None:
    log = GEffectLogger(tmp_path / "g_effect.csv")
    with pytest.raises(ValueError, match=r"record_scope=gradsurgery\.scope\.by_layer"):
        fit(module(record_scope=None), batches(2), callbacks=[log])
    assert not log.path.exists()


def test_the_layers_of_another_model_are_refused(tmp_path: Path) -> None:
    log = GEffectLogger(tmp_path / "g_effect.csv")
    state = {"steps": [0], "gram": torch.zeros(1, 1, 2, 2, dtype=torch.float64), "layers": ["x"]}
    log.load_state_dict({**state, "objectives": ["forget", "retain"]})
    with pytest.raises(ValueError, match="resume with the model"):
        fit(module(), batches(2), callbacks=[log])
