"""An anchor in a Lightning training pulls once for every step, and has read the examples to keep."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import gradsurgery as gs
from lightning_modules.data.tokenization import collate
from lightning_modules.training import anchoring
from lightning_modules.training.anchoring import anchored
from lightning_modules.training.callbacks import AnchorPull
from lightning_modules.training.finetuning import FinetuningDataModule, FinetuningModule
from lightning_modules.training.trainer import trainer_options
from tests.lightning_modules.training.finetuning_workers import SETTINGS, examples, model, weights
from tests.lightning_modules.training.test_finetuning import plain_loop
from tests.tolerances import STEPPED_FLOAT32, close


def seen(net: nn.Module, count: int, batch: int) -> gs.LayerAnchor:
    """An anchor that has read the first examples, in batches of another size."""
    anchor = gs.LayerAnchor(net, 1.0)
    for first in range(0, count, batch):
        batches = collate(examples()[first : min(count, first + batch)], 0)
        with anchor.watch(batches["attention_mask"]):
            net(input_ids=batches["input_ids"], attention_mask=batches["attention_mask"])
    return anchor


def pulls(anchor: gs.LayerAnchor, net: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight))
    anchor.pull()
    return weights(net)


def test_it_has_read_every_example_whatever_the_batches() -> None:
    nets = [model() for _ in range(3)]
    found = pulls(anchored(nets[0], 1.0, examples(), pad_token_id=0, batch_size=3), nets[0])
    close(found, pulls(seen(nets[1], 10, 10), nets[1]), STEPPED_FLOAT32)
    assert not torch.allclose(found, pulls(seen(nets[2], 5, 5), nets[2]), atol=1e-3)
    assert nets[0].training  # as it was


def test_of_many_examples_it_reads_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchoring, "WATCHED", 1)
    nets = [model(), model()]
    found = pulls(anchored(nets[0], 1.0, examples(), pad_token_id=0), nets[0])
    close(found, pulls(seen(nets[1], 1, 1), nets[1]), STEPPED_FLOAT32)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_pulls_after_every_step_and_not_after_every_batch(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = model(), model()
    anchor = anchored(found, 50.0, examples(), pad_token_id=0)
    options = {"max_epochs": SETTINGS.epochs, "accelerator": "cpu", "devices": 1, "gradient_clip_val": 1.0}
    trainer = L.Trainer(
        **trainer_options(**options, callbacks=[AnchorPull(anchor)], accumulate_grad_batches=accumulate)
    )
    trainer.fit(FinetuningModule(found, SETTINGS), FinetuningDataModule(examples(), 0, SETTINGS))
    other, step = anchored(expected, 50.0, examples(), pad_token_id=0), torch.optim.AdamW.step

    def pulled(self: torch.optim.AdamW, *arguments: Any) -> None:
        step(self, *arguments)
        other.pull(self.param_groups[0]["lr"])

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", pulled)
        plain_loop(expected, examples(), accumulate=accumulate)
    close(weights(found), weights(expected), STEPPED_FLOAT32)
    free = copy.deepcopy(model())
    plain_loop(free, examples(), accumulate=accumulate)
    assert not torch.allclose(weights(found), weights(free), atol=1e-3)
