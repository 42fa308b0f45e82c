"""DualOptimizer against two plain optimizers over the same parameters that take turns."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.optimizer.dual import DualOptimizer
from tests.problems import BASES, classification, mlp, values

STEPS = 9
TURNS = {
    "by turns": ("forget", "retain"),
    "retain more": ("forget", "retain", "retain"),
    "three": ("a", "a_b", "a", "c"),
}


def losses(model: nn.Module, step: int, turns: tuple[str, ...]) -> dict[str, Tensor]:
    return classification(tuple(dict.fromkeys(turns)))(model, step, 0)


def train(model: nn.Module, optimizer: Any, steps: range, turns: tuple[str, ...]) -> list[str]:
    taken = []
    for step in steps:
        taken.append(optimizer.turn)
        optimizer.zero_grad()
        losses(model, step, turns)[optimizer.turn].backward()
        optimizer.step()
    return taken


def by_hand(model: nn.Module, base: str, steps: range, turns: tuple[str, ...], ratio: dict[str, float]) -> None:
    """One optimizer for each objective, never told of the others."""
    each = {name: BASES[base](list(model.parameters())) for name in turns}
    for name, optimizer in each.items():
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * ratio.get(name, 1.0)
    for step in steps:
        name = turns[step % len(turns)]
        model.zero_grad()
        losses(model, step, turns)[name].backward()
        each[name].step()


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("base", BASES)
def test_it_is_one_optimizer_for_each_objective(base: str, turns: tuple[str, ...]) -> None:
    model, plain = mlp(), mlp()
    ratio = {turns[0]: 0.5}
    optimizer = DualOptimizer(BASES[base](model.parameters()), turns, lr_ratio=ratio)
    assert train(model, optimizer, range(STEPS), turns) == [turns[step % len(turns)] for step in range(STEPS)]
    by_hand(plain, base, range(STEPS), turns, ratio)
    assert torch.equal(values(model), values(plain))
    mixed = mlp()
    shared = BASES[base](mixed.parameters())
    for step in range(STEPS):
        mixed.zero_grad()
        losses(mixed, step, turns)[turns[step % len(turns)]].backward()
        shared.step()
    if base != "SGD":
        assert not torch.equal(values(model), values(mixed)), "one state for all is something else"


@pytest.mark.parametrize("through", ["load", "pickle file", "deepcopy"])
@pytest.mark.parametrize("base", ["AdamW", "momentum", "Adagrad"])
def test_it_resumes_exactly_in_the_middle_of_a_round(base: str, through: str) -> None:
    turns = ("forget", "forget_2", "retain", "retain")
    model, again = mlp(), mlp()
    optimizer = DualOptimizer(BASES[base](model.parameters()), turns)
    train(model, optimizer, range(5), turns)
    if through == "deepcopy":
        again, resumed = copy.deepcopy((model, optimizer))
    else:
        resumed = DualOptimizer(BASES[base](again.parameters()), turns)
        again.load_state_dict(model.state_dict())
        saved = copy.deepcopy(optimizer.state_dict())
        if through == "pickle file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        resumed.load_state_dict(saved)
    assert resumed.turn == optimizer.turn == "forget_2"
    for each, one in ((model, optimizer), (again, resumed)):
        train(each, one, range(5, 10), turns)
    assert torch.equal(values(model), values(again))


def test_schedulers_clipping_and_scaler_see_one_optimizer() -> None:
    turns = TURNS["by turns"]
    model, plain = mlp(), mlp()
    optimizer = DualOptimizer(BASES["AdamW"](model.parameters()), lr_ratio={"forget": 2.0})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    each = {name: BASES["AdamW"](plain.parameters()) for name in turns}
    for step in range(6):
        name = optimizer.turn
        optimizer.zero_grad()
        scaler.scale(losses(model, step, turns)[name]).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.02 * 0.5 ** (step + 1)
        plain.zero_grad()
        losses(plain, step, turns)[name].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        each[name].param_groups[0]["lr"] = 0.02 * 0.5**step * (2.0 if name == "forget" else 1.0)
        each[name].step()
        assert torch.equal(values(model), values(plain))


def test_a_step_that_a_scaler_skips_does_not_end_the_turn() -> None:
    model = mlp()
    optimizer, scaler = DualOptimizer(BASES["AdamW"](model.parameters())), torch.amp.GradScaler("cpu")
    scaler.scale(losses(model, 0, ("forget", "retain"))["forget"] * math.inf).backward()
    scaler.step(optimizer)
    assert optimizer.turn == "forget"


def test_a_failing_step_leaves_the_learning_rate_and_the_turn() -> None:
    model = mlp()
    base = BASES["AdamW"](model.parameters())
    optimizer = DualOptimizer(base, lr_ratio={"forget": 3.0})
    losses(model, 0, ("forget", "retain"))["forget"].backward()
    base.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("no power")))
    with pytest.raises(OSError, match="no power"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.turn == "forget"


def test_a_closure_is_called_once_with_gradients() -> None:
    model = mlp()
    optimizer = DualOptimizer(BASES["SGD"](model.parameters()))
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        loss = losses(model, 0, ("forget", "retain"))[optimizer.turn]
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) < 0.0
    assert calls == [True]


def test_what_it_cannot_do_is_refused() -> None:
    model = mlp()
    base = BASES["AdamW"](model.parameters())
    for turns in ((), "forget"):
        with pytest.raises(ValueError, match="turns: expected names of objectives"):
            DualOptimizer(base, turns)
    for ratio in ({"forgot": 1.0}, {"forget": -1.0}, {"forget": math.nan}):
        with pytest.raises(ValueError, match="lr_ratio: expected numbers >= 0"):
            DualOptimizer(base, lr_ratio=ratio)
    with pytest.raises(TypeError, match="LBFGS"):
        DualOptimizer(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"base: expected a constructed torch.optim.Optimizer.*found DualOptimizer"):
        gs.GradientSurgery(DualOptimizer(base))


def test_other_checkpoints_are_refused_and_change_nothing() -> None:
    model = mlp()
    optimizer = DualOptimizer(BASES["AdamW"](model.parameters()))
    train(model, optimizer, range(3), ("forget", "retain"))
    other = DualOptimizer(BASES["AdamW"](mlp().parameters()), ("forget", "keep"))
    other.load_state_dict(DualOptimizer(BASES["AdamW"](mlp().parameters()), ("forget", "keep")).state_dict())
    for group in other.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    other.step()
    other.step()
    before = copy.deepcopy(optimizer.state_dict())
    plain = BASES["AdamW"](model.parameters())
    for saved, sentence in (
        (other.state_dict(), "found 'gradsurgery_state_keep_"),
        (plain.state_dict(), "has no turns"),
    ):
        with pytest.raises(ValueError, match=sentence):
            optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(after["state"][i][k], v) for i, entries in before["state"].items() for k, v in entries.items()
    )
