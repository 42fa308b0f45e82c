"""What the processes of test_sharded.py run: the command, on a tiny model, in a group that exists already."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lightning as L
import pytest
import torch.distributed as dist

from lightning_modules import cli
from lightning_modules.run import unlearn
from lightning_modules.training.callbacks import TradeoffCurve
from tests.gradsurgery.optimizer.distributed_workers import WORLD
from tests.lightning_modules.evaluation.evaluation_workers import model_and_tokenizer


def rows(split: str, count: int) -> list[dict[str, object]]:
    return [
        {
            "question": f"Where did {split} writer {number} live{', of all places' * (number % 3)}?",
            "answer": f"In house {number * 7} by the canal{' and the old harbour' * (number % 4)}.",
            "perturbed_answer": [f"In castle {number}.", "Nowhere at all."],
        }
        for number in range(count)
    ]


def prepare(folder: Path) -> list[str]:
    """Write a tiny model and its data. Returns the arguments of the command that name them."""
    model, tokenizer = model_and_tokenizer()
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    for split, count in (("forget", 4), ("retain", 3)):
        (folder / f"{split}.json").write_text(json.dumps(rows(split, count)))
    named = {"model": "start", "forget": "forget.json", "retain": "retain.json"}
    arguments = [word for name, file in named.items() for word in (f"--{name}", str(folder / file))]
    common = {"epochs": 2, "accumulate": 2, "max-new-tokens": 4, "lr": 1e-3, "ema-decay": 0.5, "score-every": 1}
    common |= {"precision": "32-true", "recipe": "paper"}
    return [*arguments, *(f"--{name}={value}" for name, value in common.items())]


def as_torchrun() -> None:
    """The environment that torchrun makes, as far as the group does not have it."""
    os.environ.update(
        LOCAL_WORLD_SIZE=str(WORLD), GROUP_RANK="0", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="test", NODE_RANK="0"
    )


def commands(_: int, runs: list[list[str]], interrupted: list[str]) -> None:
    """Several runs of `unlearn`, one after the other; the last is interrupted in its second epoch, and goes on."""
    as_torchrun()
    sharded = ["--devices", str(WORLD), "--strategy", "fsdp2"]
    for arguments in runs:
        quickly([*arguments, *sharded])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TradeoffCurve, "on_train_batch_end", _interrupt)
        quickly([*interrupted, *sharded], status=130)
    dist.barrier()
    quickly([*interrupted[interrupted.index("--output") :], "--resume"])


def _interrupt(_: TradeoffCurve, trainer: L.Trainer, *__: object) -> None:
    if trainer.current_epoch == 1:
        raise KeyboardInterrupt


def quickly(arguments: list[str], status: int = 0) -> None:
    """`unlearn` without its report, whose pictures take longer than everything else here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw", "show"):
            patch.setattr(unlearn, name, lambda _: None)
        assert cli.main(["unlearn", *arguments]) == status, arguments
