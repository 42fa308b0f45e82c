"""What `UnlearningModule` adds to two losses: a retain loss inside, a dual variable, a start model beside it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch

import gradsurgery as gs
import lightning_modules as lm
from tests.lightning_modules.training.test_objectives import batches, expected, make, nlls
from tests.tolerances import LINEAR, close


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        for _ in range(4):
            yield batches()


def fit(module: L.LightningModule, **options: Any) -> L.Trainer:
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader)
    return trainer


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.1)


def test_a_retain_loss_inside_is_projected_with_the_forget_loss() -> None:
    """With rule `sum` and both objectives, inside weight w, the step is that of forget + (w + 1) retain."""
    results = []
    for inside in (True, False):
        model, data = make("Llama"), batches()
        if inside:
            fit(
                lm.UnlearningModule(
                    model, optimizer=sgd, surgery=partial(gs.GradientSurgery, rule="sum"), retain_inside=0.5
                )
            )
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(4):
                optimizer.zero_grad()
                retain = nlls(model, data["retain"]).sum() / (data["retain"]["labels"][:, 1:] != -100).sum()
                (expected("ceu", model, model, data) + 1.5 * retain).backward()
                optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    close(*results, LINEAR[torch.float32], scale=float(results[1].norm()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_dual_variable_moves_once_a_step_and_weighs_the_retain_loss(accumulate: int) -> None:
    model, data = make("Llama"), batches()
    module = lm.UnlearningModule(
        model,
        forget_loss=gs.losses.logit_margin,
        optimizer=sgd,
        surgery=partial(gs.GradientSurgery, rule="sum", accumulate=accumulate > 1),
        dual=gs.losses.DualVariable(limit=1.0, step_size=0.5, initial=2.0),
    )
    fit(module, accumulate_grad_batches=accumulate)

    twin, price = make("Llama"), 2.0
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(4 // accumulate):
        optimizer.zero_grad()
        retain = nlls(twin, data["retain"]).sum() / (data["retain"]["labels"][:, 1:] != -100).sum()
        (expected("logit_margin", twin, twin, data) + price * retain).backward()
        optimizer.step()
        price = max(0.0, price + 0.5 * (float(retain) - 1.0))
    assert module.dual is not None
    assert module.dual.value == pytest.approx(price, rel=1e-5)
    ours, theirs = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, twin))
    close(ours, theirs, LINEAR[torch.float32], scale=float(theirs.norm()))
    assert module.state_dict()["dual._extra_state"] == {"value": module.dual.value}


def test_a_reference_is_no_part_of_the_module() -> None:
    module = lm.UnlearningModule(make("Llama"), forget_loss=gs.losses.npo, reference=lm.references.SecondModel())
    second = module.reference.model
    weights = copy.deepcopy(second.state_dict())
    fit(module)
    assert not any("reference" in name for name in module.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in second.state_dict().items())
    assert not torch.equal(weights["lm_head.weight"], module.model.lm_head.weight)


def test_a_subclass_that_hides_the_start_of_training_is_told_so() -> None:
    """Without it the schedule would not know the number of steps, and every step would have the whole learning rate."""

    class Hiding(lm.UnlearningModule):
        def on_train_start(self) -> None:
            pass

    module = Hiding(make("Llama"), optimizer=sgd, schedule=lambda step, steps: 1.0 - step / steps)
    with pytest.raises(RuntimeError, match=r"schedule: expected on_train_start .* call super\(\)"):
        fit(module)
