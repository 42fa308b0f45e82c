"""A run that goes on from any checkpoint is the uninterrupted one: batches, dropout, averages, schedule, weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.data.order import PairDataset
from lightning_modules.data.tokenization import Encoded
from lightning_modules.training.callbacks import Checkpoints, SurgeryLogger, TradeoffCurve
from lightning_modules.training.checkpoint_file import CheckpointFile
from lightning_modules.training.warmup import falling_late

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*computes all its logits.*", "ignore:.*does not have many workers.*"),
    pytest.mark.supports(
        "Lightning, automatic optimization",
        "`UnlearningModule`: resuming within an epoch and within an accumulated step, bit for bit",
    ),
]

VOCABULARY, FORGET, RETAIN, EPOCHS = 11, 10, 7, 2


class Dropped(nn.Module):
    """A bigram model with dropout, so that every batch draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        return SimpleNamespace(logits=nn.functional.dropout(self.table[input_ids], 0.3, self.training))


class Data(lm.ForgetRetainDataModule):
    """Five batches an epoch; the retain set ends in the middle of one."""

    def __init__(self, **options: Any) -> None:
        super().__init__((), (), SimpleNamespace(pad_token_id=0, eos_token_id=1), **{"batch_size": 2} | options)  # type: ignore[arg-type]

    def _pairs(self) -> PairDataset:
        if self.dataset is None:
            made = [
                torch.randint(VOCABULARY, (n, 6), generator=torch.Generator().manual_seed(n)) for n in (FORGET, RETAIN)
            ]
            forget, retain = ([Encoded(row, [-100, -100, *row[2:]]) for row in rows.tolist()] for rows in made)
            self.dataset = PairDataset(forget, retain, None)
        return self.dataset


class Seen(L.Callback):
    """Keeps the batches."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[int], list[int]]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.batches.append((index, batch["forget"]["index"].tolist(), batch["retain"]["index"].tolist()))


class Everywhere(L.Callback):
    """Saves a checkpoint after every batch and every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"batch{trainer.fit_loop.total_batch_idx}.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"epoch{trainer.current_epoch}.ckpt")


class Grown(L.Callback):
    """The tables can be read while the run goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        for name, first in (("surgery.csv", 1), ("curve.csv", 0)):
            path = self.folder / name
            rows = path.read_text().splitlines()[1:] if path.exists() else []
            assert [row.partition(",")[0] for row in rows] == [str(n) for n in range(first, trainer.global_step + 1)]


def fit(
    accumulate: int,
    tables: Path,
    path: Path | None = None,
    watch: Sequence[L.Callback] = (),
    method: Mapping[str, Any] = MappingProxyType({"warmup_steps": 4}),
    **options: Any,
) -> tuple[Tensor, list[Any]]:
    torch.manual_seed(0 if path is None else 77)  # a resumed process has drawn other numbers
    module = lm.UnlearningModule(
        Dropped(),
        optimizer=partial(torch.optim.AdamW, lr=0.1),
        surgery=partial(gs.GRU, accumulate=accumulate > 1),
        dual=gs.losses.DualVariable(limit=1.0),
        **method,
    )
    data, seen = Data(**options), Seen()
    dataset = data._pairs()
    splits = {"forget": dataset.forget, "retain": dataset.retain}
    curve = TradeoffCurve(splits, pad_token_id=0, every_n_steps=1, path=tables / "curve.csv")
    callbacks = [SurgeryLogger(tables / "surgery.csv"), curve, Grown(tables), seen, *watch]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    quiet |= {"accelerator": "cpu", "devices": 1, "limit_val_batches": 0, "use_distributed_sampler": False}
    if any(isinstance(callback, Checkpoints) for callback in watch):
        quiet["enable_checkpointing"] = True
    trainer = L.Trainer(max_epochs=EPOCHS, accumulate_grad_batches=accumulate, callbacks=callbacks, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, data, ckpt_path=path, weights_only=True)
    return module.model.table.detach().clone(), seen.batches


# The radius and the learning rate depend on the step and on the length of the training.
SCHEDULED = {"schedule": partial(falling_late, warmup_steps=3), "perturb": lm.PerturbSettings(start=0.1, end=2.0)}


@pytest.mark.parametrize(
    ("accumulate", "method"), [(1, {"warmup_steps": 4}), (3, {"warmup_steps": 4}), (1, SCHEDULED), (3, SCHEDULED)]
)
def test_a_checkpoint_after_any_batch_goes_on_to_the_uninterrupted_weights(
    accumulate: int, method: Mapping[str, Any], tmp_path: Path
) -> None:
    """In the middle of an epoch and of an accumulation window, at the last batch, and at an epoch's end."""
    again_in = tmp_path / "again"
    again_in.mkdir()
    weights, batches = fit(accumulate, tmp_path, watch=[Everywhere(tmp_path)], method=method)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    assert sorted(whole) == ["curve.csv", "surgery.csv"]
    found = sorted(tmp_path.glob("*.ckpt"))
    assert len(found) == EPOCHS * (FORGET // 2 + 1)
    for path in found:
        for name in whole:  # a killed run leaves rows of steps behind its checkpoint
            (again_in / name).write_bytes(whole[name] + b"99,half a li")
        again, seen = fit(accumulate, again_in, path, method=method)
        assert {table.name: table.read_bytes() for table in again_in.iterdir()} == whole, path.name
        assert torch.equal(again, weights), path.name
        assert seen == batches[len(batches) - len(seen) :], path.name
        done = int(path.stem.removeprefix("batch")) + 1 if path.stem.startswith("batch") else None
        if done is not None:  # only a window that was not finished is done again
            into_epoch = done % (FORGET // 2)
            assert len(seen) == len(batches) - done + into_epoch % accumulate, path.name


def test_the_model_of_a_checkpoint_is_loaded_without_a_trainer(tmp_path: Path) -> None:
    weights, _ = fit(1, tmp_path, watch=[Everywhere(tmp_path)])
    last = tmp_path / f"epoch{EPOCHS - 1}.ckpt"
    own = {"model": Dropped(), "dual": gs.losses.DualVariable(limit=1.0)}
    found = lm.UnlearningModule.load_from_checkpoint(last, weights_only=True, **own)
    assert torch.equal(found.model.table, weights)


def test_the_middle_of_an_epoch_of_other_batches_is_refused(tmp_path: Path) -> None:
    fit(1, tmp_path, watch=[Everywhere(tmp_path)])
    with pytest.raises(
        ValueError, match="10 forget examples, 5 a batch, in 1 processes, found one with 10 forget examples, 2 a"
    ):
        fit(1, tmp_path, tmp_path / "batch2.ckpt", batch_size=5)
    torch.load(tmp_path / "epoch0.ckpt", weights_only=True)


# Damaged and foreign checkpoints --------------------------------------------------------------------------------------


class Bomb:
    """Runs a command when an ordinary pickle of it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("saved")
    fit(1, folder, watch=[Everywhere(folder)])
    return (folder / "epoch0.ckpt").read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_half_a_checkpoint_is_refused(kept: float, saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(saved[: int(kept * len(saved)) if isinstance(kept, float) else kept])
    with pytest.raises(
        ValueError, match=r"last\.ckpt: expected a whole checkpoint .* remove it to train from the start"
    ) as failure:
        CheckpointFile().load_checkpoint(path)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    checkpoint = {"state_dict": Bomb(tmp_path / "boom"), "global_step": 0, "loops": {}}
    torch.save(checkpoint, tmp_path / "last.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="nothing in it was run"):
        CheckpointFile().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert not (tmp_path / "boom").exists()
    torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert (tmp_path / "boom").exists()  # it is a bomb


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="found one without global_step, loops, state_dict; remove it"):
        CheckpointFile().load_checkpoint(tmp_path / "weights.pt")
    with pytest.raises(FileNotFoundError, match="found no file; start the training without it"):
        CheckpointFile().load_checkpoint(tmp_path / "none.ckpt")


def test_the_checkpoint_of_another_model_is_one_sentence(
    saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(saved)
    wider, initial = torch.zeros(VOCABULARY + 1, VOCABULARY + 1), Dropped.__init__
    for extra, said in (
        (
            lambda model: setattr(model, "table", nn.Parameter(wider)),
            "the same names and 1 tensors of other shapes, such as model.table",
        ),
        (
            lambda model: model.register_buffer("more", wider),
            "1 names in one of them only and 0 tensors of other shapes, such as model.more",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Dropped, "__init__", lambda self, extra=extra: (initial(self), extra(self))[0])
            with pytest.raises(ValueError, match=said):
                fit(1, tmp_path, path)


def test_the_checkpoint_of_another_run_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "last.ckpt", run={"rule": "gru", "seed": 0})
    state = checkpoints.state_dict()
    checkpoints.load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"found one of another \(rule: gru there, pcgrad here; seed: 0 there, 1 here\); remove it"
    ):
        Checkpoints(tmp_path / "last.ckpt", run={"rule": "pcgrad", "seed": 1}).load_state_dict(state)


@pytest.mark.parametrize(("every", "steps"), [(None, [3, 6]), (2, [2, 3, 4, 6]), (1, [1, 2, 3, 4, 5, 6])])
def test_checkpoints_by_steps_and_by_epochs(
    every: int | None, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accumulation at the windows' ends only, and an epoch's end once."""
    at: list[int] = []
    monkeypatch.setattr(L.Trainer, "save_checkpoint", lambda self, path: at.append(self.global_step))
    fit(2, tmp_path, watch=[Checkpoints(tmp_path / "last.ckpt", every_n_steps=every)])
    assert at == steps
    with pytest.raises(ValueError, match="every_n_steps to be at least 1, or None, found 0"):
        Checkpoints(tmp_path / "last.ckpt", every_n_steps=0)


class Half(L.Callback):
    """Keeps the checkpoint of the first epoch."""

    def __init__(self, path: Path, half: Path) -> None:
        self.path, self.half = path, half

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            shutil.copy(self.path, self.half)


@pytest.mark.parametrize("part", ["half", "last"])
def test_a_training_that_goes_on_has_the_seconds_of_what_it_goes_on_with(part: str, tmp_path: Path) -> None:
    path, taken = tmp_path / "last.ckpt", tmp_path / f"{part}.ckpt"
    first, second = Checkpoints(path), Checkpoints(path)
    fit(2, tmp_path, watch=[first, Half(path, tmp_path / "half.ckpt")])
    checkpoint = torch.load(taken, weights_only=True)
    assert 0 < checkpoint["callbacks"]["Checkpoints"]["seconds"] <= first.seconds
    checkpoint["callbacks"]["Checkpoints"]["seconds"] = 1000.0
    torch.save(checkpoint, taken)
    fit(2, tmp_path, taken, watch=[second])
    assert second.seconds > 1000 if part == "half" else second.seconds == 1000
