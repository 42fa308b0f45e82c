"""Rows at moved weights: the step of an independent three-pass loop, and weights that come back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.problems import BASES, assert_same, batch, mlp, snapshot, taken, values
from tests.reference import training
from tests.reference.perturbation import as_loss, gradient_at_moved_weights
from tests.tolerances import STEPPED, close

pytestmark = pytest.mark.supports(
    "Rows at moved weights", "contexts, `join`, closures; accumulation, autocast, a GradScaler"
)

STEPS = 6
RADIUS = {"global": 0.3, "tensor": 0.1}


def loss_of(index: int, step: int, micro: int = 0, sign: float = 1.0) -> Callable[[nn.Module], Tensor]:
    def loss(model: nn.Module) -> Tensor:
        inputs, labels = batch(index, step, micro, dtype=next(model.parameters()).dtype)
        return sign * nn.functional.cross_entropy(model(inputs), labels)

    return loss


def forget(step: int, micro: int = 0) -> Callable[[nn.Module], Tensor]:
    return loss_of(0, step, micro, -1.0)


def remember(step: int, micro: int = 0) -> Callable[[nn.Module], Tensor]:
    """What the direction descends; on other examples than the forget loss, so that mixing the two up shows."""
    return loss_of(2, step, micro)


def retain(step: int, micro: int = 0) -> Callable[[nn.Module], Tensor]:
    return loss_of(1, step, micro)


def surgeon(model: nn.Module, base: str = "AdamW", **options: Any) -> gs.GradientSurgery:
    return gs.GradientSurgery(
        BASES[base](parameter for parameter in model.parameters() if parameter.requires_grad), **options
    )


def step_by_contexts(model: nn.Module, optimizer: gs.GradientSurgery, at: Any, step: int, micro_batches: int) -> None:
    for micro in range(micro_batches):
        with optimizer.objective("retain"):
            (retain(step, micro)(model) / micro_batches).backward()
        with at.direction():
            (remember(step, micro)(model) / micro_batches).backward()
        with optimizer.objective("forget", at=at):
            (forget(step, micro)(model) / micro_batches).backward()
    optimizer.step()
    optimizer.zero_grad()


def step_by_join(model: nn.Module, optimizer: gs.GradientSurgery, at: Any, step: int, micro_batches: int) -> None:
    for micro in range(micro_batches):
        perturbed = gs.Perturbed(
            loss=lambda micro=micro: forget(step, micro)(model),
            direction=lambda micro=micro: remember(step, micro)(model),
            at=at,
        )
        (optimizer.join(forget=perturbed, retain=retain(step, micro)(model)) / micro_batches).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_protected_row_at_moved_weights_beside_a_loss_that_is_there() -> None:
    """The forget loss's graph is made before the weights move, and must run before they do."""
    model, other = mlp(), mlp()
    optimizer, reference = (gs.GRU(torch.optim.SGD(net.parameters(), lr=0.1)) for net in (model, other))
    there, here = optimizer.perturbed(0.1), reference.perturbed(0.1)
    for step in range(3):
        perturbed = gs.Perturbed(
            lambda step=step: retain(step, 0)(model), lambda step=step: remember(step)(model), there
        )
        optimizer.join(forget=forget(step)(model), retain=perturbed).backward()
        with here.direction():
            remember(step)(other).backward()
        with reference.objective("forget"):
            forget(step)(other).backward()
        with reference.objective("retain", at=here):
            retain(step, 0)(other).backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    assert_same(snapshot(model, optimizer), snapshot(other, reference))


def step_by_closure(model: nn.Module, optimizer: gs.GradientSurgery, at: Any, step: int, micro_batches: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        for micro in range(micro_batches):
            with optimizer.objective("retain"):
                (retain(step, micro)(model) / micro_batches).backward()
            with at.direction():
                remember(step, micro)(model).backward()
            with optimizer.objective("forget", at=at):
                (forget(step, micro)(model) / micro_batches).backward()
        return torch.tensor(1.0)

    optimizer.step(closure)
    optimizer.zero_grad()


FRONT_ENDS = {"contexts": step_by_contexts, "join": step_by_join, "closure": step_by_closure}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"ema_decay": 0.7, "max_norm": 0.3}, {"guard": True}], ids=["plain", "average", "guard"]
)
@pytest.mark.parametrize("scale", RADIUS)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_it_takes_the_steps_of_an_independent_loop(
    front_end: str, scale: Any, options: dict[str, Any], micro_batches: int
) -> None:
    model, plain = mlp(), mlp()
    ours = options | {"ema_dtype": torch.float64} | ({"guard": "update"} if "guard" in options else {})
    optimizer = surgeon(model, **ours, accumulate=front_end == "join" and micro_batches > 1)
    theirs = options | {"ema_decay": {"retain": options["ema_decay"]} if "ema_decay" in options else {}}
    oracle = training.Surgery(plain, BASES["AdamW"](plain.parameters()), ("forget", "retain"), **theirs)
    at = optimizer.perturbed(RADIUS[scale], scale=scale)
    for step in range(STEPS):
        FRONT_ENDS[front_end](model, optimizer, at, step, micro_batches)
        losses = []
        for micro in range(micro_batches):
            row = gradient_at_moved_weights(plain, forget(step, micro), remember(step, micro), RADIUS[scale], scale)
            losses.append({"forget": as_loss(plain, row), "retain": retain(step, micro)(plain)})
        expected = oracle.step(losses)
        close(taken(optimizer).gram, expected.gram[0], STEPPED)
        close(values(model), values(plain), STEPPED)


def test_the_radius_is_the_length_of_the_move_and_may_change_between_steps() -> None:
    model = mlp()
    optimizer = surgeon(model)
    at = optimizer.perturbed(1.0)
    for radius in (0.2, 3.0):
        at.radius = radius
        before = values(model)
        with at.direction():
            remember(0)(model).backward()
        with optimizer.objective("forget", at=at):
            close((values(model) - before).norm(), torch.tensor(radius, dtype=torch.float64), STEPPED)
            forget(0)(model).backward()
        optimizer.zero_grad()
        assert torch.equal(values(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    optimizer = surgeon(model)
    before = copy.deepcopy(model.state_dict())
    at = optimizer.perturbed(7.3)
    with at.direction():
        remember(0)(model).backward()
    with optimizer.objective("forget", at=at):
        assert not torch.equal(values(model), values(before.values()))
        forget(0)(model).backward()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError])
@pytest.mark.parametrize("moment", ["direction", "before", "after"])
def test_whatever_happens_inside_the_weights_come_back(error: type[BaseException], moment: str) -> None:
    model = mlp()
    optimizer = surgeon(model, ema_decay=0.5)
    at = optimizer.perturbed(0.5)
    step_by_contexts(model, optimizer, at, 0, 1)
    before = snapshot(model, optimizer)

    def fail() -> None:
        with at.direction():
            if moment == "direction":
                raise error
            remember(1)(model).backward()
        with optimizer.objective("forget", at=at):
            if moment == "before":
                raise error
            forget(1)(model).backward()
            raise error

    with pytest.raises(error):
        fail()
    assert_same(snapshot(model, optimizer), before)
    optimizer.zero_grad()
    again = mlp()
    untouched = surgeon(again, ema_decay=0.5)
    step_by_contexts(again, untouched, untouched.perturbed(0.5), 0, 1)
    step_by_contexts(again, untouched, untouched.perturbed(0.5), 2, 1)
    step_by_contexts(model, optimizer, at, 2, 1)
    assert_same(snapshot(model, optimizer), snapshot(again, untouched))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("front_end", ["contexts", "join"])
def test_a_direction_that_is_not_finite_is_never_stepped(front_end: str, value: float) -> None:
    model = mlp()
    optimizer = surgeon(model)
    at = optimizer.perturbed(0.5)
    before = snapshot(model, optimizer)
    if front_end == "contexts":
        with at.direction():
            (value * remember(0)(model)).backward()
        with optimizer.objective("forget", at=at):
            forget(0)(model).backward()
        with optimizer.objective("retain"):
            retain(0)(model).backward()
    else:
        perturbed = gs.Perturbed(lambda: forget(0)(model), lambda: value * remember(0)(model), at)
        optimizer.join(forget=perturbed, retain=retain(0)(model)).backward()
    with pytest.raises(FloatingPointError, match="forget"):
        optimizer.step()
    optimizer.zero_grad()
    assert_same(snapshot(model, optimizer), before)
    step_by_contexts(model, optimizer, at, 1, 1)


def test_a_direction_of_zero_moves_nothing() -> None:
    model, plain = mlp(), mlp()
    optimizer, reference = surgeon(model), surgeon(plain)
    at = optimizer.perturbed(0.5)
    with at.direction():
        (0.0 * remember(0)(model)).backward()
    with optimizer.objective("forget", at=at):
        forget(0)(model).backward()
    with reference.objective("forget"):
        forget(0)(plain).backward()
    for net, surgery in ((model, optimizer), (plain, reference)):
        with surgery.objective("retain"):
            retain(0)(net).backward()
        surgery.step()
    assert torch.equal(values(model), values(plain))


def test_autocast_forgets_its_copies_of_the_weights() -> None:
    """Inside one autocast region torch keeps 16-bit copies of the weights, which the move must not leave behind."""
    rows = []
    for one_region in (True, False):
        model = mlp(dtype=torch.float32)
        optimizer = surgeon(model)
        at = optimizer.perturbed(0.5)

        def region() -> Any:
            return torch.autocast("cpu", dtype=torch.bfloat16)

        with region() if one_region else nullcontext():
            with at.direction(), region():
                remember(0)(model).backward()
            with optimizer.objective("forget", at=at), region():
                forget(0)(model).backward()
            with optimizer.objective("retain"), region():
                retain(0)(model).backward()
        rows.append(optimizer.combine().gram)
    assert torch.equal(rows[0], rows[1])


def test_join_computes_in_the_autocast_in_which_it_was_called() -> None:
    rows = []
    for front_end in ("contexts", "join"):
        model = mlp(dtype=torch.float32)
        optimizer = surgeon(model)
        at = optimizer.perturbed(0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if front_end == "join":
                perturbed = gs.Perturbed(lambda: forget(0)(model), lambda: remember(0)(model), at)  # noqa: B023
                joint = optimizer.join(forget=perturbed, retain=retain(0)(model))
            else:
                with optimizer.objective("retain"):
                    retain(0)(model).backward()
                with at.direction():
                    remember(0)(model).backward()
                with optimizer.objective("forget", at=at):
                    forget(0)(model).backward()
        if front_end == "join":
            joint.backward()
        rows.append(optimizer.combine().gram)
    assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("front_end", ["contexts", "join"])
def test_a_loss_scale_changes_nothing(front_end: str) -> None:
    nets = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    for net, scaler in zip(nets, (torch.amp.GradScaler("cpu", init_scale=2.0**12), None), strict=True):
        optimizer = surgeon(net, ema_decay=0.5, max_norm=0.2)
        at = optimizer.perturbed(0.5)
        scaled: Callable[[Tensor], Tensor] = (lambda loss: loss) if scaler is None else scaler.scale
        for step in range(STEPS):
            if front_end == "join":
                perturbed = gs.Perturbed(lambda: forget(step)(net), lambda: remember(step)(net), at)  # noqa: B023
                scaled(optimizer.join(forget=perturbed, retain=retain(step)(net))).backward()
            else:
                with optimizer.objective("retain"):
                    scaled(retain(step)(net)).backward()
                with at.direction():
                    scaled(remember(step)(net)).backward()
                with optimizer.objective("forget", at=at):
                    scaled(forget(step)(net)).backward()
                optimizer.combine(scale=1.0 if scaler is None else scaler.get_scale())
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    assert torch.equal(values(nets[0]), values(nets[1]))


def test_frozen_weights_are_not_moved() -> None:
    model = mlp()
    model[0].requires_grad_(requires_grad=False)
    optimizer = surgeon(model)
    frozen = model[0].weight.clone()
    at = optimizer.perturbed(0.5)
    with at.direction():
        remember(0)(model).backward()
    with optimizer.objective("forget", at=at):
        assert torch.equal(model[0].weight, frozen)
        forget(0)(model).backward()


def test_a_forgotten_direction_is_refused_and_costs_no_row() -> None:
    model = mlp()
    optimizer = surgeon(model)
    at = optimizer.perturbed(0.5)
    with optimizer.objective("retain"):
        retain(0)(model).backward()
    with pytest.raises(RuntimeError, match="expected a direction"), optimizer.objective("forget", at=at):
        pytest.fail("entered")
    with at.direction():
        remember(0)(model).backward()
    with optimizer.objective("forget", at=at):
        forget(0)(model).backward()
    with pytest.raises(RuntimeError, match="expected a direction"), optimizer.objective("forget", at=at):
        pytest.fail("a direction served twice")
    optimizer.step()


def test_a_graph_of_other_weights_is_refused() -> None:
    model = mlp()
    optimizer = surgeon(model)
    at = optimizer.perturbed(0.5)
    with at.direction():
        remember(0)(model).backward()
    outside = forget(0)(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), optimizer.objective("forget", at=at):
        outside.backward()


def test_directions_belong_outside_of_objectives() -> None:
    model = mlp()
    optimizer = surgeon(model)
    at = optimizer.perturbed(0.5)
    with pytest.raises(RuntimeError, match="outside any other"), optimizer.objective("retain"), at.direction():
        pytest.fail("entered")
    remember(0)(model).backward()
    with pytest.raises(RuntimeError, match="no objective wrote"), at.direction():
        pytest.fail("entered")


@pytest.mark.parametrize("radius", [0.0, -1.0, torch.inf, torch.nan])
def test_a_radius_is_a_positive_number(radius: float) -> None:
    optimizer = surgeon(mlp())
    with pytest.raises(ValueError, match="radius: expected a positive number"):
        optimizer.perturbed(radius)
    at = optimizer.perturbed(1.0)
    with pytest.raises(ValueError, match="radius: expected a positive number"):
        at.radius = radius
    with pytest.raises(ValueError, match="scale: expected one of global, tensor"):
        optimizer.perturbed(1.0, scale="layer")  # pyright: ignore[reportArgumentType]


def test_the_copy_of_the_weights_is_counted() -> None:
    optimizer = surgeon(mlp())
    before = optimizer.memory_estimate()
    optimizer.perturbed(0.5)
    assert optimizer.memory_estimate() - before == 43 * 8


def test_the_oracle_sees_a_row_at_the_weights_themselves() -> None:
    """Without the move the row is another one; otherwise the comparison above would mean nothing."""
    model = mlp()
    moved = gradient_at_moved_weights(model, forget(0), remember(0), 0.3, "global")
    still = torch.autograd.grad(forget(0)(model), list(model.parameters()))
    difference = torch.cat([(a - b).flatten() for a, b in zip(moved, still, strict=True)]).norm()
    assert difference > 0.05 * torch.cat([part.flatten() for part in still]).norm()


def test_a_direction_that_was_not_captured_leaves_none_from_before() -> None:
    weight = nn.Parameter(torch.ones(2))
    perturbed = gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1)).perturbed(radius=0.5)
    with perturbed.direction():
        weight.sum().backward()
    with pytest.raises(KeyboardInterrupt), perturbed.direction():
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="expected a direction"):
        perturbed.check()


@pytest.mark.parametrize("end", ["step", "zero_grad"])
def test_a_direction_of_another_step_is_refused(end: str) -> None:
    model = mlp()
    optimizer = surgeon(model)
    at = optimizer.perturbed(0.5)
    with at.direction():
        remember(0)(model).backward()
    for name, loss in (("retain", retain), ("forget", forget)):
        with optimizer.objective(name):
            loss(0)(model).backward()
    if end == "step":
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="each direction serves one objective of one step"):
        at.check()


def test_a_parameter_that_comes_after_the_direction_is_not_moved() -> None:
    model = mlp()
    optimizer = surgeon(model)
    at, late = optimizer.perturbed(0.5), nn.Parameter(torch.ones(2))
    with at.direction():
        remember(0)(model).backward()
    optimizer.add_param_group({"params": [late]})
    before = model[0].weight.detach().clone()
    with at.moved():
        assert torch.equal(late, torch.ones(2))
        assert not torch.equal(model[0].weight, before)
    assert torch.equal(model[0].weight, before)
