"""A forget gradient at an adversary's weights: the steps of a plain loop with two models."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from lightning_modules.training.adversary import AdversarialModule, AdversarySettings
from lightning_modules.training.perturb import PerturbSettings
from tests.lightning_modules.training.test_module import Bigram, batches, fit
from tests.lightning_modules.training.test_perturbed import answers, llama, weights
from tests.tolerances import LINEAR, STEPPED_FLOAT32, close

pytestmark = pytest.mark.filterwarnings("ignore:.*computes all its logits.*", "ignore:.*does not have many workers.*")
LR = 0.05


def plain_loop(model: nn.Module, data: list, settings: AdversarySettings) -> None:
    """The adversary is a second model, and the update the plain sum of both gradients, by SGD."""
    adversary = copy.deepcopy(model)
    for step, batch in enumerate(data):
        if step % settings.every == 0:
            adversary.load_state_dict(model.state_dict())
        taught = torch.autograd.grad(
            answers(adversary, batch["forget"], gs.losses.cross_entropy), list(adversary.parameters())
        )
        with torch.no_grad():
            for weight, gradient, own in zip(adversary.parameters(), taught, model.parameters(), strict=True):
                weight.copy_(settings.keep * (weight - settings.lr * gradient) + (1 - settings.keep) * own)
        forget = torch.autograd.grad(
            answers(adversary, batch["forget"], gs.losses.ceu, skip=1), list(adversary.parameters())
        )
        retain = torch.autograd.grad(answers(model, batch["retain"], gs.losses.cross_entropy), list(model.parameters()))
        with torch.no_grad():
            for weight, first, second in zip(model.parameters(), forget, retain, strict=True):
                weight.sub_(LR * (first + second))


@pytest.mark.parametrize("make", [Bigram, llama])
@pytest.mark.parametrize("settings", [AdversarySettings(0.2, 3), AdversarySettings(0.5, 100, keep=0.7)])
def test_it_steps_as_a_loop_with_a_second_model(make: type[nn.Module], settings: AdversarySettings) -> None:
    data, expected, model = batches(7), make(), make()
    plain_loop(expected, data, settings)
    module = AdversarialModule(
        model,
        adversary=settings,
        optimizer=partial(torch.optim.SGD, lr=LR),
        surgery=partial(gs.GradientSurgery, rule="sum"),
    )
    fit(module, data)
    close(weights(model), weights(expected), STEPPED_FLOAT32)
    untouched = make()
    assert (weights(model) - weights(untouched)).norm() > 1e-2  # something was learned


def test_what_fails_inside_leaves_the_weights_bit_for_bit() -> None:
    class Broken(Bigram):
        calls = 0

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
            self.calls += 1
            if self.calls == 2:  # the first is the adversary's, of the second step
                raise KeyboardInterrupt
            return super().forward(input_ids, attention_mask)

    model = Broken()
    before = weights(model).clone()
    module = AdversarialModule(model, adversary=AdversarySettings(10.0), optimizer=partial(torch.optim.SGD, lr=0.0))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, batches(3))
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.0}, "lr: expected a number > 0"),
        ({"lr": float("inf")}, "lr: expected a number > 0"),
        ({"every": 0}, "every: expected a whole number >= 1"),
        ({"every": 2.5}, "every: expected a whole number >= 1"),
        ({"keep": 0.0}, "keep: expected a share"),
        ({"keep": 1.5}, "keep: expected a share"),
    ],
)
def test_settings_outside_their_domain_are_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AdversarySettings(**changes)


def test_it_takes_no_radius_beside_it() -> None:
    with pytest.raises(ValueError, match="expected no perturb"):
        AdversarialModule(Bigram(), perturb=PerturbSettings(0.5))
    with pytest.raises(ValueError, match="retain_inside"):
        AdversarialModule(Bigram(), retain_inside=1.0)


def test_under_autocast_the_retain_loss_reads_the_models_own_weights() -> None:
    model, data = llama(), batches(2)  # at the second step the adversary is somewhere else
    module = AdversarialModule(model, adversary=AdversarySettings(5.0), optimizer=partial(torch.optim.SGD, lr=0.0))
    fit(module, data, precision="bf16-mixed")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = answers(model, data[-1]["retain"], gs.losses.cross_entropy)
    close(module.losses["retain"].float(), expected.float(), LINEAR[torch.bfloat16])


def test_a_part_that_no_text_reaches_stays(tmp_path: Path) -> None:
    model = llama()
    model.tower = nn.Linear(3, 3)
    before = model.tower.weight.detach().clone()
    module = AdversarialModule(model, adversary=AdversarySettings(0.2, 3), optimizer=partial(torch.optim.SGD, lr=LR))
    fit(module, batches(3), default_root_dir=tmp_path)
    assert torch.equal(model.tower.weight, before)
    assert (weights(model)[: weights(llama()).numel()] - weights(llama())).norm() > 1e-2


def test_checkpointing_with_reentry_is_refused_in_a_sentence(tmp_path: Path) -> None:
    model: Any = llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    module = AdversarialModule(model.train(), optimizer=partial(torch.optim.SGD, lr=LR))
    before = weights(model).clone()
    with pytest.raises(RuntimeError, match="adversary: expected gradient checkpointing that takes gradients by name"):
        fit(module, batches(1), default_root_dir=tmp_path)
    assert torch.equal(weights(model), before)
