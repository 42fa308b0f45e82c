"""The optimizer under Lightning: automatic optimization through join, manual optimization through contexts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import gradsurgery as gs
from tests.gradsurgery.optimizer import distributed_workers as workers
from tests.problems import BASES, TWO, Losses, assert_same, classification, mlp, snapshot, values
from tests.reference import training
from tests.tolerances import STEPPED, close

pytest.importorskip("lightning")
import lightning as L

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]

BATCHES = 6


class Unlearning(L.LightningModule):
    """Batch i of an epoch is number i; epoch e adds `BATCHES` e."""

    def __init__(self, model: nn.Module, optimizer: gs.GradientSurgery, losses: Losses, *, rate: float = 0.7) -> None:
        super().__init__()
        self.model, self.losses, self.rate = model, losses, rate
        self.surgeon = [optimizer]

    def configure_optimizers(self) -> Any:
        scheduler = lr_scheduler.StepLR(self.surgeon[0], 1, gamma=self.rate)
        return {"optimizer": self.surgeon[0], "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(BATCHES), batch_size=1)  # type: ignore[arg-type]

    def number(self, batch: Tensor) -> int:
        return BATCHES * self.current_epoch + int(batch)


class Automatic(Unlearning):
    def training_step(self, batch: Tensor, index: int) -> Tensor:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        return optimizer.join(**self.losses(self.model, self.number(batch), 0))


class Manual(Unlearning):
    def __init__(self, *arguments: Any, accumulate: int = 1, clip: float | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.automatic_optimization = False
        self.window, self.clip = accumulate, clip

    def training_step(self, batch: Tensor, index: int) -> None:
        optimizer: Any = self.optimizers()
        for name, loss in self.losses(self.model, self.number(batch), 0).items():
            with optimizer.objective(name):
                self.manual_backward(loss / self.window)
        if (index + 1) % self.window == 0:
            optimizer.combine()
            if self.clip is not None:
                self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()  # type: ignore[union-attr]


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": folder, **quiet, **options}
    )


def surgeon(model: nn.Module, base: str = "momentum", **options: Any) -> gs.GradientSurgery:
    return gs.GradientSurgery(
        BASES[base](model.parameters()), **{"ema_decay": 0.7, "ema_dtype": torch.float64, **options}
    )


def expected(losses: Losses, accumulate: int, clip: float | None, *, epochs: int = 1) -> Tensor:
    """The oracle's parameters, with StepLR's rates by hand."""
    model = mlp()
    reference = training.Surgery(
        model, BASES["momentum"](model.parameters()), TWO, ema_decay={"retain": 0.7}, max_norm=clip
    )
    rate = reference.base.param_groups[0]["lr"]
    for step in range(epochs * BATCHES // accumulate):
        reference.base.param_groups[0]["lr"] = rate * 0.7**step
        reference.step([losses(model, number, 0) for number in range(step * accumulate, (step + 1) * accumulate)])
    return values(model)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_automatic_optimization_is_the_oracles_run(accumulate: int, clip: float | None, tmp_path: Path) -> None:
    losses, model = classification(), mlp()
    optimizer = surgeon(model, accumulate=accumulate > 1)
    runner = trainer(tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=clip, max_epochs=2)
    runner.fit(Automatic(model, optimizer, losses))
    close(values(model), expected(losses, accumulate, clip, epochs=2), STEPPED)
    assert runner.global_step == 2 * BATCHES // accumulate


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_manual_optimization_is_the_oracles_run(accumulate: int, clip: float | None, tmp_path: Path) -> None:
    losses, model = classification(), mlp()
    runner = trainer(tmp_path, max_epochs=2)
    runner.fit(Manual(model, surgeon(model), losses, accumulate=accumulate, clip=clip))
    close(values(model), expected(losses, accumulate, clip, epochs=2), STEPPED)
    assert runner.global_step == 2 * BATCHES // accumulate


def assert_same_training(
    found: tuple[nn.Module, gs.GradientSurgery], wanted: tuple[nn.Module, gs.GradientSurgery]
) -> None:
    """But for what a scheduler and Lightning's last batch leave behind."""
    kept = []
    for model, optimizer in (found, wanted):
        optimizer.zero_grad()
        kept.append([entry for entry in snapshot(model, optimizer) if not entry[0].endswith("initial_lr")])
    assert_same(*kept)


def by_hand(
    model: nn.Module, optimizer: gs.GradientSurgery, losses: Losses, dtype: torch.dtype, scaler: torch.amp.GradScaler
) -> None:
    """The documented loop with autocast, a scaler and clipping, for `BATCHES` steps."""
    for number in range(BATCHES):
        with torch.autocast("cpu", dtype):
            loss = optimizer.join(**losses(model, number, 0))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def test_bf16_mixed_is_autocast_by_hand(tmp_path: Path) -> None:
    losses, model, plain = classification(), mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    optimizer, reference = surgeon(model), surgeon(plain)
    trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=0.1).fit(Automatic(model, optimizer, losses, rate=1.0))
    by_hand(plain, reference, losses, torch.bfloat16, torch.amp.GradScaler("cpu", enabled=False))
    assert_same_training((model, optimizer), (plain, reference))


def with_overflow(model: nn.Module, step: int, micro: int) -> dict[str, Tensor]:
    """The retain gradient of batch 3 is infinite in one weight."""
    found = classification()(model, step, micro)
    if step == 3:
        found["retain"] = found["retain"] + torch.inf * next(model.parameters())[0, 0]
    return found


@pytest.mark.parametrize("losses", [classification(), with_overflow], ids=["finite", "overflow"])
def test_fp16_mixed_with_a_scaler_is_the_scaler_by_hand(losses: Losses, tmp_path: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)

    model, plain = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    optimizer, reference = surgeon(model), surgeon(plain)
    ours, theirs = scaler(), scaler()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=ours)
    trainer(tmp_path, plugins=[plugin], gradient_clip_val=0.1).fit(Automatic(model, optimizer, losses, rate=1.0))
    by_hand(plain, reference, losses, torch.float16, theirs)
    assert ours.get_scale() == theirs.get_scale()
    assert_same_training((model, optimizer), (plain, reference))
    assert values(model).isfinite().all()
    assert optimizer.state_dict()["param_groups"][0]["gradsurgery_steps"] == BATCHES - (losses is with_overflow)


@pytest.mark.parametrize("weights_only", [None, True])
def test_a_resumed_fit_is_the_uninterrupted_one_bit_for_bit(weights_only: bool | None, tmp_path: Path) -> None:
    losses = classification()
    model, half, resumed = mlp(), mlp(), mlp(seed=1)
    whole, start, again = (surgeon(each, "AdamW", rule=gs.rules.GradVac(beta=0.5)) for each in (model, half, resumed))
    trainer(tmp_path, max_epochs=2).fit(Automatic(model, whole, losses))
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Automatic(half, start, losses))
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_epochs=2).fit(
        Automatic(resumed, again, losses), ckpt_path=tmp_path / "half.ckpt", weights_only=weights_only
    )
    assert_same(snapshot(resumed, again), snapshot(model, whole))


def test_validation_joins_without_rows(tmp_path: Path) -> None:
    """The sanity check before training must leave no row behind."""

    class Validated(Automatic):
        def validation_step(self, batch: Tensor, index: int) -> None:
            loss = self.surgeon[0].join(**self.losses(self.model, 50 + int(batch), 0))
            assert not loss.requires_grad

        def val_dataloader(self) -> DataLoader[int]:
            return self.train_dataloader()

    losses, model = classification(), mlp()
    trainer(tmp_path, max_epochs=2).fit(Validated(model, surgeon(model), losses))
    close(values(model), expected(losses, 1, None, epochs=2), STEPPED)


def test_a_training_step_that_returns_none_skips_its_batch(tmp_path: Path) -> None:
    class Skipping(Automatic):
        def training_step(self, batch: Tensor, index: int) -> Tensor | None:  # type: ignore[override]
            return None if index == 2 else super().training_step(batch, index)

    losses, model, plain = classification(), mlp(), mlp()
    optimizer, reference = surgeon(model), surgeon(plain)
    trainer(tmp_path).fit(Skipping(model, optimizer, losses, rate=1.0))
    for number in (0, 1, 3, 4, 5):
        reference.join(**losses(plain, number, 0)).backward()
        reference.step()
        reference.zero_grad()
    assert_same_training((model, optimizer), (plain, reference))


# Two processes -------------------------------------------------------------------------------------------------------------------


def lightning_ddp(rank: int, folder: str) -> None:
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    os.environ.update(LOCAL_WORLD_SIZE=str(workers.WORLD), GROUP_RANK="0", MASTER_PORT="29500")
    kinds: list[tuple[Callable[..., Unlearning], int]] = [(Automatic, 1), (Automatic, 3), (Manual, 1)]
    for kind, accumulate in kinds:
        model, plain = mlp(), mlp()
        strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
        options = {"strategy": strategy, "devices": workers.WORLD, "use_distributed_sampler": False, "barebones": False}
        optimizer = surgeon(model, accumulate=accumulate > 1)
        losses = workers.of_rank(rank)
        clip = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.1} if kind is Automatic else {}
        trainer(Path(folder), **options, **clip).fit(kind(model, optimizer, losses, rate=1.0))
        reference = training.Surgery(
            plain, BASES["momentum"](plain.parameters()), TWO, ema_decay={"retain": 0.7}, max_norm=0.1 if clip else None
        )
        for step in range(BATCHES // accumulate):
            numbers = range(step * accumulate, (step + 1) * accumulate)
            reference.step([losses for number in numbers for losses in workers.whole(plain, number)])
        workers.check(model, plain)


def test_lightning_ddp_is_the_single_process_run(tmp_path: Path) -> None:
    """Join inside DDP's forward pass with clipping, with accumulation, and sequential contexts in manual optimization."""
    workers.run(lightning_ddp, str(tmp_path))
