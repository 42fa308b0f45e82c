"""Loss scaling and autocast. Scales are powers of two, so a scaled run must be the unscaled one bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.problems import BASES, FOUR, TWO, Losses, assert_same, classification, contexts, joined, mlp, snapshot, taken
from tests.reference import training
from tests.tolerances import COMBINED, GRAM, close

pytestmark = pytest.mark.supports(
    "GradScaler and autocast",
    "a scale that grows, overflows, `unscale_` and clipping, fused bases, bf16 autocast and parameters",
)

STEPS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema": {"ema_decay": 0.7},
    "several, tensor": {"objectives": FOUR, "scope": "tensor", "ema_decay": {"retain": 0.5, "style": 0.9}},
    "add, max_norm": {"add": {"retain": 0.5}, "ema_decay": 0.5, "max_norm": 0.2},
    "guard": {"guard": "update", "ema_decay": 0.5},
    "metric": {"metric": "optimizer", "ema_decay": 0.5},
    "not homogeneous": {"rule": lambda gram: torch.stack([gram[0, 0], gram[1, 1]]), "ema_decay": 0.5},
}


def surgeon(model: nn.Module, base: str = "AdamW", **options: Any) -> gs.GradientSurgery:
    return gs.GradientSurgery(BASES[base](model.parameters()), **options)


def scaled(
    model: nn.Module,
    optimizer: gs.GradientSurgery,
    scaler: torch.amp.GradScaler,
    losses: Losses,
    step: int,
    *,
    front_end: str,
    micro_batches: int = 1,
    clip: float | None = None,
    zero: str = "optimizer",
) -> None:
    """One step under a GradScaler, in its documented order."""
    for micro in range(micro_batches):
        found = losses(model, step, micro)
        if front_end == "join":
            scaler.scale(optimizer.join(**found) / micro_batches).backward()
        else:
            for name, loss in found.items():
                with optimizer.objective(name):
                    scaler.scale(loss / micro_batches).backward()
    if front_end == "contexts":
        optimizer.combine(scale=scaler.get_scale())
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad() if zero == "optimizer" else model.zero_grad()


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("front_end", ["contexts", "join"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_scale_that_grows_changes_nothing(name: str, front_end: str, micro_batches: int) -> None:
    options = {**OPTIONS[name], "accumulate": micro_batches > 1 and front_end == "join"}
    losses = classification(options.get("objectives", TWO))
    model, plain = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    optimizer, reference = surgeon(model, **options), surgeon(plain, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    for step in range(STEPS):
        scaled(model, optimizer, scaler, losses, step, front_end=front_end, micro_batches=micro_batches)
        run = joined if front_end == "join" else contexts
        run(plain, reference, losses, [step], micro_batches=micro_batches)
        assert torch.equal(taken(optimizer).gram, taken(reference).gram)
        assert torch.equal(taken(optimizer).coefficients, taken(reference).coefficients)
        assert torch.equal(taken(optimizer).predicted_change, taken(reference).predicted_change)
        assert torch.equal(taken(optimizer).update_norm, taken(reference).update_norm)
    assert scaler.get_scale() == 2.0 ** (8 + STEPS // 2)
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))


def test_the_scale_must_be_known_to_average_over_steps() -> None:
    """Without the scale, a growing scale shows in the average; otherwise the test above would mean nothing."""
    trained = []
    for known in (True, False):
        model = mlp(dtype=torch.float32)
        optimizer = surgeon(model, ema_decay=0.7)
        for step in range(STEPS):
            scale = 2.0**step
            for name, loss in classification()(model, step, 0).items():
                with optimizer.objective(name):
                    (loss * scale).backward()
            optimizer.combine(scale=torch.tensor(scale) if known else None)
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= scale
            optimizer.step()
            optimizer.zero_grad()
        trained.append(optimizer.state_dict()["state"][0]["gradsurgery_ema_retain"])
    plain = mlp(dtype=torch.float32)
    reference = surgeon(plain, ema_decay=0.7)
    contexts(plain, reference, classification(), range(STEPS))
    expected = reference.state_dict()["state"][0]["gradsurgery_ema_retain"]
    assert torch.equal(trained[0], expected)
    assert not torch.allclose(trained[1], expected, rtol=0.1)


def with_overflow(objective: str) -> Losses:
    """As `classification`, with an infinite gradient of one objective in one weight at step 3."""

    def losses(model: nn.Module, step: int, micro: int) -> dict[str, Tensor]:
        found = classification()(model, step, micro)
        if step == 3:
            found[objective] = found[objective] + torch.inf * next(model.parameters())[0, 0]
        return found

    return losses


@pytest.mark.parametrize("zero", ["optimizer", "model"])
@pytest.mark.parametrize("front_end", ["contexts", "join"])
@pytest.mark.parametrize(
    "options", [{"ema_decay": 0.7}, {"rule": "sum"}, {"ema_decay": 0.7, "accumulate": True, "scope": "tensor"}]
)
@pytest.mark.parametrize("objective", TWO)
def test_an_overflow_skips_the_step_and_halves_the_scale(
    objective: str, options: dict[str, Any], front_end: str, zero: str
) -> None:
    losses = with_overflow(objective)
    model, plain = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    optimizer, reference = surgeon(model, **options), surgeon(plain, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    for step in range(STEPS):
        before = snapshot(model, optimizer)
        scaled(model, optimizer, scaler, losses, step, front_end=front_end, zero=zero)
        assert scaler.get_scale() == 2.0 ** (8 if step < 3 else 7)
        assert optimizer.record is not None
        assert optimizer.record.applied == (step != 3)
        if step == 3:
            assert_same(snapshot(model, optimizer), before)
            assert not optimizer.record.gram.isfinite().all()
    contexts(plain, reference, losses, [0, 1, 2, *range(4, STEPS)])
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))


@pytest.mark.parametrize("front_end", ["contexts", "join"])
def test_clipping_after_unscale_clips_the_unscaled_update(front_end: str) -> None:
    losses = classification()
    model, plain = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    optimizer, reference = surgeon(model, "momentum", ema_decay=0.7), surgeon(plain, "momentum", ema_decay=0.7)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    for step in range(STEPS):
        scaled(model, optimizer, scaler, losses, step, front_end=front_end, clip=0.1)
        reference.join(**losses(plain, step, 0)).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        assert norm > 0.1
        reference.step()
        reference.zero_grad()
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))


def test_a_fused_base_is_scaled_like_any_other() -> None:
    """The base's flag that it unscales by itself must not reach the scaler, which would then leave the update scaled."""
    losses = classification()
    model, plain = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    base = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    assert base._step_supports_amp_scaling
    optimizer = gs.GRU(base)
    reference = gs.GRU(torch.optim.AdamW(plain.parameters(), lr=0.02, fused=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    for step in range(STEPS):
        scaled(model, optimizer, scaler, losses, step, front_end="join")
        joined(plain, reference, losses, [step])
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))


@pytest.mark.parametrize("front_end", ["contexts", "join"])
def test_bf16_autocast_measures_and_combines_the_rows_of_autocast(front_end: str) -> None:
    losses = classification()
    model = mlp(dtype=torch.float32)
    parameters = list(model.parameters())
    optimizer = surgeon(model, "SGD")
    conflicts = set()
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            found = losses(model, step, 0)
            rows = [training.flat(training.gradient(found[name], parameters), parameters) for name in TWO]
            found = losses(model, step, 0)
        gram = torch.stack(rows) @ torch.stack(rows).T
        update = training.rectified(rows[0], torch.stack(rows[1:]), torch.ones_like(rows[0]))
        if front_end == "join":
            optimizer.join(**found).backward()
        else:
            for name, loss in found.items():
                with optimizer.objective(name):
                    loss.backward()
        record = optimizer.combine()
        combined = training.flat([parameter.grad for parameter in parameters], parameters)
        close(record.gram, gram, GRAM[torch.float32], scale=gram.abs().max())
        close(combined, update, COMBINED[torch.float32], scale=update.abs().max())
        conflicts.add(record.conflict)
        optimizer.step()
        optimizer.zero_grad()
    assert conflicts == {True, False}


def test_bf16_parameters_are_measured_in_float32_and_rounded_once() -> None:
    losses = classification()
    model = mlp(dtype=torch.bfloat16)
    parameters = list(model.parameters())
    optimizer = surgeon(model, "SGD")
    for step in range(STEPS):
        found = losses(model, step, 0)
        rows = [training.flat(training.gradient(found[name], parameters), parameters) for name in TWO]
        gram = torch.stack(rows) @ torch.stack(rows).T
        update = training.rectified(rows[0], torch.stack(rows[1:]), torch.ones_like(rows[0]))
        optimizer.join(**losses(model, step, 0)).backward()
        combined = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        assert combined.dtype == torch.bfloat16
        close(taken_or_not(optimizer).gram, gram, GRAM[torch.bfloat16], scale=gram.abs().max())
        size = (rows[0].abs() + rows[1].abs() * taken_or_not(optimizer).coefficients[1].abs()).clamp_min(1e-30)
        close(combined.double(), update, COMBINED[torch.bfloat16], scale=size)
        optimizer.step()
        optimizer.zero_grad()


def taken_or_not(optimizer: gs.GradientSurgery) -> gs.Record:
    assert optimizer.record is not None
    return optimizer.record
