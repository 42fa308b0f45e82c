"""Validation: both splits' answer probability for any logger, the curve's own numbers, and no trace in the training."""

from __future__ import annotations

import copy
import csv
import math
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_modules as lm
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.evaluation.likelihood import answer_nll
from lightning_modules.training.callbacks import TradeoffCurve, mean_probabilities
from tests.gradsurgery.optimizer import distributed_workers
from tests.tolerances import Tolerance, close

pytestmark = pytest.mark.filterwarnings("ignore:.*computes all its logits.*")

VOCABULARY = 11
SCORED = Tolerance(1e-6, "float32 log-softmaxes of order 1, of batches that are padded differently")


def examples(count: int, seed: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, VOCABULARY, (5 + n % 3,), generator=generator).tolist() for n in range(count)]
    return [Encoded(row, [-100, -100, *row[2:]]) for row in rows]


SPLITS = {"forget": examples(5, 1), "retain": examples(7, 2)}


def loader(batches: list[Any]) -> DataLoader[Any]:
    # With a generator of its own: otherwise every walk through a loader draws from torch's.
    return DataLoader(batches, batch_size=None, generator=torch.Generator())


def batches(split: str, size: int) -> list[dict[str, Tensor]]:
    rows = SPLITS[split]
    return [collate(rows[start : start + size], 0) for start in range(0, len(rows), size)]


def pairs() -> list[dict[str, dict[str, Tensor]]]:
    return [{"forget": f, "retain": r} for f, r in zip(batches("forget", 2), batches("retain", 2), strict=False)]


class Data(L.LightningDataModule):
    """As `ForgetRetainDataModule`: pairs to train on, and the loaders of both splits to validate with."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.size = size

    def train_dataloader(self) -> Any:
        return loader(pairs())

    def val_dataloader(self) -> Any:
        return [loader(batches(split, self.size)) for split in ("forget", "retain")]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, attention_dropout=0.3, initializer_range=0.5, **sizes))


class Bigram(nn.Module):
    """Takes the two inputs that `UnlearningModule` promises to give, and no other."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids] * attention_mask[..., None])


def module_of(model: nn.Module) -> lm.UnlearningModule:
    return lm.UnlearningModule(model, optimizer=partial(torch.optim.AdamW, lr=0.01))


def trainer_of(**options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(**{"max_epochs": 2, "accelerator": "cpu", "logger": False, **quiet} | options)


def validated(module: L.LightningModule, data: Any) -> dict[str, float]:
    found = trainer_of().validate(module, data, verbose=False)
    return {name: value for scores in found for name, value in scores.items()}


def probability(model: nn.Module, row: Encoded) -> float:
    """One answer by itself, token by token."""
    tokens = torch.tensor([row.input_ids])
    with torch.no_grad():
        log_p = copy.deepcopy(model).eval()(tokens, torch.ones_like(tokens)).logits[0].double().log_softmax(-1)
    logs = [log_p[at - 1, label].item() for at, label in enumerate(row.labels) if label != -100]
    return math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize("make", [llama, Bigram])
def test_validate_gives_the_mean_probability_of_both_splits(make: Any) -> None:
    module = module_of(make())
    found = validated(module, Data())
    assert found.keys() == {"forget/probability", "retain/probability"}
    for split, rows in SPLITS.items():
        expected = sum(probability(module.model, row) for row in rows) / len(rows)
        close(torch.tensor(found[f"{split}/probability"]), torch.tensor(expected), SCORED)
    assert found["forget/probability"] != found["retain/probability"]


@pytest.mark.parametrize("make", [llama, Bigram])
def test_validation_and_the_curve_are_the_same_numbers_bit_for_bit(make: Any) -> None:
    module = module_of(make())
    curve = TradeoffCurve(SPLITS, pad_token_id=0, every_n_steps=3)
    trainer = trainer_of(callbacks=[curve], max_epochs=1)
    trainer.fit(module, Data(size=7))  # one batch a split, as the curve scores it
    (_, end), logged = curve.points, trainer.logged_metrics
    assert end == {"step": 3, **mean_probabilities(module.model, SPLITS, pad_token_id=0)}
    assert {split: logged[f"{split}/probability"].item() for split in SPLITS} == {split: end[split] for split in SPLITS}


def test_the_curve_scores_as_it_did_before_it_had_a_metric() -> None:
    model = llama()
    found = mean_probabilities(model, SPLITS, pad_token_id=0, batch_size=2)
    for split, rows in SPLITS.items():
        assert found[split] == float(torch.exp(-answer_nll(model, rows, pad_token_id=0, batch_size=2)).mean())
    assert math.isnan(mean_probabilities(model, {"none": []}, pad_token_id=0)["none"])


@pytest.mark.parametrize("every", [1, 3])
def test_training_is_the_same_with_and_without_validation_in_between(every: int) -> None:
    weights = []
    for limit in (0, 1.0):
        module = module_of(llama().train())  # with dropout
        torch.manual_seed(1)
        trainer = trainer_of(limit_val_batches=limit, val_check_interval=every)
        trainer.fit(module, Data())
        assert module.model.training
        assert ("forget/probability" in trainer.logged_metrics) == bool(limit)
        weights.append(module.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_any_logger_sees_both_while_training(tmp_path: Path) -> None:
    module = module_of(llama())
    trainer = trainer_of(logger=CSVLogger(tmp_path), max_epochs=3)
    trainer.fit(module, Data())
    with (Path(trainer.log_dir or "") / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["forget/probability"]]
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    assert float(rows[-1]["retain/probability"]) == trainer.callback_metrics["retain/probability"].item()
    assert float(rows[-1]["forget/probability"]) < float(rows[0]["forget/probability"])


def test_nothing_of_validation_is_in_a_checkpoint(tmp_path: Path) -> None:
    module = module_of(llama())
    trainer = trainer_of()
    trainer.fit(module, Data())
    assert not any("probabilit" in name for name in module.state_dict())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer_of(max_epochs=3).fit(module_of(llama()), Data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("loaders", "logged"),
    [
        (lambda: None, False),
        (list, False),
        (lambda: loader(batches("forget", 3)), False),  # of which split? nobody says
        (lambda: loader([torch.zeros(2)]), False),
        (lambda: [loader([torch.zeros(2)]), loader([torch.zeros(2)])], False),
        (lambda: [loader(batches("forget", 3))] * 3, False),
        (lambda: loader(pairs()), True),
    ],
)
def test_other_loaders_do_not_break_training(loaders: Any, logged: bool) -> None:
    trainer = trainer_of(max_epochs=1)
    trainer.fit(module_of(llama()), loader(pairs()), loaders())
    assert trainer.global_step == 3
    assert ("retain/probability" in trainer.logged_metrics) == logged


def test_other_loaders_are_said() -> None:
    with pytest.warns(UserWarning, match="expected two loaders, of forget and of retain examples"):
        trainer_of(max_epochs=1).fit(module_of(llama()), loader(pairs()), loader(batches("forget", 3)))


def test_a_validation_step_of_ones_own_is_left_alone() -> None:
    class Own(lm.UnlearningModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("seen", float(len(batch["labels"])))

    trainer = trainer_of(max_epochs=1)
    trainer.fit(Own(llama()), Data())
    assert {name for name in trainer.logged_metrics if "seen" in name} == {
        "seen/dataloader_idx_0",
        "seen/dataloader_idx_1",
    }
    assert "forget/probability" not in trainer.logged_metrics


class Dealt(Data):
    """Two processes: the second has no forget batch."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def val_dataloader(self) -> Any:
        forget, retain = batches("forget", 5), batches("retain", 2)
        return [loader(forget[self.rank :: 2]), loader(retain[self.rank :: 2])]


def two_processes(rank: int) -> None:
    os.environ.update(LOCAL_WORLD_SIZE=str(distributed_workers.WORLD), GROUP_RANK="0", MASTER_PORT="29500")
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    trainer = trainer_of(strategy=strategy, devices=distributed_workers.WORLD, use_distributed_sampler=False)
    module = module_of(Bigram())
    found = {
        name: value for scores in trainer.validate(module, Dealt(rank), verbose=False) for name, value in scores.items()
    }
    alone = mean_probabilities(module.model, SPLITS, pad_token_id=0)  # and does not wait for the other process
    for split, expected in alone.items():
        close(torch.tensor(found[f"{split}/probability"]), torch.tensor(expected), SCORED)
    if rank == 0:
        mean_probabilities(module.model, SPLITS, pad_token_id=0)


def test_two_processes_log_the_mean_over_the_examples_of_both() -> None:
    distributed_workers.run(two_processes)
