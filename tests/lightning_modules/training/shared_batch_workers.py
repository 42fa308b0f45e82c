"""What two processes do that have half of every batch each; apart, so that processes can import it."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.data.tokenization import collate
from lightning_modules.training import objectives
from lightning_modules.training.callbacks import SurgeryLogger
from lightning_modules.training.noise import NoiseSettings, noised
from tests.gradsurgery.optimizer.distributed_workers import WORLD
from tests.lightning_modules.evaluation.evaluation_workers import SPLITS, model_and_tokenizer
from tests.lightning_modules.training.test_callbacks import examples


def the_noise_of_the_whole_batch(rank: int) -> None:
    rows = [row for number in range(4) for row in examples(2, number)]
    rows[3] = rows[3]._replace(input_ids=rows[3].input_ids[:-3], labels=rows[3].labels[:-3])
    whole = collate(rows, 0)
    part = collate(rows[rank::WORLD], 0)
    part = {name: tensor[:, : part["attention_mask"].sum(1).max()] for name, tensor in part.items()}
    torch.manual_seed(0)
    expected = noised(whole, 0.3)["input_ids"][rank::WORLD, : part["input_ids"].shape[1]]
    assert not expected.equal(part["input_ids"])
    torch.manual_seed(0)
    assert noised(part, 0.3, {"num_replicas": WORLD, "rank": rank})["input_ids"].equal(expected)


def the_steps_and_the_rows_of_one_process(_: int) -> None:
    """The parts of --recipe deep together, with a forget set that two batches of two processes divide."""
    alone, together = (trained(batch_size, **own) for batch_size, own in ((4, ALONE), (2, TOGETHER)))
    for name, value in alone[0].items():
        torch.testing.assert_close(together[0][name], value, rtol=0.0, atol=1e-5, msg=name)
    assert len(together[1]) == len(alone[1]) == 2
    for row, other in zip(together[1], alone[1], strict=True):
        for column in ("loss_forget", "loss_retain", "norm_forget", "norm_retain", "update_norm"):
            assert row[column] == pytest.approx(other[column], rel=1e-3), column


ALONE: dict[str, Any] = {"devices": 1, "plugins": [LightningEnvironment()]}
TOGETHER: dict[str, Any] = {"devices": WORLD, "strategy": "ddp"}


def trained(batch_size: int, **own: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The weights, and the rows of surgery.csv."""
    torch.manual_seed(5)
    model, tokenizer = model_and_tokenizer()
    logger = SurgeryLogger()
    module = lm.UnlearningModule(
        model,
        forget_loss=objectives.with_substitutes(gs.losses.ceu),
        retain_loss=gs.losses.kl_divergence,
        reference=lm.references.SecondModel(),
        noise=NoiseSettings(1.0),
        perturb=lm.PerturbSettings(start=0.05, end=0.2),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, eps=1e-4),
    )
    data = lm.ForgetRetainDataModule(
        [*SPLITS["forget"], *SPLITS["holdout"]],
        SPLITS["retain"],
        tokenizer,
        batch_size=batch_size,
        substitutes="similar",
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[logger], logger=False, enable_checkpointing=False, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, **own,
    )  # fmt: skip
    L.seed_everything(6, verbose=False)  # DDP goes back to it when training starts, one process stays there
    trainer.fit(module.train(), data)
    return {name: value.clone() for name, value in model.state_dict().items()}, logger.rows
