"""The guard: no step raises a protected objective to first order, and a harmless change is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.optimizer import guard as guard_module
from tests.problems import BASES, FOUR, classification, contexts, joined, mlp, values
from tests.reference import training
from tests.tolerances import STEPPED, STEPPED_FLOAT32, close

STEPS = 8


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("base", ["momentum", "AdamW", "Adagrad"])
def test_the_guard_lets_no_step_raise_a_protected_objective(base: str, ema_decay: float | None) -> None:
    """The change is measured here, from the parameters before and after, against rows that are computed here."""
    losses = classification(FOUR)

    def worst(guard: str) -> Tensor:
        model = mlp()
        parameters = list(model.parameters())
        optimizer = gs.GradientSurgery(
            BASES[base](parameters), objectives=FOUR, ema_decay=ema_decay, ema_dtype=torch.float64, guard=guard
        )
        averages, found = torch.zeros(3, 43, dtype=torch.float64), []
        for step in range(20):
            now = losses(model, step, 0)
            rows = torch.stack(
                [training.flat(training.gradient(now[name], parameters), parameters) for name in FOUR[1:]]
            )
            decay = ema_decay or 0.0
            averages = decay * averages + (1.0 - decay) * rows
            protected = averages / (1.0 - decay ** (step + 1))
            before = values(model)
            joined(model, optimizer, losses, [step])
            change = values(model) - before
            found.append((protected @ change / protected.norm(dim=1) / change.norm()).max())
        return torch.stack(found).max()

    assert worst("update") <= STEPPED.relative
    assert worst("measure") > 1e-3, (
        "without the guard the base raises a protected objective, or this test means nothing"
    )


def test_the_guard_leaves_a_harmless_change_alone() -> None:
    losses = classification()
    model, plain = mlp(), mlp()
    guarded = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), guard="update")
    unguarded = gs.GradientSurgery(torch.optim.SGD(plain.parameters(), lr=0.1))
    contexts(model, guarded, losses, range(STEPS))
    contexts(plain, unguarded, losses, range(STEPS))
    close(values(model), values(plain), STEPPED)


def test_a_change_that_helps_is_measured_once_and_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, plain = (torch.nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    guarded = gs.GradientSurgery(torch.optim.Adam([weight], lr=0.1), guard="update")
    unguarded = torch.optim.Adam([plain], lr=0.1)
    passes: list[int] = []
    measure = guard_module.block_gram

    def counted(*args: Any, **options: Any) -> Tensor:
        passes.append(1)
        return measure(*args, **options)

    monkeypatch.setattr(guard_module, "block_gram", counted)
    for name in guarded.objectives:
        with guarded.objective(name):
            weight.sum().backward()
        plain.sum().backward()
    guarded.step()
    unguarded.step()
    assert torch.equal(weight, plain)
    assert passes == [1]
    assert guarded.record is not None
    assert guarded.record.actual_change is not None
    assert torch.equal(guarded.record.actual_change, (plain - torch.tensor([1.0, 2.0])).detach().sum().double()[None])


def test_a_guard_on_low_precision_weights_warns_and_records_what_was_achieved() -> None:
    model = torch.nn.Linear(32, 32).to(torch.bfloat16)
    with pytest.warns(UserWarning, match="float32"):
        optimizer = gs.GradientSurgery(torch.optim.AdamW(model.parameters(), lr=1e-5), guard="update")
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = [p.detach().double().clone() for p in model.parameters()]
    with optimizer.objective("retain"):
        model(x).square().mean().backward()
    protected = [p.grad.double() if p.grad is not None else None for p in model.parameters()]
    assert all(row is None for row in protected)  # the slot is out of .grad
    row = [t.double().clone() for t in optimizer._window.slots["retain"] if t is not None]
    with optimizer.objective("forget"):
        (-model(x).square().mean()).backward()
    optimizer.step()
    moved = sum(
        ((p.detach().double() - old) * r).sum() for p, old, r in zip(model.parameters(), before, row, strict=True)
    )
    assert optimizer.record is not None
    assert optimizer.record.actual_change is not None
    assert float(optimizer.record.actual_change[0]) == pytest.approx(float(moved), rel=1e-4, abs=1e-12)


def test_the_guard_leaves_what_the_base_does_not_step() -> None:
    """A gradient that is taken out after combine() keeps its parameter out of the correction too."""
    weight, held = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = gs.GradientSurgery(torch.optim.SGD([weight, held], lr=0.1), rule="sum", guard="update")
    with optimizer.objective("forget"):
        (-3.0 * weight.sum() - held.sum()).backward()
    with optimizer.objective("retain"):
        (weight.sum() + held.sum()).backward()
    optimizer.combine()
    held.grad = None
    optimizer.step()
    assert held.tolist() == [1.0, 1.0]
    close(weight.detach(), torch.ones(2), STEPPED_FLOAT32)
    assert optimizer.record is not None
    assert optimizer.record.actual_change is not None
    close(optimizer.record.actual_change, torch.zeros(1, dtype=torch.float64), STEPPED_FLOAT32)
