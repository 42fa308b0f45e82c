"""Training with `join(features=...)` is training with whole backward passes: options, graphs, memory, and two processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gradsurgery as gs
from tests.gradsurgery.optimizer import distributed_workers as workers
from tests.gradsurgery.optimizer.distributed_workers import run
from tests.gradsurgery.optimizer.test_trunk import MODES, shared
from tests.problems import BASES, FOUR, TWO, assert_same, batch, mlp, snapshot, values
from tests.reference import training
from tests.tolerances import STEPPED, close


def train(
    options: dict[str, Any], *, scaler: bool = False, autocast: bool = False
) -> tuple[nn.Module, gs.GradientSurgery]:
    """Three steps of two micro-batches, with averages and the guard."""
    model = mlp()
    optimizer = gs.GradientSurgery(
        torch.optim.AdamW(model.parameters(), lr=0.02), "gem", FOUR, ema_decay=0.5, guard="update", accumulate=True
    )
    scaling = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaler)
    for step in range(3):
        for micro in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden, losses = shared(model, step, micro)
            given: dict[str, Any] = options if "retain_graph" in options else {"features": hidden, **options}
            scaling.scale(optimizer.join(**losses, **given) / 2).backward()
        scaling.step(optimizer)
        scaling.update()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("setting", [{}, {"scaler": True}, {"scaler": True, "autocast": True}], ids=str)
def test_training_is_that_of_whole_backward_passes(setting: dict[str, bool]) -> None:
    """Bit for bit one after another; micro-batches, averages, the guard, a loss scale and autocast."""
    expected = train({"retain_graph": True}, **setting)
    assert_same(snapshot(*train({}, **setting)), snapshot(*expected))
    batched, _ = train({"batched": True}, **setting)
    if setting.get("autocast"):
        assert (values(batched) - values(expected[0])).abs().max() < 1e-3  # products in bfloat16, in another order
    else:
        close(values(batched), values(expected[0]), STEPPED)


@pytest.mark.parametrize("mode", MODES)
def test_the_head_is_freed_before_the_trunk_and_the_trunk_with_the_last_row(mode: str) -> None:
    model = mlp()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    hidden, losses = shared(model, 0, 0, TWO)
    freed: list[bool] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return tensor.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            for loss in losses.values():
                with pytest.raises(RuntimeError, match="second time"):
                    torch.autograd.grad(loss, list(model[2].parameters()), retain_graph=True)
                freed.append(True)
            return gradients[0]

    if mode == "one after another":  # a function of one's own takes no batches
        hidden = model[1](Watch.apply(model[0](batch(0, 0)[0])))
        losses.update({name: (model[2](hidden) * k).square().sum() for k, name in enumerate(TWO, 1)})
    optimizer.join(features=hidden, **losses, **MODES[mode]).backward()
    assert len(freed) == (4 if mode == "one after another" else 0)
    for tensor in (hidden.sum(), *losses.values()):
        with pytest.raises(RuntimeError, match="second time"):
            tensor.backward()


def test_a_loss_at_moved_weights_beside_losses_that_share_features() -> None:
    found = []
    for options in ({"retain_graph": True}, {}, {"batched": True}):
        model = mlp()
        optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), "gem", FOUR)
        hidden, losses = shared(model, 0, 0)

        def loss(model: nn.Sequential = model) -> Tensor:
            return shared(model, 1, 0)[1]["forget"]

        moved = gs.Perturbed(loss=loss, direction=loss, at=optimizer.perturbed(radius=0.5))
        given: dict[str, Any] = options if "retain_graph" in options else {"features": hidden, **options}
        optimizer.join(**{**losses, "forget": moved}, **given).backward()
        optimizer.step()
        found.append(values(model))
    assert torch.equal(found[1], found[0])
    close(found[2], found[0], STEPPED)


class Looking(torch.autograd.Function):
    """An operation whose backward pass looks at its numbers."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return 2.0 * tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2.0 * gradients[0] if bool(gradients[0].isfinite().all()) else gradients[0]


TRUNKS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    "checkpoint": (lambda trunk, inputs: checkpoint(trunk, inputs, use_reentrant=False), True),
    "reentrant checkpoint": (
        lambda trunk, inputs: checkpoint(trunk, inputs.clone().requires_grad_(), use_reentrant=True),
        False,
    ),
    "own operation": (lambda trunk, inputs: Looking.apply(trunk(inputs)), False),
}
"""How the trunk is run, and whether its backward pass takes several cotangents at once."""


@pytest.mark.parametrize("name", TRUNKS)
def test_trunks_that_take_one_cotangent_only(name: str) -> None:
    """One after another every trunk is exact. Batched it is, or the sentence says what to do, and zero_grad recovers."""
    through, takes_several = TRUNKS[name]
    found: dict[str, Tensor] = {}
    for mode, options in ({"whole": {"retain_graph": True}} | MODES).items():
        model = mlp()
        optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
        hidden = through(model[:2], batch(0, 0)[0])
        losses = {name: (model[2](hidden) - k).square().sum() for k, name in enumerate(TWO)}
        given: dict[str, Any] = options if mode == "whole" else {"features": hidden, **options}
        joint = optimizer.join(**losses, **given)
        if mode == "batched" and not takes_several:
            with pytest.raises(RuntimeError, match=r"several cotangents at once \(torch.vmap\).*leave batched out"):
                joint.backward()
            assert all(parameter.grad is None for parameter in model.parameters())
            optimizer.zero_grad()
            hidden, losses = shared(model, 0, 0, TWO)
            optimizer.join(features=hidden, batched=True, **losses).backward()
            continue
        joint.backward()
        optimizer.step()
        found[mode] = values(model)
    assert torch.equal(found["one after another"], found["whole"])
    if takes_several:
        close(found["batched"], found["whole"], STEPPED)


def two_ranks(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Whole backward passes, which DDP and FSDP2 reduce; batched is refused on every rank before anything is computed."""
    model, plain = mlp(), mlp()
    wrapped = wrap(model)
    optimizer = workers.surgeon(model)
    reference = training.Surgery(plain, BASES["AdamW"](plain.parameters()), TWO)

    def forward(module: nn.Module, step: int, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = module(batch(0, step, rank)[0])
        return outputs, {"forget": -outputs[:2].square().mean(), "retain": outputs[2:].exp().mean()}

    for step in range(2):
        outputs, losses = forward(wrapped, step, rank)
        with workers.raises_everywhere("found gradients that DDP or FSDP2 reduces.*leave batched out"):
            optimizer.join(features=outputs, batched=True, **losses)
        optimizer.join(features=outputs, **losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step([forward(plain, step, share)[1] for share in range(workers.WORLD)])
        close(workers.gathered(model), values(plain), STEPPED)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_ddp_and_fsdp2_are_the_single_process_run() -> None:
    run(workers.each, two_ranks, {"DDP": (DistributedDataParallel,), "FSDP2": (fully_shard,)})
