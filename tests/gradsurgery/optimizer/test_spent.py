"""Gradients that stand in .grad when a step is over: let through where they are spent, refused where somebody added to them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.optimizer.spent import Spent, zeroed
from tests.problems import assert_same, classification, contexts, joined, mlp, snapshot

LOSSES = classification()
STRAY = "expected every .grad to be None, found gradients that no objective wrote; call zero_grad"


def stepped(**options: Any) -> tuple[nn.Sequential, gs.GradientSurgery]:
    model = mlp()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), ema_decay=0.5, **options)
    contexts(model, optimizer, LOSSES, range(2))
    return model, optimizer


def nothing(model: nn.Module, optimizer: gs.GradientSurgery) -> None:
    """Contexts end in zero_grad(); this takes a step more, without."""
    for name in ("retain", "forget"):
        with optimizer.objective(name):
            LOSSES(model, 5, 0)[name].backward()
    optimizer.step()


def in_place(model: nn.Module, optimizer: gs.GradientSurgery) -> None:
    nothing(model, optimizer)
    optimizer.zero_grad(set_to_none=False)


LEFT: dict[str, Callable[[nn.Module, gs.GradientSurgery], None]] = {"nothing called": nothing, "zeroed": in_place}


def by_context(model: nn.Module, optimizer: gs.GradientSurgery) -> None:
    with optimizer.objective("retain"):
        LOSSES(model, 6, 0)["retain"].backward()


def by_join(model: nn.Module, optimizer: gs.GradientSurgery) -> None:
    optimizer.join(**LOSSES(model, 6, 0)).backward()


@pytest.mark.parametrize("ahead", [by_context, by_join])
@pytest.mark.parametrize("left", LEFT)
def test_a_backward_pass_outside_every_objective_is_refused_and_not_lost(
    left: str, ahead: Callable[[nn.Module, gs.GradientSurgery], None]
) -> None:
    model, optimizer = stepped()
    LEFT[left](model, optimizer)
    torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum().backward()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=STRAY):
        ahead(model, optimizer)
    assert_same(snapshot(model, optimizer), before)
    optimizer.zero_grad()
    ahead(model, optimizer)


ZEROING: dict[str, Callable[[nn.Module, gs.GradientSurgery], object]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "nobody": lambda model, optimizer: None,
    "load_state_dict": lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
}


@pytest.mark.parametrize("who", ZEROING)
@pytest.mark.parametrize("left", LEFT)
def test_whoever_zeroes_the_next_step_is_the_same(left: str, who: str) -> None:
    model, optimizer = stepped()
    other, reference = stepped()
    LEFT[left](model, optimizer)
    nothing(other, reference)
    ZEROING[who](model, optimizer)
    reference.zero_grad()
    contexts(model, optimizer, LOSSES, range(2, 4))
    contexts(other, reference, LOSSES, range(2, 4))
    assert_same(snapshot(model, optimizer), snapshot(other, reference))


def test_zeroing_in_place_between_join_and_its_backward_pass_is_no_term() -> None:
    model, optimizer = stepped()
    other, reference = stepped()
    for each, mine in ((model, optimizer), (other, reference)):
        nothing(each, mine)
    loss = optimizer.join(**LOSSES(model, 6, 0))
    model.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    joined(other, reference, LOSSES, [6])
    assert_same(snapshot(model, optimizer), snapshot(other, reference))


def test_rows_of_a_skipped_step_are_spent_when_the_update_is_zeroed_in_place() -> None:
    model, optimizer = stepped(accumulate=True)
    other, reference = stepped(accumulate=True)
    optimizer.join(**{name: loss * torch.inf for name, loss in LOSSES(model, 6, 0).items()}).backward()
    model.zero_grad(set_to_none=False)  # as after a step that a GradScaler skipped
    joined(model, optimizer, LOSSES, [7])
    joined(other, reference, LOSSES, [7])
    assert_same(snapshot(model, optimizer), snapshot(other, reference))


def test_a_look_keeps_no_gradient_alive_and_knows_it_again() -> None:
    weight = nn.Parameter(torch.ones(3))
    spent = Spent()
    weight.sum().backward()
    spent.look([weight])
    gc.collect()
    assert spent.written([weight]) == []  # nobody here holds the object that .grad was
    assert weight.grad is not None
    weight.grad.zero_()
    (written,) = spent.written([weight])
    assert zeroed([written])
    del written
    weight.sum().backward()
    assert not zeroed(spent.written([weight]))
    gone = weakref.ref(weight.grad)
    spent.look([weight])
    weight.grad = None
    gc.collect()
    assert gone() is None


def test_a_parameter_that_was_added_since_is_looked_at() -> None:
    first, added = (nn.Parameter(torch.ones(1)) for _ in range(2))
    spent = Spent()
    spent.look([first])
    added.grad = torch.ones(1)
    assert [gradient is added.grad for gradient in spent.written([first, added])] == [True]
