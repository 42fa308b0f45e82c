"""Corners that users reach: unequal learning rates, late parameters, rows that cancel, rules that misbehave. Exact, or refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.optimizer.wrapper import refuse_groups
from tests.problems import FOUR, FRONT_ENDS, classification, contexts, mlp, taken, values
from tests.reference import training
from tests.tolerances import LINEAR, STEPPED, close

# The guard in the base's own units --------------------------------------------------------------------------------------------------


def two_rates(model: nn.Sequential, first: float, second: float, **options: Any) -> gs.GradientSurgery:
    layers = [{"params": model[0].parameters(), "lr": first}, {"params": model[2].parameters(), "lr": second}]
    return gs.GradientSurgery(torch.optim.AdamW(layers), **options)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_guard_never_moves_a_group_of_learning_rate_0(front_end: str) -> None:
    model = mlp()
    frozen, trained = values(model[0]), values(model[2])
    optimizer = two_rates(model, 0.0, 0.1, guard="update")
    FRONT_ENDS[front_end](model, optimizer, classification(), range(8))
    assert torch.equal(values(model[0]), frozen)
    assert not torch.equal(values(model[2]), trained)


def nearest(change: Tensor, rows: Tensor, rates: Tensor) -> Tensor:
    """argmin sum (d - change)^2 / rates over <d, row_k> <= 0, by trying every set of constraints that may hold with equality."""
    best, least = change, torch.inf
    for chosen in range(2 ** len(rows)):
        active = [k for k in range(len(rows)) if chosen >> k & 1]
        found = change
        if active:
            part = rows[active]
            multipliers = torch.linalg.solve(part @ (rates * part).T, part @ change)
            if bool((multipliers < 0).any()):
                continue
            found = change - rates * (multipliers @ part)
        length = float(((found - change) ** 2 / rates).sum())
        if bool((rows @ found <= 1e-12).all()) and length < least:
            best, least = found, length
    assert least < torch.inf
    return best


@pytest.mark.parametrize("rates", [(1.0, 1e-4), (1e-3, 0.1), (0.05, 0.05)])
def test_the_guard_is_the_nearest_change_in_the_metric_of_the_learning_rates(rates: tuple[float, float]) -> None:
    """Beside a group of rate 1 the other must not be moved out of proportion: LoRA+ and layer-wise rates are the ordinary case."""
    losses, model, plain = classification(FOUR), mlp(), mlp()
    guarded = two_rates(model, *rates, objectives=FOUR, guard="update")
    twin = two_rates(plain, *rates, objectives=FOUR)
    before = values(model)
    parameters = list(plain.parameters())
    rows = {
        name: training.flat(training.gradient(loss, parameters), parameters)
        for name, loss in losses(plain, 0, 0).items()
    }
    protected = torch.stack([rows[name] for name in FOUR[1:]])
    contexts(model, guarded, losses, [0])
    contexts(plain, twin, losses, [0])
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (model[0], model[2])]
    weights = torch.cat([torch.full((n,), rate, dtype=torch.float64) for n, rate in zip(sizes, rates, strict=True)])
    expected = nearest(values(plain) - before, protected, weights)
    close(values(model) - before, expected, STEPPED, scale=float(expected.abs().max()))
    assert guarded.record is not None
    change = guarded.record.actual_change
    assert change is not None
    assert float((change / protected.norm(dim=1) / expected.norm()).max()) <= STEPPED.relative


def test_equal_learning_rates_are_the_plain_projection_to_the_last_bit() -> None:
    one, two = mlp(), mlp()
    single = gs.GradientSurgery(torch.optim.AdamW(one.parameters(), lr=0.05), guard="update")
    contexts(one, single, classification(), range(8))
    contexts(two, two_rates(two, 0.05, 0.05, guard="update"), classification(), range(8))
    assert torch.equal(values(one), values(two))


def test_a_nan_that_the_base_wrote_stays_where_it_wrote_it() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.param_groups[0]["params"][0].data.view(-1)[0] = torch.nan

    model, plain = mlp(), mlp()
    contexts(model, gs.GradientSurgery(Broken(model.parameters(), lr=0.1), guard="update"), classification(), [0])
    contexts(plain, gs.GradientSurgery(Broken(plain.parameters(), lr=0.1)), classification(), [0])
    assert int(values(model).isnan().sum()) == 1
    assert torch.equal(values(model).isnan(), values(plain).isnan())


# What the base maximises ------------------------------------------------------------------------------------------------------------


def test_a_base_that_maximises_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"maximize=False.*found maximize=True"):
        gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1, maximize=True))
    optimizer = gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1))
    with pytest.raises(ValueError, match="maximize"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "maximize": True})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="maximize"):
        optimizer.load_state_dict(torch.optim.SGD([weight], lr=0.5, maximize=True).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_what_a_combination_in_place_cannot_serve_is_refused() -> None:
    """A step that is differentiated, and a parameter that is combined twice."""
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"differentiable=False.*found differentiable=True"):
        gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1, differentiable=True))
    with pytest.warns(UserWarning, match="duplicate"):
        twice = torch.optim.SGD([weight, weight], lr=0.1)
    with pytest.raises(ValueError, match="expected every parameter once, found one that its group lists again"):
        gs.GradientSurgery(twice)


def test_parameters_on_an_apple_gpu_are_refused() -> None:
    there = SimpleNamespace(device=torch.device("mps"))
    with pytest.raises(ValueError, match="Apple GPU, which has no float64"):
        refuse_groups([{"params": [there]}])


@pytest.mark.parametrize("guard", ["measure", "update"])
def test_a_group_that_is_added_while_an_update_waits_is_stepped_from_the_next_step_on(guard: str) -> None:
    def step(late: bool) -> Tensor:
        weight, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        optimizer = gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1), guard=guard)
        for name, loss in (("retain", weight[0] * 2), ("forget", weight[1] - weight[0])):
            with optimizer.objective(name):
                loss.backward()
        optimizer.combine()
        if late:
            optimizer.add_param_group({"params": [new], "lr": 0.7})
        optimizer.step()
        assert new.eq(1.0).all()
        return weight.detach()

    assert torch.equal(step(late=True), step(late=False))


@pytest.mark.parametrize("rule", ["gru", "pcgrad", "gradvac", "saliency_mask", "graddrop"])
@pytest.mark.parametrize("names", [("forget", "retain"), ("forget", "retain", "general")])
def test_another_default_device_changes_no_step(rule: str, names: tuple[str, ...]) -> None:
    def trained(device: str) -> Tensor:
        torch.manual_seed(0)
        with torch.device(device):
            weight = nn.Parameter(torch.arange(6.0, device="cpu").reshape(2, 3))
            base = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
            optimizer = gs.GradientSurgery(base, rule=rule, objectives=names, ema_decay=0.5, guard="update")
            for _ in range(3):
                for place, name in enumerate(names):
                    with optimizer.objective(name):
                        ((-1) ** place * (weight.square().sum() + (place + 1) * weight[0, place])).backward()
                optimizer.step()
                optimizer.zero_grad()
                optimizer.load_state_dict(optimizer.state_dict())
        return weight.detach()

    assert torch.equal(trained("meta"), trained("cpu"))


# Averages of parameters that come late ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_parameter_that_comes_late_has_the_bias_correction_of_its_own_steps(front_end: str, accumulate: bool) -> None:
    """After 60 steps with decay .99, a parameter that joins enters the Gram matrix with its gradient, and not with a part of it."""
    decay, old, new = (
        0.99,
        nn.Parameter(torch.ones(2, dtype=torch.float64)),
        nn.Parameter(torch.ones(2, dtype=torch.float64)),
    )
    optimizer = gs.GradientSurgery(
        torch.optim.SGD([old], lr=1e-3), ema_decay=decay, ema_dtype=torch.float64, accumulate=accumulate
    )
    parameters = [old]

    def losses(model: Any, step: int, micro: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        one, two = (torch.randn(len(parameters), 2, generator=generator, dtype=torch.float64) for _ in range(2))
        return {
            "forget": sum((a * p).sum() for a, p in zip(one, parameters, strict=True)),
            "retain": sum((a * p).sum() for a, p in zip(two, parameters, strict=True)),
        }  # type: ignore[dict-item]

    averages: list[Tensor] = [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    counts = [0, 0]
    for step in range(66):
        if step == 60:
            parameters.append(new)
            optimizer.add_param_group({"params": [new]})
        generator = torch.Generator().manual_seed(step)
        forget, retain = (torch.randn(len(parameters), 2, generator=generator, dtype=torch.float64) for _ in range(2))
        protected = []
        for index in range(len(parameters)):
            averages[index] = decay * averages[index] + (1.0 - decay) * retain[index]
            counts[index] += 1
            protected.append(averages[index] / (1.0 - decay ** counts[index]))
        FRONT_ENDS[front_end](nn.Module(), optimizer, losses, [step])
        rows = torch.stack([forget.flatten(), torch.cat(protected)])
        close(taken(optimizer).gram, rows @ rows.T, STEPPED, scale=float((rows @ rows.T).abs().max()))
    saved = copy.deepcopy(optimizer.state_dict())
    again = gs.GradientSurgery(
        torch.optim.SGD([{"params": [old]}, {"params": [new]}], lr=1e-3),
        ema_decay=decay,
        ema_dtype=torch.float64,
        accumulate=accumulate,
    )
    again.load_state_dict(saved)
    FRONT_ENDS[front_end](nn.Module(), optimizer, losses, [66])
    expected = taken(optimizer).gram
    FRONT_ENDS[front_end](nn.Module(), again, losses, [66])
    assert torch.equal(taken(again).gram, expected)


def test_a_checkpoint_with_one_number_of_steps_is_that_of_every_parameter() -> None:
    model, losses = mlp(), classification()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), ema_decay=0.9, ema_dtype=torch.float64)
    contexts(model, optimizer, losses, range(5))
    old = copy.deepcopy(optimizer.state_dict())
    for entries in old["state"].values():
        entries.pop("gradsurgery_steps", None)
    for group in old["param_groups"]:
        group["gradsurgery_steps"] = 5
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    again = gs.GradientSurgery(torch.optim.SGD(twin.parameters(), lr=0.1), ema_decay=0.9, ema_dtype=torch.float64)
    again.load_state_dict(old)
    contexts(model, optimizer, losses, [5])
    contexts(twin, again, losses, [5])
    assert torch.equal(values(model), values(twin))


# Closures, rules that write, rows that cancel -----------------------------------------------------------------------------------------


def test_a_closure_whose_gradients_belong_to_no_objective_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1))

    def closure() -> None:
        weight.sum().backward()

    with pytest.raises(RuntimeError, match="found none"):
        optimizer.step(closure)
    assert weight.data.tolist() == [1.0, 1.0]
    optimizer.zero_grad()
    assert optimizer.step(lambda: None) is None  # Lightning skips a batch so


def test_a_rule_that_edits_its_matrix_changes_no_record() -> None:
    def vandal(gram: Tensor) -> Tensor:
        gram.zero_()
        return gram.new_ones(gram.shape[:-1])

    one, two = mlp(), mlp()
    written = gs.GradientSurgery(torch.optim.SGD(one.parameters(), lr=0.1), rule=vandal)
    plain = gs.GradientSurgery(torch.optim.SGD(two.parameters(), lr=0.1), rule=gs.rules.sum)
    contexts(one, written, classification(), range(3))
    contexts(two, plain, classification(), range(3))
    assert torch.equal(taken(written).gram, taken(plain).gram)
    assert torch.equal(taken(written).predicted_change, taken(plain).predicted_change)


@pytest.mark.parametrize("size", [1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_cancel_are_clipped_by_the_row_that_is_written(size: float, dtype: torch.dtype) -> None:
    """f = -r + a little: c^T G c is the rounding noise of numbers of size 1e6, and the update is as long as the little."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4096, generator=generator, dtype=torch.float64)
    little = torch.randn(4096, generator=generator, dtype=torch.float64) * size
    weight = nn.Parameter(torch.zeros(4096, dtype=dtype))
    limit = 0.5 * size
    optimizer = gs.GradientSurgery(torch.optim.SGD([weight], lr=1.0), rule=gs.rules.sum, max_norm=limit)
    with optimizer.objective("retain"):
        (weight * base.to(dtype)).sum().backward()
    with optimizer.objective("forget"):
        (weight * (little - base).to(dtype)).sum().backward()
    record = optimizer.combine()
    assert weight.grad is not None
    written = float(weight.grad.double().norm())
    assert written <= limit * (1.0 + 1e-4)
    assert float(record.update_norm) == pytest.approx(written, rel=1e-4, abs=1e-30)


# Loading and hooks ----------------------------------------------------------------------------------------------------------------------


def test_a_plain_checkpoint_starts_a_stateful_rule_anew_as_it_does_the_averages() -> None:
    model, losses = mlp(), classification()
    rule = gs.rules.GradVac(beta=0.5)
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), rule=rule, ema_decay=0.9)
    contexts(model, optimizer, losses, range(3))
    assert rule.state_dict()["target"] is not None
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    assert rule.state_dict() == gs.rules.GradVac(beta=0.5).state_dict()


def test_global_step_hooks_see_one_step() -> None:
    seen: list[str] = []
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(f"before {type(optimizer).__name__}")),
        register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(f"after {type(optimizer).__name__}")),
    ]
    try:
        model = mlp()
        contexts(model, gs.GRU(torch.optim.SGD(model.parameters(), lr=0.1)), classification(), [0])
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before GRU", "after GRU"]


def test_train_and_eval_of_the_base_are_passed_on() -> None:
    """Schedule-free optimizers keep two sets of weights and swap them."""

    class ScheduleFree(torch.optim.SGD):
        mode = "train"

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    weight = nn.Parameter(torch.ones(2))
    base = ScheduleFree([weight], lr=0.1)
    optimizer: Any = gs.GRU(base)
    optimizer.eval()
    assert base.mode == "eval"
    optimizer.train()
    assert base.mode == "train"
    assert not hasattr(gs.GRU(torch.optim.SGD([weight], lr=0.1)), "eval")


@pytest.mark.parametrize("rule", ["sago", "gru"])
def test_low_precision_parameters_with_wide_gradients(rule: str) -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    if not hasattr(weight, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    weight.grad_dtype = torch.float32
    optimizer = gs.GradientSurgery(torch.optim.SGD([weight], lr=0.25, foreach=False), rule=rule)
    with optimizer.objective("retain"):
        (weight.float() * torch.tensor([1.0, 2.0, 0.0, 1.0])).sum().backward()
    with optimizer.objective("forget"):
        (weight.float() * torch.tensor([1.0, -1.0, 1.0, 1.0])).sum().backward()
    optimizer.combine()
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32


def test_the_average_of_a_parameter_that_no_objective_reached_stays() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))])
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), ema_decay=0.5)

    def step(number: int) -> dict[str, Any]:
        for name in optimizer.objectives:
            with optimizer.objective(name):
                sum(weight.square().sum() for weight in list(model)[:number]).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        return copy.deepcopy(optimizer.state_dict()["state"][1])

    torch.testing.assert_close(step(1 + 1), step(1), rtol=0, atol=0)


def test_the_average_of_a_complex_parameter_is_that_of_its_parts() -> None:
    start = torch.tensor([1.0 + 2.0j, -1.0 + 0.5j])
    whole, parts = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start).clone())
    optimizers = [gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1), ema_decay=0.5) for weight in (whole, parts)]
    for step in range(3):
        for optimizer, found in zip(optimizers, (lambda: torch.view_as_real(whole), lambda: parts), strict=True):
            with optimizer.objective("forget"):
                (-found()).sum().backward()
            with optimizer.objective("retain"):
                (found() * torch.tensor([1.0, step - 3.0])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    close(torch.view_as_real(whole.detach()), parts.detach(), LINEAR[torch.float32])


@pytest.mark.parametrize("many", [False, True])
def test_parameters_without_names_join_those_with_names(many: bool) -> None:
    """As trainers add them that unfreeze a model part by part."""
    model = mlp()
    optimizer = gs.GRU(torch.optim.AdamW(list(model.named_parameters())[:2], lr=0.1))
    late = list(model.parameters())[2:]
    optimizer.add_param_group({"params": late if many else late[0], "lr": 0.01})
    assert optimizer.param_groups[1]["params"] == (late if many else late[:1])
    assert optimizer.param_groups[1]["lr"] == 0.01
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert len(set(names)) == len(names) == 2 + len(optimizer.param_groups[1]["params"])
