"""Fine-tuning under Lightning takes the steps of a plain loop over the model's own loss."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_modules.data.lengths import LengthBatches
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.training import finetuning
from lightning_modules.training.callbacks import LossCurve
from lightning_modules.training.finetuning import FinetuningSettings
from lightning_modules.training.warmup import LAST_SHARE, rising_and_falling, warmup_and_decay
from tests.gradsurgery.optimizer.distributed_workers import run
from tests.lightning_modules.training import finetuning_workers as workers
from tests.lightning_modules.training.finetuning_workers import SETTINGS, examples, fit, model, weights
from tests.tolerances import STEPPED_FLOAT32, close


def plain_loop(
    net: LlamaForCausalLM, encoded: list[Encoded], settings: FinetuningSettings = SETTINGS, accumulate: int = 1
) -> list[tuple[float, float]]:
    """Losses and learning rates of the steps."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    order = LengthBatches([len(row.input_ids) for row in encoded], settings.batch_size, seed=settings.seed)
    schedule = warmup_and_decay(optimizer, settings.epochs * (len(order) // accumulate))
    curve = []
    for epoch in range(settings.epochs):
        order.set_epoch(epoch)
        batches = list(order)
        for first in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            losses = []
            for places in batches[first : first + accumulate]:
                losses.append(net(**collate([encoded[place] for place in places], 0)).loss / accumulate)
                losses[-1].backward()
            curve.append((float(sum(losses).detach()), optimizer.param_groups[0]["lr"]))
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return curve


@pytest.mark.parametrize("held", [2**28, 0], ids=["logits held", "head and loss in chunks"])
def test_it_takes_the_steps_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(finetuning, "_HELD", held)
    found, expected = model(), model()
    trainer = fit(found, examples())
    plain_loop(expected, examples())
    assert trainer.global_step == 8
    close(weights(found), weights(expected), STEPPED_FLOAT32)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_curve_has_loss_and_learning_rate_of_every_step(tmp_path: Path, accumulate: int) -> None:
    path = tmp_path / "curve.csv"
    fit(model(), examples(), callbacks=[LossCurve(path)], accumulate_grad_batches=accumulate)
    expected = plain_loop(model(), examples(), accumulate=accumulate)
    found = [[float(value) for value in line.split(",")] for line in path.read_text().split()[1:]]
    assert [row[0] for row in found] == list(range(1, 8 // accumulate + 1))
    close(torch.tensor(found)[:, 1:], torch.tensor(expected), STEPPED_FLOAT32)


def test_the_same_seed_gives_the_same_weights_and_another_order_others() -> None:
    nets = [model() for _ in range(3)]
    for net, seed in zip(nets, (5, 5, 6), strict=True):
        fit(net, examples(), FinetuningSettings(epochs=2, batch_size=3, lr=1e-2, seed=seed))
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert not torch.equal(weights(nets[0]), weights(nets[2]))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_do_what_one_does_with_twice_the_batch() -> None:
    run(workers.two_do_what_one_does)


def test_frozen_weights_stay_as_they_are() -> None:
    net = model()
    net.model.embed_tokens.requires_grad_(requires_grad=False)
    before = copy.deepcopy(net.state_dict())
    fit(net, examples())
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "model.embed_tokens.weight" not in changed
    assert "lm_head.weight" in changed


def test_a_decay_ends_above_nothing() -> None:
    assert rising_and_falling(0, 1000) == 0.01
    assert rising_and_falling(100, 1000) == 1.0
    assert rising_and_falling(999, 1000) == rising_and_falling(1000, 1000) == LAST_SHARE
