"""Contracts of accumulation: what a wrong loop would train silently is exact, or refused with nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.problems import TWO, assert_same, classification, contexts, mlp, snapshot, taken, values
from tests.reference import training
from tests.tolerances import STEPPED, STEPPED_FLOAT32, close

LOSSES = classification()
MICRO = 4
STEPS = 3


def surgeon(model: nn.Module, **options: Any) -> gs.GradientSurgery:
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    chosen: dict[str, Any] = {"accumulate": True, "ema_decay": 0.5, **options}
    return gs.GradientSurgery(base, **chosen)


def sums(model: nn.Module, step: int) -> list[dict[str, Tensor]]:
    """For the oracle, whose rows are means, the losses whose means are the sums over the micro-batches."""
    return [{name: loss * MICRO for name, loss in LOSSES(model, step, micro).items()} for micro in range(MICRO)]


def undivided(model: nn.Module, optimizer: gs.GradientSurgery, step: int, **how: Any) -> None:
    for micro in range(MICRO):
        optimizer.join(**how, **LOSSES(model, step, micro)).backward()


# Undivided losses ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["undivided", "divided before join"])
def test_a_joint_loss_that_is_not_divided_is_refused_and_zero_grad_recovers(loop: str) -> None:
    model, plain = mlp(), mlp()
    optimizer, reference = surgeon(model, max_norm=1.0), surgeon(plain, max_norm=1.0, accumulate=False)
    contexts(model, optimizer, LOSSES, [0], micro_batches=MICRO)
    before = snapshot(model, optimizer)
    share = 1.0 if loop == "undivided" else 1.0 / MICRO
    for micro in range(MICRO):
        optimizer.join(**{name: loss * share for name, loss in LOSSES(model, 1, micro).items()}).backward()
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"micro-batch 4; divide each loss by the number of micro-batches.*scale=1\.0"
        ):
            optimizer.step()
    optimizer.zero_grad()
    assert_same(snapshot(model, optimizer), before)
    contexts(model, optimizer, LOSSES, [2], micro_batches=MICRO)
    contexts(plain, reference, LOSSES, [0, 2], micro_batches=MICRO)
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))


def test_one_micro_batch_is_never_mistaken() -> None:
    model = mlp()
    optimizer = surgeon(model)
    for step in range(STEPS):
        optimizer.join(**LOSSES(model, step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_with_their_scale_undivided_losses_are_sums_as_those_of_contexts_are() -> None:
    model, by_contexts, plain = mlp(), mlp(), mlp()
    options: dict[str, Any] = {"max_norm": 1.0, "ema_dtype": torch.float64}
    optimizer, other = surgeon(model, **options), surgeon(by_contexts, **options)
    reference = training.Surgery(
        plain,
        torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9),
        TWO,
        ema_decay={"retain": 0.5},
        max_norm=1.0,
    )
    clipped = 0
    for step in range(STEPS):
        undivided(model, optimizer, step, scale=1.0)
        optimizer.step()
        optimizer.zero_grad()
        for micro in range(MICRO):
            for name, loss in LOSSES(by_contexts, step, micro).items():
                with other.objective(name):
                    loss.backward()
        other.step()
        other.zero_grad()
        expected = reference.step(sums(plain, step))
        close(taken(optimizer).update_norm, expected.update.norm(), STEPPED)
        clipped += int(expected.update.norm() > 0.999)
        close(values(model), values(plain), STEPPED)
    assert clipped
    close(values(model), values(by_contexts), STEPPED)


def test_micro_batches_with_and_without_a_scale_are_refused() -> None:
    model = mlp()
    optimizer = surgeon(model)
    (optimizer.join(**LOSSES(model, 0, 0)) / 2).backward()
    joint = optimizer.join(scale=1.0, **LOSSES(model, 0, 1))
    with pytest.raises(
        RuntimeError, match=r"scale= in every micro-batch of a window or in none, found one with after 1"
    ):
        joint.backward()
    optimizer.zero_grad()
    undivided(model, optimizer, 0, scale=1.0)
    optimizer.step()


# Under a GradScaler --------------------------------------------------------------------------------------------------------------


def scaler_of(exponent: int) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**exponent, growth_interval=100)


def joined_under(scaler: torch.amp.GradScaler, *, divide: bool, known: bool = False) -> tuple[nn.Module, Any]:
    model = mlp(dtype=torch.float32)
    optimizer = surgeon(model)
    for step in range(STEPS):
        for micro in range(MICRO):
            how: dict[str, Any] = {"scale": scaler.get_scale()} if known else {}
            loss = optimizer.join(**how, **LOSSES(model, step, micro))
            scaler.scale(loss / MICRO if divide else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("exponent", [2, 8], ids=["the number of micro-batches", "another"])
def test_a_scaler_tells_its_scale_from_a_missing_division(exponent: int) -> None:
    plain = mlp(dtype=torch.float32)
    contexts(plain, surgeon(plain), LOSSES, range(STEPS), micro_batches=MICRO)
    model, _ = joined_under(scaler_of(exponent), divide=True)
    close(values(model), values(plain), STEPPED_FLOAT32)
    with pytest.raises(RuntimeError, match=r"found the loss scale itself in micro-batch 4"):
        joined_under(scaler_of(exponent), divide=False)


def test_a_scaled_loop_that_does_not_divide_says_the_scale() -> None:
    model, _ = joined_under(scaler_of(8), divide=False, known=True)
    plain = mlp()
    reference = training.Surgery(
        plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), TWO, ema_decay={"retain": 0.5}
    )
    for step in range(STEPS):
        reference.step(sums(plain, step))
    close(values(model).double(), values(plain), STEPPED_FLOAT32)


class OwnScaler(torch.amp.GradScaler):
    """A user's scaler that calls torch's."""

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        return super().step(optimizer, *args, **kwargs)


def capture(model: nn.Module, optimizer: gs.GradientSurgery, scale: float = 1.0) -> None:
    for name, loss in LOSSES(model, 0, 0).items():
        with optimizer.objective(name):
            (loss * scale).backward()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", [torch.amp.GradScaler, OwnScaler])
@pytest.mark.parametrize("fused", [False, True])
def test_rows_that_wait_under_a_scaler_are_refused_and_can_be_combined_then(
    fused: bool, kind: Callable[..., torch.amp.GradScaler], unscale: bool
) -> None:
    scaler, scale = kind("cpu", init_scale=2.0**8), 2.0**8
    model, plain = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    optimizer, reference = (
        gs.GRU(torch.optim.AdamW(each.parameters(), lr=0.1, fused=fused)) for each in (model, plain)
    )
    scaler.scale(torch.ones(()))
    capture(model, optimizer, scale)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"rows of \['forget', 'retain'\] that wait; call optimizer.combine\(scale="):
        scaler.step(optimizer)
    assert torch.equal(values(model), before)
    optimizer.combine(scale=scaler.get_scale())
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    capture(plain, reference)
    reference.step()
    optimizer.zero_grad()
    reference.zero_grad()
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        ("no scale", r"found combine\(\) without one.*call optimizer.combine\(scale=scaler.get_scale\(\)\)"),
        ("unscaled too early", r"expected scaler.unscale_ after combine\(\), found it before"),
    ],
)
def test_rows_combined_wrongly_under_a_scaler(mistake: str, sentence: str) -> None:
    scaler, model = scaler_of(8), mlp(dtype=torch.float32)
    optimizer = surgeon(model)
    scaler.scale(torch.ones(()))
    capture(model, optimizer, scaler.get_scale())
    before = values(model)
    if mistake == "no scale":
        optimizer.combine()
    else:
        scaler.unscale_(optimizer)
        optimizer.combine(scale=scaler.get_scale())
    with pytest.raises(RuntimeError, match=sentence):
        scaler.step(optimizer)
    assert torch.equal(values(model), before)


def test_others_may_ask_whether_it_unscales_by_itself() -> None:
    """Lightning's plugins do, also without a scaler, and from functions of any name."""
    model = mlp()
    optimizer = surgeon(model)
    capture(model, optimizer)

    class Plugin:
        def step(self) -> bool:
            return getattr(optimizer, "_step_supports_amp_scaling", True)

    assert Plugin().step() is False
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)  # a disabled scaler only steps


# Options between steps -----------------------------------------------------------------------------------------------------------


def test_a_decay_that_changes_weighs_the_average_as_it_says() -> None:
    r"""Against the definition: the corrected average so far has the weight d (1 - d^n) / (1 - d^(n+1)), the row the rest."""
    model, decays = mlp(), [0.9, 0.5, 0.0, 0.7, 0.99]
    optimizer = surgeon(model, ema_decay=decays[0])
    parameters = list(model.parameters())
    average: Tensor | None = None
    for step, decay in enumerate(decays):
        optimizer.ema_decay = decay
        assert optimizer.ema_decay == {"retain": decay}
        found = LOSSES(model, step, 0)
        rows = [training.flat(training.gradient(found[name], parameters), parameters) for name in TWO]
        weight = decay * (1 - decay**step) / (1 - decay ** (step + 1))
        average = rows[1] if average is None else weight * average + (1 - weight) * rows[1]
        contexts(model, optimizer, LOSSES, [step])
        both = torch.stack([rows[0], average])
        close(taken(optimizer).gram, both @ both.mT, STEPPED_FLOAT32)


def test_options_that_are_set_are_those_of_a_new_optimizer() -> None:
    later = {"add": {"retain": 0.5}, "max_norm": 0.2, "guard": "measure", "rule": "pcgrad", "metric": "optimizer"}
    model, plain = mlp(), mlp()
    optimizer, reference = surgeon(model, ema_decay=None), surgeon(plain, ema_decay=None, **later)
    for option, value in later.items():
        setattr(optimizer, option, value)
        found = getattr(optimizer, option)
        assert found == (gs.rules.pcgrad if option == "rule" else value)
        assert found == getattr(reference, option)
    contexts(model, optimizer, LOSSES, range(STEPS))
    contexts(plain, reference, LOSSES, range(STEPS))
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))
    for option in ("add", "max_norm", "guard", "ema_decay"):
        setattr(optimizer, option, None)
    assert (optimizer.add, optimizer.max_norm, optimizer.guard, optimizer.ema_decay) == ({}, None, None, {})


BAD: dict[str, Any] = {
    "add": {"forget": 1.0},
    "max_norm": 0.0,
    "guard": "gradient",
    "rule": "grew",
    "ema_decay": 1.0,
    "metric": "cosine",
    "record_scope": "layer",
}


@pytest.mark.parametrize("option", BAD)
def test_options_are_checked_when_they_are_set_and_not_in_the_middle_of_a_step(option: str) -> None:
    model = mlp()
    optimizer = surgeon(model)
    before = getattr(optimizer, option)
    with pytest.raises(ValueError, match=f"{option}: expected"):
        setattr(optimizer, option, BAD[option])
    assert getattr(optimizer, option) == before
    capture(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{option}: expected to be set between steps"):
            setattr(optimizer, option, before)
        optimizer.combine()
    optimizer.step()
    setattr(optimizer, option, before)


def test_what_looks_like_an_option_and_is_none_cannot_be_assigned() -> None:
    """An entry of a copy, and an attribute that nobody reads, change nothing."""
    optimizer = surgeon(mlp(), add={"retain": 1.0})
    for option in (optimizer.add, optimizer.ema_decay):
        with pytest.raises(TypeError, match="does not support item assignment"):
            option["retain"] = 0.5
    constructed = {"scope": "tensor", "accumulate": True, "ema_dtype": torch.float64, "objectives": ("a", "b")}
    for name, value in constructed.items():
        before = getattr(optimizer, name)
        with pytest.raises(AttributeError, match=f"{name}: expected to be set when the optimizer is constructed"):
            setattr(optimizer, name, value)
        assert getattr(optimizer, name) == before == getattr(copy.deepcopy(optimizer), name)
        if name != "objectives":
            assert getattr(surgeon(mlp(), **{name: value}), name) == value


def test_an_average_begins_with_the_first_step() -> None:
    model = mlp()
    optimizer = surgeon(model, ema_decay=None)
    optimizer.ema_decay = 0.5
    contexts(model, optimizer, LOSSES, [0])
    with pytest.raises(ValueError, match=r"whose averages have begun, \['retain'\], found \[\]; 0.0 is no memory"):
        optimizer.ema_decay = None
    optimizer.ema_decay = {"retain": 0.0}
    contexts(model, optimizer, LOSSES, [1])


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.25, 0.75), (0.9, 0.1), (0.2, 0.3, 0.5)])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_micro_batches_may_have_shares_of_their_own(shares: tuple[float, ...], scale: float) -> None:
    """As tokens give them: the rows are the weighted mean, and clipping sees their true length."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = gs.GradientSurgery(torch.optim.SGD([weight], lr=1.0), rule="sum", max_norm=1.0, accumulate=True)
    gradients = torch.tensor([[1.0, 2.0, 2.0], [3.0, 0.0, 4.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    for share, gradient in zip(shares, gradients, strict=False):
        loss = optimizer.join(forget=(weight * gradient).sum(), retain=(weight * gradient).sum() * 0)
        (loss * share * scale).backward()
    mean = sum(share * gradient for share, gradient in zip(shares, gradients, strict=False))
    assert isinstance(mean, torch.Tensor)
    assert optimizer.record is not None
    close(optimizer.record.norms[0], mean.norm(), STEPPED)
    assert weight.grad is not None
    close(weight.grad / scale, mean / (mean.norm() + 1e-6), STEPPED)  # as torch clips
