"""PDU's dual variable: projected ascent, refusals that change nothing, and a life in checkpoints."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from gradsurgery.losses import DualVariable


def test_it_ascends_by_the_excess_and_never_below_zero() -> None:
    dual = DualVariable(limit=0.25, step_size=2.0, initial=1.0)
    seen = []
    for loss in (0.75, torch.tensor(0.5), torch.tensor([0.25]), 0.0, -1.0, 0.25, 1.25):
        dual.update(loss)
        seen.append(dual.value)
    assert seen == [2.0, 2.5, 2.5, 2.0, 0.0, 0.0, 2.0]
    assert DualVariable(0.3).value == 0.0


def test_the_constraint_of_a_small_problem_is_met_with_the_multiplier_of_its_solution() -> None:
    # min (x - 3)^2 subject to x^2 <= 1 has x = 1 and multiplier 2.
    dual, x = DualVariable(limit=1.0, step_size=0.05), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.02)
    for _ in range(3000):
        loss = (x - 3) ** 2 + dual.value * x**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dual.update(x.detach() ** 2)
    assert abs(x.item() - 1) < 1e-6
    assert abs(dual.value - 2) < 1e-6


def test_the_loss_that_is_passed_gets_no_graph() -> None:
    dual, parameter = DualVariable(0.0), torch.tensor(2.0, requires_grad=True)
    dual.update(parameter * 3)
    assert type(dual.value) is float
    (dual.value * parameter).backward()
    assert parameter.grad == 6


@pytest.mark.parametrize("loss", [torch.nan, torch.inf, -torch.inf, torch.tensor(torch.nan), torch.ones(2)])
def test_a_loss_that_is_not_one_finite_number_is_refused_and_changes_nothing(loss: Any) -> None:
    dual = DualVariable(0.3, initial=4.0)
    with pytest.raises(ValueError, match="expected"):
        dual.update(loss)
    assert dual.value == 4.0


def test_a_module_that_holds_it_saves_it_exactly_whatever_the_module_is_cast_to() -> None:
    def holder() -> nn.Module:
        module = nn.Linear(2, 2)
        module.dual = DualVariable(limit=0.3, step_size=5.0, initial=100.0)
        return module

    module = holder()
    module.dual.update(0.3001234567891)
    value = module.dual.value
    module.to(torch.bfloat16)
    assert module.dual.value == value
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = holder()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.dual.value == value
    assert not list(module.dual.parameters())


@pytest.mark.parametrize("state", [{"value": -1.0}, {"value": torch.nan}, {}, 3.0, None])
def test_a_state_that_is_none_is_refused_and_changes_nothing(state: Any) -> None:
    dual = DualVariable(0.3, initial=4.0)
    with pytest.raises((ValueError, RuntimeError), match="expected"):
        dual.load_state_dict({"_extra_state": state})
    with pytest.raises(RuntimeError, match="_extra_state"):
        dual.load_state_dict({})
    assert dual.value == 4.0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"limit": torch.nan}, "limit"),
        ({"limit": 0.3, "step_size": 0.0}, "step_size"),
        ({"limit": 0.3, "step_size": torch.inf}, "step_size"),
        ({"limit": 0.3, "initial": -1.0}, "initial"),
        ({"limit": 0.3, "initial": torch.nan}, "initial"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DualVariable(**options)
