"""Checkpoints, copies, schedulers, hooks and proxies: whatever else touches an optimizer between its steps."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler

import gradsurgery as gs
from gradsurgery.rules import StatefulRule
from tests.problems import BASES, FOUR, assert_same, classification, contexts, joined, mlp, snapshot, taken, values

pytestmark = pytest.mark.supports(
    "Checkpoints",
    "`state_dict` with `weights_only`, `torch.distributed.checkpoint`, copies and pickles, schedulers, hooks",
)

LOSSES = classification(FOUR)
HALF, ALL = range(4), range(8)


def surgeon(model: nn.Module, base: str = "AdamW", **options: Any) -> gs.GradientSurgery:
    options = {
        "rule": gs.rules.GradVac(beta=0.5),
        "objectives": FOUR,
        "ema_decay": {"retain": 0.5, "style": 0.9},
        **options,
    }
    return gs.GradientSurgery(BASES[base](model.named_parameters()), **options)


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Checkpoints ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(base: str) -> None:
    model = mlp(dtype=torch.float32)
    optimizer = surgeon(model, base)
    contexts(model, optimizer, LOSSES, HALF)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = mlp(dtype=torch.float32, seed=1)
    resumed.load_state_dict(saved["model"])
    again = surgeon(resumed, base)
    again.load_state_dict(saved["optimizer"])
    assert_same(snapshot(resumed, again), snapshot(model, optimizer))
    rest = range(len(HALF), len(ALL))
    contexts(model, optimizer, LOSSES, rest)
    contexts(resumed, again, LOSSES, rest)
    assert_same(snapshot(resumed, again), snapshot(model, optimizer))
    assert torch.equal(taken(again).gram, taken(optimizer).gram)
    assert again.rule.state_dict() == optimizer.rule.state_dict()  # type: ignore[attr-defined]


def test_steps_of_what_only_the_forget_loss_reached_are_kept_by_a_base_without_state() -> None:
    """The bias correction of its average counts them, when the retain loss reaches it at last."""

    def made() -> tuple[nn.Parameter, nn.Parameter, gs.GradientSurgery]:
        a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        return a, b, gs.GRU(torch.optim.SGD([a, b], lr=0.1), ema_decay=0.9)

    def step(a: nn.Parameter, b: nn.Parameter, optimizer: gs.GradientSurgery, retain: Tensor) -> None:
        with optimizer.objective("retain"):
            retain.backward()
        with optimizer.objective("forget"):
            (-a.sum() - b.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    a, b, optimizer = made()
    for _ in range(5):
        step(a, b, optimizer, a.square().sum())
    c, d, again = made()
    with torch.no_grad():
        c.copy_(a)
        d.copy_(b)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    step(a, b, optimizer, a.sum() + 2 * b.sum())
    step(c, d, again, c.sum() + 2 * d.sum())
    assert torch.equal(taken(again).gram, taken(optimizer).gram)
    assert torch.equal(b, d)


def test_the_number_of_steps_does_not_depend_on_the_default_type() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = gs.GRU(torch.optim.SGD([weight], lr=0.1), ema_decay=0.9)
    joined(
        nn.ParameterList([weight]), optimizer, lambda *_: {"forget": -weight.sum(), "retain": weight.sum()}, range(1)
    )
    optimizer._ema.steps[weight] = 301
    torch.set_default_dtype(torch.bfloat16)
    try:
        saved = optimizer.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(saved["state"][0]["gradsurgery_steps"]) == 301.0


@pytest.mark.parametrize("option", ["average", "bias correction", "GradVac's target"])
def test_every_part_of_the_state_matters(option: str) -> None:
    """A resumed run without this part differs, so the test above would notice its loss."""
    model = mlp()
    optimizer = surgeon(model)
    contexts(model, optimizer, LOSSES, HALF)
    saved = copy.deepcopy(optimizer.state_dict())
    for entries in saved["state"].values():
        if option == "average":
            entries["gradsurgery_ema_retain"].zero_()
        if option == "bias correction":
            entries["gradsurgery_steps"].zero_()
    for group in saved["param_groups"]:
        if option == "GradVac's target":
            group["gradsurgery_rule"] = {"target": None}
    resumed = copy.deepcopy(model)
    again = surgeon(resumed)
    again.load_state_dict(saved)
    rest = range(len(HALF), len(ALL))
    contexts(model, optimizer, LOSSES, rest)
    contexts(resumed, again, LOSSES, rest)
    assert not torch.equal(values(model), values(resumed))


def test_averages_of_bf16_parameters_stay_float32_through_a_checkpoint() -> None:
    model = mlp(dtype=torch.bfloat16)
    optimizer = surgeon(model)
    contexts(model, optimizer, LOSSES, HALF)
    saved = through_a_file(optimizer.state_dict())
    averages = [entries["gradsurgery_ema_retain"] for entries in saved["state"].values()]
    assert {average.dtype for average in averages} == {torch.float32}
    assert any(not torch.equal(average, average.bfloat16().float()) for average in averages), (
        "the digits beyond bf16 are used"
    )
    resumed = copy.deepcopy(model)
    again = surgeon(resumed)
    again.load_state_dict(saved)
    assert_same(snapshot(resumed, again), snapshot(model, optimizer))
    rest = range(len(HALF), len(ALL))
    contexts(model, optimizer, LOSSES, rest)
    contexts(resumed, again, LOSSES, rest)
    assert_same(snapshot(resumed, again), snapshot(model, optimizer))


def test_averages_are_kept_in_ema_dtype() -> None:
    model = mlp()
    optimizer = surgeon(model, ema_dtype=torch.bfloat16)
    contexts(model, optimizer, LOSSES, HALF)
    saved = optimizer.state_dict()
    assert {entries["gradsurgery_ema_style"].dtype for entries in saved["state"].values()} == {torch.bfloat16}
    wide = surgeon(mlp())
    wide.load_state_dict(saved)
    assert {e["gradsurgery_ema_style"].dtype for e in wide.state_dict()["state"].values()} == {torch.float32}


def test_a_plain_checkpoint_of_the_base_starts_the_averages_at_0() -> None:
    plain = mlp()
    base = BASES["AdamW"](plain.parameters())
    for step in HALF:
        for loss in LOSSES(plain, step, 0).values():
            loss.backward()
        base.step()
        base.zero_grad()
    trained = []
    for used in (False, True):
        model = copy.deepcopy(plain)
        optimizer = surgeon(model, rule="gru")
        if used:  # averages of another run, which the load must replace
            contexts(model, optimizer, LOSSES, HALF)
            model.load_state_dict(plain.state_dict())
        optimizer.load_state_dict(through_a_file(base.state_dict()))
        contexts(model, optimizer, LOSSES, [5])
        trained.append(snapshot(model, optimizer))
    assert_same(trained[1], trained[0])
    assert optimizer.state_dict()["state"][0]["step"] == len(HALF) + 1


def test_the_base_alone_can_go_on_from_a_checkpoint_with_averages() -> None:
    model = mlp()
    optimizer = surgeon(model)
    contexts(model, optimizer, LOSSES, HALF)
    optimizer.zero_grad()
    trained = []
    for uses_file in (True, False):
        own = copy.deepcopy(model)
        base = BASES["AdamW"](own.parameters())
        base.load_state_dict(through_a_file(optimizer.state_dict()) if uses_file else optimizer.base.state_dict())
        LOSSES(own, 5, 0)["retain"].backward()
        base.step()
        trained.append(list(own.named_parameters()))
    assert_same(*trained)


def test_loading_does_not_change_the_state_dict_and_saving_does_not_share_groups() -> None:
    model = mlp()
    optimizer = surgeon(model)
    contexts(model, optimizer, LOSSES, HALF)
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict)
    surgeon(mlp()).load_state_dict(state_dict)
    assert state_dict["param_groups"] == kept["param_groups"]
    assert {i: set(e) for i, e in state_dict["state"].items()} == {i: set(e) for i, e in kept["state"].items()}
    again = surgeon(mlp())
    again.load_state_dict(state_dict)
    again.state_dict()["param_groups"][0]["lr"] = 7.0
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert "gradsurgery_steps" not in optimizer.param_groups[0]
    joined(model, optimizer, LOSSES, [4])
    found = again.state_dict()["state"][0]["gradsurgery_ema_retain"]
    assert torch.equal(found, kept["state"][0]["gradsurgery_ema_retain"]), "a loaded average must be a copy"


def other_model(state_dict: dict[str, Any]) -> None:
    state_dict["state"][0]["gradsurgery_ema_retain"] = torch.zeros(2, 2)


def more_parameters(state_dict: dict[str, Any]) -> None:
    state_dict["state"][9] = {"gradsurgery_ema_retain": torch.zeros(2, 2)}


def unknown_average(state_dict: dict[str, Any]) -> None:
    state_dict["state"][0]["gradsurgery_ema_utility"] = torch.zeros(5, 4)


def more_groups(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"].append(dict(state_dict["param_groups"][0], params=[]))


def other_shapes(state_dict: dict[str, Any]) -> None:
    state_dict["state"][1]["exp_avg"] = torch.zeros(2, 2)


def other_grouping(state_dict: dict[str, Any]) -> None:
    state_dict["state"] = {}
    state_dict["param_groups"][0]["params"] = [0]


def fewer_parameters(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["params"] = state_dict["param_groups"][0]["params"][:-1]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (other_model, r"average of 'retain' for parameter 0 to have the parameter's shape, found \[2, 2\]"),
        (more_parameters, "average of 'retain' for parameter 9"),
        (
            unknown_average,
            r"expected averages of \['retain', 'style'\], found one of 'utility'; construct GradientSurgery with the ema_decay",
        ),
        (more_groups, "different number of parameter groups"),
        (
            other_shapes,
            r"exp_avg of parameter 1 to have the parameter's shape \[5\], found \[2, 2\]; the checkpoint is of another",
        ),
        (
            other_grouping,
            r"groups of \[4\] parameters, found \[1\], a different number of parameters; the checkpoint is of",
        ),
        (fewer_parameters, "average of 'retain' for parameter 3"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(spoil: Callable[[dict[str, Any]], None], sentence: str) -> None:
    model, source = mlp(), mlp()
    optimizer, saved = surgeon(model), surgeon(source)
    contexts(model, optimizer, LOSSES, HALF)
    contexts(source, saved, LOSSES, range(2))
    state_dict = copy.deepcopy(saved.state_dict())
    spoil(state_dict)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(state_dict)
    assert_same(snapshot(model, optimizer), before)


def test_a_rule_whose_numbers_do_not_fit_changes_nothing() -> None:
    model, source = mlp(), mlp()
    optimizer, saved = surgeon(model), surgeon(source)
    contexts(model, optimizer, LOSSES, HALF)
    contexts(source, saved, LOSSES, range(2))
    state_dict = copy.deepcopy(saved.state_dict())
    for group in state_dict["param_groups"]:
        group["gradsurgery_rule"] = {"memory": 1}
    before = snapshot(model, optimizer)
    assert isinstance(optimizer.rule, StatefulRule)
    kept = optimizer.rule.state_dict()
    with pytest.raises(KeyError):
        optimizer.load_state_dict(state_dict)
    assert_same(snapshot(model, optimizer), before)
    assert optimizer.rule.state_dict() == kept


def test_rows_of_before_are_forgotten_by_a_load() -> None:
    model = mlp()
    optimizer = surgeon(model)
    contexts(model, optimizer, LOSSES, HALF)
    state_dict = copy.deepcopy(optimizer.state_dict())
    with optimizer.objective("retain"):
        LOSSES(model, 4, 0)["retain"].backward()
    optimizer.load_state_dict(state_dict)
    with pytest.raises(RuntimeError, match="found none for"):
        optimizer.combine()


def test_the_way_of_accelerate_prepare_changes_nothing() -> None:
    """accelerator.prepare() sends the fresh optimizer's state_dict back through load_state_dict."""
    trained = []
    for prepared in (False, True):
        model = mlp()
        optimizer = surgeon(model)
        if prepared:
            optimizer.load_state_dict(optimizer.state_dict())
        contexts(model, optimizer, LOSSES, ALL)
        trained.append(values(model))
    assert torch.equal(*trained)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("rule", ["gru", "GradVac"])
@pytest.mark.parametrize("base", ["AdamW", "SGD", "momentum", "Adagrad"])
def test_torch_distributed_checkpoint_restores_averages(base: str, rule: str, tmp_path: Path) -> None:
    """SGD has no state, Adagrad has one before its first step, and the others get theirs in a step at learning rate 0."""

    def make(model: nn.Module) -> gs.GradientSurgery:
        return surgeon(model, base, rule=gs.rules.GradVac(beta=0.5) if rule == "GradVac" else rule)

    model, resumed = mlp(), mlp(seed=1)
    optimizer, again = make(model), make(resumed)
    contexts(model, optimizer, LOSSES, HALF)
    before = snapshot(model, optimizer)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    assert_same(snapshot(model, optimizer), before)
    resumed.load_state_dict(model.state_dict())
    loaded = {"optimizer": get_optimizer_state_dict(resumed, again)}
    dcp.load(loaded, checkpoint_id=tmp_path / "saved", no_dist=True)
    set_optimizer_state_dict(resumed, again, loaded["optimizer"])
    assert_same(snapshot(resumed, again), before)
    rest = range(len(HALF), len(ALL))
    contexts(model, optimizer, LOSSES, rest)
    contexts(resumed, again, LOSSES, rest)
    assert_same(snapshot(resumed, again), snapshot(model, optimizer))


# Copies --------------------------------------------------------------------------------------------------------------------------


def pickled(pair: tuple[nn.Module, gs.GradientSurgery]) -> tuple[nn.Module, gs.GradientSurgery]:
    return pickle.loads(pickle.dumps(pair))


def saved(pair: tuple[nn.Module, gs.GradientSurgery]) -> tuple[nn.Module, gs.GradientSurgery]:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("phase", ["between steps", "captured", "combined"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_copy_trains_on_its_own(duplicate: Callable[[Any], Any], phase: str) -> None:
    model = mlp()
    optimizer = surgeon(model)
    scheduler = lr_scheduler.StepLR(optimizer, 2)  # it binds a step to this instance
    contexts(model, optimizer, LOSSES, HALF)
    if phase != "between steps":
        for name, loss in LOSSES(model, 9, 0).items():
            with optimizer.objective(name):
                loss.backward()
    if phase == "combined":
        optimizer.combine()
    twin, other = duplicate((model, optimizer))
    optimizer.zero_grad()
    assert_same(snapshot(twin, other), snapshot(model, optimizer))
    before = snapshot(model, optimizer)
    rest = range(len(HALF), len(ALL))
    contexts(twin, other, LOSSES, rest)
    assert_same(snapshot(model, optimizer), before)
    contexts(model, optimizer, LOSSES, rest)
    assert_same(snapshot(twin, other), snapshot(model, optimizer))
    assert other.rule is not optimizer.rule
    assert type(other) is type(optimizer)
    assert scheduler.optimizer is optimizer


def test_a_deepcopy_alone_has_parameters_of_its_own() -> None:
    model = mlp()
    optimizer = surgeon(model)
    contexts(model, optimizer, LOSSES, HALF)
    other = copy.deepcopy(optimizer)
    copies = [parameter for group in other.param_groups for parameter in group["params"]]
    assert torch.equal(values(copies), values(model))
    assert not {id(p) for p in copies} & {id(p) for p in model.parameters()}
    assert set(other._ema.averages["retain"]) == set(copies)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1.0 + step)),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 6)], milestones=[2]
        ),
    ],
    ids=["StepLR", "OneCycleLR", "LambdaLR", "ReduceLROnPlateau", "SequentialLR"],
)
@pytest.mark.parametrize("duplicate", [None, copy.deepcopy, pickled])
def test_schedulers_drive_the_base(
    make: Callable[[torch.optim.Optimizer], Any], duplicate: Callable[[Any], Any] | None
) -> None:
    """Schedulers drive it as they would the plain base, without the "scheduler before optimizer" warning; OneCycleLR moves the betas too."""
    model, plain = mlp(), mlp()
    optimizer = gs.GradientSurgery(torch.optim.AdamW(model.parameters(), lr=0.02), rule="sum")
    if duplicate is not None:
        make(optimizer)
        model, optimizer = duplicate((model, optimizer))
        for group in optimizer.param_groups:
            group.clear()
            group.update(torch.optim.AdamW(model.parameters(), lr=0.02).param_groups[0])
    base = torch.optim.AdamW(plain.parameters(), lr=0.02)
    losses = classification()

    def step(scheduler: Any, step: int) -> None:
        scheduler.step(1.0) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        scheduler = make(optimizer)
        contexts(model, optimizer, losses, ALL, after_step=lambda index, record: step(scheduler, index))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = make(base)
    rates = []
    for index in ALL:
        for loss in losses(plain, index, 0).values():
            loss.backward()
        base.step()
        base.zero_grad()
        step(reference, index)
        rates.append(base.param_groups[0]["lr"])
    assert len(set(rates)) > 1
    assert optimizer.param_groups[0]["lr"] == rates[-1]
    assert torch.equal(values(model), values(plain))


def test_a_scheduler_still_drives_the_base_after_a_load() -> None:
    model = mlp()
    optimizer = surgeon(model)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    contexts(model, optimizer, LOSSES, [0])
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state


# Hooks ---------------------------------------------------------------------------------------------------------------------------


def test_step_hooks_run_around_the_whole_step() -> None:
    model = mlp()
    optimizer = surgeon(model)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o, values(model))))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o, values(model))))
    start = values(model)
    contexts(model, optimizer, LOSSES, [0])
    assert [(when, who) for when, who, _ in seen] == [("before", optimizer), ("after", optimizer)]
    assert torch.equal(seen[0][2], start)
    assert torch.equal(seen[1][2], values(model))
    assert not torch.equal(start, values(model))


def test_state_dict_hooks_run_and_may_replace_the_state_dict() -> None:
    model = mlp()
    optimizer = surgeon(model)
    contexts(model, optimizer, LOSSES, HALF)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda o, state_dict: {**state_dict, "note": "hello"})
    optimizer.register_load_state_dict_pre_hook(lambda o, state_dict: seen.append(state_dict.pop("note")))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    state_dict = optimizer.state_dict()
    assert state_dict["note"] == "hello"
    optimizer.load_state_dict(state_dict)
    assert seen == ["state_dict pre", "hello", "load post"]
    assert state_dict["note"] == "hello", "the caller's dictionary is not changed"


# Proxies -------------------------------------------------------------------------------------------------------------------------


def test_methods_called_on_lightnings_proxy_change_the_real_object() -> None:
    """LightningOptimizer runs our methods with itself as self: an attribute that they rebound would be lost."""
    strategy = pytest.importorskip("lightning.pytorch.strategies")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model, plain = mlp(), mlp()
    optimizer, reference = surgeon(model), surgeon(plain)
    proxy: Any = LightningOptimizer(optimizer)
    proxy._strategy = strategy.SingleDeviceStrategy(device=torch.device("cpu"))
    own = set(vars(proxy))
    for step in ALL:
        if step % 2:
            proxy.join(**LOSSES(model, step, 0)).backward()
        else:
            for name, loss in LOSSES(model, step, 0).items():
                with proxy.objective(name):
                    loss.backward()
            proxy.combine()
        optimizer.step()
        assert proxy.record is optimizer.record
        proxy.zero_grad()
        if step == 4:
            state_dict = copy.deepcopy(proxy.state_dict())
            proxy.load_state_dict(state_dict)
            proxy.param_groups[0]["lr"] = 0.01
    contexts(plain, reference, LOSSES, range(5))
    reference.param_groups[0]["lr"] = 0.01
    contexts(plain, reference, LOSSES, range(5, 8))
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))
    assert set(vars(proxy)) == own, "a method left an attribute on the proxy"
    proxy.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "param_names": ["extra"]})
    assert len(optimizer.base.param_groups) == 2
    assert isinstance(proxy, gs.GradientSurgery)
    assert proxy.memory_estimate() == optimizer.memory_estimate()


def test_a_base_that_refuses_leaves_the_rules_numbers() -> None:
    class Refusing(torch.optim.SGD):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            raise ValueError("not mine")

    rule, other = gs.rules.GradVac(beta=0.5), gs.rules.GradVac(beta=0.5)
    saved = gs.GradientSurgery(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), rule=other)
    optimizer = gs.GradientSurgery(Refusing([nn.Parameter(torch.ones(1))], lr=0.1), rule=rule)
    other(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    other.commit()
    before = rule.state_dict()
    assert other.state_dict() != before
    with pytest.raises(ValueError, match="not mine"):
        optimizer.load_state_dict(saved.state_dict())
    assert rule.state_dict() == before


def test_a_checkpoint_before_the_first_step_fits_any_decay() -> None:
    weight = nn.Parameter(torch.ones(2))
    saved = gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1), ema_decay=0.5).state_dict()
    optimizer = gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1), ema_decay=0.9)
    optimizer.load_state_dict(saved)
    assert optimizer.ema_decay == {"retain": 0.9}


def test_a_checkpoint_without_one_of_the_averages_that_have_begun_is_refused() -> None:
    """It would begin at 0 and be corrected as one of all the steps before."""
    model = mlp()
    optimizer = surgeon(model, ema_decay={"retain": 0.5})
    contexts(model, optimizer, LOSSES, HALF)
    other = mlp()
    more = surgeon(other)
    before = snapshot(other, more)
    with pytest.raises(
        ValueError, match=r"expected averages of \['retain', 'style'\], found those of \['retain'\] alone"
    ):
        more.load_state_dict(optimizer.state_dict())
    assert_same(snapshot(other, more), before)
    begun = surgeon(mlp(), ema_decay={"retain": 0.5})
    surgeon(other).load_state_dict(begun.state_dict())  # nothing has begun: anything fits
