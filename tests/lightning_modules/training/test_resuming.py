"""A run that goes on from any checkpoint is the uninterrupted one: batches, dropout, averages, schedule, weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.data.order import PairDataset
from lightning_modules.data.tokenization import Encoded

pytestmark = pytest.mark.filterwarnings("ignore:.*computes all its logits.*", "ignore:.*does not have many workers.*")

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


class Everywhere(L.Callback):
    """Saves a checkpoint after every batch and every epoch, and keeps the batches seen."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.seen: list[tuple[int, list[int], list[int]]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.seen.append((index, batch["forget"]["index"].tolist(), batch["retain"]["index"].tolist()))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.save(trainer, f"batch{trainer.fit_loop.total_batch_idx}")

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.save(trainer, f"epoch{trainer.current_epoch}")

    def save(self, trainer: L.Trainer, name: str) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")


def fit(
    accumulate: int, folder: Path | None = None, path: Path | None = None, **options: Any
) -> tuple[Tensor, list[Any]]:
    torch.manual_seed(0 if path is None else 77)  # a resumed process has drawn other numbers
    module = lm.UnlearningModule(
        Dropped(),
        optimizer=partial(torch.optim.AdamW, lr=0.1),
        surgery=partial(gs.GRU, accumulate=accumulate > 1),
        warmup_steps=4,
        dual=gs.losses.DualVariable(limit=1.0),
    )
    watch = Everywhere(folder)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    quiet |= {"accelerator": "cpu", "devices": 1, "limit_val_batches": 0, "use_distributed_sampler": False}
    trainer = L.Trainer(max_epochs=EPOCHS, accumulate_grad_batches=accumulate, callbacks=[watch], **quiet)  # type: ignore[arg-type]
    trainer.fit(module, Data(**options), ckpt_path=path, weights_only=True)
    return module.model.table.detach().clone(), watch.seen


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_checkpoint_after_any_batch_goes_on_to_the_uninterrupted_weights(accumulate: int, tmp_path: Path) -> None:
    """In the middle of an epoch and of an accumulation window, at the last batch, and at an epoch's end."""
    weights, batches = fit(accumulate, tmp_path)
    found = sorted(tmp_path.iterdir())
    assert len(found) == EPOCHS * (FORGET // 2 + 1)
    for path in found:
        again, seen = fit(accumulate, path=path)
        assert torch.equal(again, weights), path.name
        assert seen == batches[len(batches) - len(seen) :], path.name
        done = int(path.stem.removeprefix("batch")) + 1 if path.stem.startswith("batch") else None
        if done is not None:  # only a window that was not finished is done again
            into_epoch = done % (FORGET // 2)
            assert len(seen) == len(batches) - done + into_epoch % accumulate, path.name


def test_the_middle_of_an_epoch_of_other_batches_is_refused(tmp_path: Path) -> None:
    fit(1, tmp_path)
    with pytest.raises(
        ValueError, match="10 forget examples, 5 a batch, in 1 processes, found one with 10 forget examples, 2 a"
    ):
        fit(1, path=tmp_path / "batch2.ckpt", batch_size=5)
    fit(1, path=tmp_path / "epoch0.ckpt", batch_size=5)  # the next epoch is whole
