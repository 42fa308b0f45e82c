"""What Lightning offers around a training step: clipping by value, monitors, checkpoints, groups, compiled models, validation."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import gradsurgery as gs
from tests.problems import BASES, TWO, Losses, assert_same, classification, joined, mlp, snapshot, values
from tests.reference import training
from tests.tolerances import STEPPED, close

pytest.importorskip("lightning")
import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|treespec|Checkpoint directory|val_dataloader)"),
    pytest.mark.supports(
        "Lightning, automatic optimization",
        "clipping by value, bf16-true, groups, schedulers, LearningRateMonitor, ModelCheckpoint, resuming within an epoch, "
        "`torch.compile`, `validate` in between",
    ),
    pytest.mark.supports("Lightning, manual optimization", "several optimizers"),
]

BATCHES, EPOCHS, RATE = 6, 2, 0.7
QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}


class InOrder:
    """Numbers of batches. It knows where it stands, as a loader must that is resumed in the middle of an epoch."""

    def __init__(self) -> None:
        self.first = self.given = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[int]:
        first, self.first = self.first, 0
        for number in range(first, BATCHES):
            self.given = number + 1
            yield number

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["given"] % BATCHES


class Module(L.LightningModule):
    """Automatic optimization; batch i of epoch e is number `BATCHES` e + i."""

    def __init__(self, model: nn.Module, optimizer: gs.GradientSurgery, losses: Losses) -> None:
        super().__init__()
        self.model, self.losses, self.surgeon = model, losses, [optimizer]

    def configure_optimizers(self) -> Any:
        scheduler = lr_scheduler.StepLR(self.surgeon[0], 1, gamma=RATE)
        return {"optimizer": self.surgeon[0], "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Any:
        return InOrder()

    def training_step(self, batch: int, index: int) -> Tensor:
        return self.surgeon[0].join(**self.losses(self.model, BATCHES * self.current_epoch + batch, 0))

    def validation_step(self, batch: int, index: int) -> None:
        self.log("retain", self.losses(self.model, 50 + batch, 0)["retain"], batch_size=1)

    def val_dataloader(self) -> Any:
        return InOrder()


def trainer(folder: Path, **options: Any) -> L.Trainer:
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS, "default_root_dir": folder, "logger": False}
    defaults |= {"enable_checkpointing": False, "limit_val_batches": 0, "num_sanity_val_steps": 0, **QUIET}
    return L.Trainer(**(defaults | options))  # type: ignore[arg-type]


def surgeon(model: nn.Module, base: str = "momentum", **options: Any) -> gs.GradientSurgery:
    return gs.GradientSurgery(
        BASES[base](model.parameters()), **{"ema_decay": 0.7, "ema_dtype": torch.float64, **options}
    )


def oracle(base: torch.optim.Optimizer, model: nn.Module, accumulate: int = 1, clip_value: float | None = None) -> None:
    """Train the model as the oracle does, with StepLR's rates by hand."""
    reference = training.Surgery(model, base, TWO, ema_decay={"retain": 0.7})
    if clip_value is not None:
        base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(model.parameters(), clip_value))
    rates = [group["lr"] for group in base.param_groups]
    losses = classification()
    for step in range(EPOCHS * BATCHES // accumulate):
        for group, rate in zip(base.param_groups, rates, strict=True):
            group["lr"] = rate * RATE**step
        reference.step([losses(model, number, 0) for number in range(step * accumulate, (step + 1) * accumulate)])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipping_by_value_is_the_oracles_run(accumulate: int, tmp_path: Path) -> None:
    model, plain = mlp(), mlp()
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}
    trainer(tmp_path, **options).fit(Module(model, surgeon(model, accumulate=accumulate > 1), classification()))
    oracle(BASES["momentum"](plain.parameters()), plain, accumulate, clip_value=0.02)
    close(values(model), values(plain), STEPPED)


def groups(model: nn.Module) -> torch.optim.Optimizer:
    """A rate and a weight decay for each layer."""
    layers: Any = model
    return torch.optim.AdamW(
        [{"params": layers[0].parameters(), "lr": 0.05, "weight_decay": 0.0}, {"params": layers[2].parameters()}],
        lr=0.01,
        weight_decay=0.3,
    )


def test_groups_keep_their_rates_and_the_monitor_sees_them(tmp_path: Path) -> None:
    model, plain = mlp(), mlp()
    optimizer = gs.GradientSurgery(groups(model), ema_decay=0.7, ema_dtype=torch.float64)
    logger = CSVLogger(tmp_path)
    options = {"logger": logger, "callbacks": [LearningRateMonitor("step")], "log_every_n_steps": 1}
    trainer(tmp_path, **options).fit(Module(model, optimizer, classification()))
    oracle(groups(plain), plain)
    close(values(model), values(plain), STEPPED)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for group, rate in ((1, 0.05), (2, 0.01)):
        seen = [float(row[f"lr-GradientSurgery/pg{group}"]) for row in rows]
        assert seen == pytest.approx([rate * RATE**step for step in range(EPOCHS * BATCHES)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_resumed_in_the_middle_of_an_epoch_is_the_uninterrupted_one_bit_for_bit(
    accumulate: int, tmp_path: Path
) -> None:
    """From the file that ModelCheckpoint leaves, between two windows. (`lm.UnlearningModule` is resumed within one, too.)"""
    losses, model, resumed = classification(), mlp(), mlp(seed=1)
    options: dict[str, Any] = {"accumulate": accumulate > 1, "rule": gs.rules.GradVac(beta=0.5)}
    whole, again = (surgeon(each, "AdamW", **options) for each in (model, resumed))
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    kept = {"enable_checkpointing": True, "callbacks": [keep], "accumulate_grad_batches": accumulate}
    trainer(tmp_path, **kept).fit(Module(model, whole, losses))
    place = 8 // accumulate  # the second batch of the second epoch is the last that it has seen
    fresh = trainer(tmp_path, accumulate_grad_batches=accumulate)
    fresh.fit(Module(resumed, again, losses), ckpt_path=tmp_path / f"step={place}.ckpt", weights_only=True)
    assert fresh.global_step == EPOCHS * BATCHES // accumulate
    for optimizer in (whole, again):
        optimizer.zero_grad()
    assert_same(snapshot(resumed, again), snapshot(model, whole))


class Constant(Module):
    """Without a scheduler."""

    def configure_optimizers(self) -> Any:
        return self.surgeon[0]


def test_validation_between_two_fits_changes_nothing(tmp_path: Path) -> None:
    model, plain = mlp(), mlp()
    optimizer, reference = surgeon(model), surgeon(plain)
    module = Constant(model, optimizer, classification())
    runner = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    runner.fit(module)
    (found,) = runner.validate(module, verbose=False)
    assert found["retain"] > 0.0
    runner.fit_loop.max_epochs = EPOCHS
    runner.fit(module)
    joined(plain, reference, classification(), range(EPOCHS * BATCHES))
    optimizer.zero_grad()
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))


def test_a_compiled_model_is_the_oracles_run(tmp_path: Path) -> None:
    model, plain = mlp(), mlp()
    compiled: Any = torch.compile(model, backend="aot_eager")
    trainer(tmp_path).fit(Module(compiled, surgeon(model), classification()))
    oracle(BASES["momentum"](plain.parameters()), plain)
    close(values(model), values(plain), STEPPED)


def test_bf16_true_is_a_bf16_model_by_hand(tmp_path: Path) -> None:
    model, plain = mlp(dtype=torch.float32), mlp(dtype=torch.bfloat16)
    optimizer, reference = surgeon(model), surgeon(plain)
    module = Module(model, optimizer, classification())
    trainer(tmp_path, precision="bf16-true", max_epochs=1).fit(module)
    assert next(model.parameters()).dtype == torch.bfloat16
    scheduler = lr_scheduler.StepLR(reference, 1, gamma=RATE)
    for step in range(BATCHES):
        joined(plain, reference, classification(), [step])
        scheduler.step()
    optimizer.zero_grad()
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))


class Two(L.LightningModule):
    """Two models, each with a surgeon of its own, in manual optimization."""

    def __init__(self, models: list[nn.Sequential], optimizers: list[gs.GradientSurgery]) -> None:
        super().__init__()
        self.models, self.made, self.automatic_optimization = nn.ModuleList(models), optimizers, False

    def configure_optimizers(self) -> Any:
        return self.made

    def training_step(self, batch: int, index: int) -> None:
        proxies: Any = self.optimizers()
        for number, (model, optimizer) in enumerate(zip(self.models, proxies, strict=True)):
            for name, loss in classification()(model, 10 * number + batch, 0).items():
                with optimizer.objective(name):
                    self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    def train_dataloader(self) -> Any:
        return InOrder()


def test_several_optimizers_each_keep_their_own_rows(tmp_path: Path) -> None:
    models, plain = ([mlp(seed=seed) for seed in (0, 1)] for _ in range(2))
    bases = ("momentum", "AdamW")
    optimizers = [surgeon(model, base) for model, base in zip(models, bases, strict=True)]
    trainer(tmp_path, max_epochs=1).fit(Two(models, optimizers))
    for number, (model, base) in enumerate(zip(plain, bases, strict=True)):
        reference = surgeon(model, base)
        joined(model, reference, classification(), range(10 * number, 10 * number + BATCHES))
        assert_same(snapshot(models[number], optimizers[number]), snapshot(model, reference))
