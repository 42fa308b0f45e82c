"""Noised retain examples: what is replaced, what the divergence on them adds, and what is refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.run.assembly import kind_of_start_model
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.training import module as module_file
from lightning_modules.training.noise import NoiseSettings, noised
from tests.lightning_modules.training.test_distillation import divergence
from tests.lightning_modules.training.test_objectives import batches, gradients, make
from tests.tolerances import LINEAR, close


def padded() -> dict[str, Tensor]:
    """200 rows of 2 to 6 tokens from 10 to 19, padded by 0."""
    ids = torch.randint(10, 20, (200, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.arange(200).remainder(5).add(2)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": torch.where(mask, ids, -100)}


def test_a_share_of_the_tokens_is_replaced_by_others_of_the_batch_and_nothing_else_changes() -> None:
    batch = padded()
    torch.manual_seed(0)
    mixed = noised(batch, 0.3)
    assert mixed["labels"].equal(batch["labels"])
    assert mixed["attention_mask"].equal(batch["attention_mask"])
    real = batch["attention_mask"].bool()
    assert mixed["input_ids"][~real].eq(0).all()
    assert set(mixed["input_ids"][real].tolist()) <= set(range(10, 20))
    changed = (mixed["input_ids"] != batch["input_ids"])[real].double().mean()
    # One in ten is replaced by itself: .27 of 800, to four standard deviations.
    assert abs(float(changed) - 0.27) < 4 * (0.27 * 0.73 / float(real.sum())) ** 0.5


def test_the_same_random_state_replaces_the_same_tokens() -> None:
    batch = padded()
    found = [(torch.manual_seed(seed), noised(batch, 0.3)["input_ids"])[1] for seed in (1, 1, 2)]
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])


def test_a_step_adds_the_divergence_on_the_noised_examples_to_the_retain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, start, data = make("Llama"), make("Llama", 1), batches()
    before = copy.deepcopy(model)
    seen: list[Any] = []
    monkeypatch.setattr(module_file, "noised", lambda *given: seen.append(noised(*given)) or seen[-1])
    module = lm.UnlearningModule(
        model,
        reference=lm.references.SecondModel(start),
        noise=NoiseSettings(0.25, share=0.5),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        surgery=partial(gs.GradientSurgery, rule="sum"),
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_steps=1, accelerator="cpu", precision="64-true", **quiet)
    trainer.fit(module, DataLoader([data], batch_size=None))
    assert len(seen) == 1
    forget, retain = (module.objectives[name](module_of(before), data, name) for name in ("forget", "retain"))
    wanted = gradients(forget + retain + 0.25 * divergence(before, start, seen[0]), before)
    found = torch.cat(
        [(old - new).detach().flatten() for old, new in zip(before.parameters(), model.parameters(), strict=True)]
    )
    close(found, wanted, LINEAR[torch.float64])
    assert float(trainer.logged_metrics["loss/retain"]) == pytest.approx(float(retain.detach()))
    assert float(trainer.logged_metrics["loss/noise"]) == pytest.approx(
        float(divergence(before, start, seen[0]).detach())
    )


def module_of(model: Any) -> lm.UnlearningModule:
    return lm.UnlearningModule(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"weight": 0.0}, "weight: expected a number > 0"), ({"weight": 1.0, "share": 1.0}, "share: expected a number")],
)
def test_other_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSettings(**settings)


def test_it_needs_the_start_model_and_the_command_keeps_it() -> None:
    with pytest.raises(ValueError, match="kl_divergence: expected a reference"):
        lm.UnlearningModule(make("Llama"), noise=NoiseSettings(0.1))
    assert kind_of_start_model(UnlearnOptions.of()) is None
    assert kind_of_start_model(UnlearnOptions.of(retain_noise=0.1)) == "copy"
    assert kind_of_start_model(UnlearnOptions.of(retain_noise=0.1, lora_rank=4)) == "adapters_off"
    with pytest.raises(ValueError, match="--start-model precomputed: expected losses that compare log-likelihoods"):
        UnlearnOptions.of(retain_noise=0.1, start_model="precomputed").check()
