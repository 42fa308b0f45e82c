"""Rows at moved weights on two processes: DDP and FSDP2 take the steps of one process, with both front ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gradsurgery as gs
from tests.gradsurgery.optimizer.distributed_workers import WORLD, run
from tests.problems import BASES, batch, mlp
from tests.reference import training
from tests.reference.perturbation import as_loss, gradient_at_moved_weights
from tests.tolerances import STEPPED, close

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.supports("Rows at moved weights", "DDP, FSDP2"),
]
STEPS, RADIUS = 4, 0.3


def loss_of(index: int, step: int, rank: int, sign: float = 1.0) -> Callable[[nn.Module], Tensor]:
    def loss(model: nn.Module) -> Tensor:
        inputs, labels = batch(index, step, rank)
        return sign * nn.functional.cross_entropy(model(inputs), labels)

    return loss


def of_all(index: int, step: int, sign: float = 1.0) -> Callable[[nn.Module], Tensor]:
    return lambda model: torch.stack([loss_of(index, step, rank, sign)(model) for rank in range(WORLD)]).mean()


def whole(model: nn.Module) -> Tensor:
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


def scenario(rank: int, wrapper: str, front_end: str, scale: str) -> None:
    model = mlp()
    if wrapper == "fsdp2":
        for layer in (model[0], model[2]):
            fully_shard(layer)
        called: nn.Module = fully_shard(model)
    else:
        called = DistributedDataParallel(model, gradient_as_bucket_view=wrapper == "bucket view")
    optimizer = gs.GradientSurgery(BASES["AdamW"](model.parameters()), guard="update")
    at = optimizer.perturbed(RADIUS, scale=scale)  # pyright: ignore[reportArgumentType]
    plain = mlp()
    oracle = training.Surgery(plain, BASES["AdamW"](plain.parameters()), ("forget", "retain"), guard=True)
    for step in range(STEPS):
        forget, retain, remember = loss_of(0, step, rank, -1.0), loss_of(1, step, rank), loss_of(2, step, rank)
        if front_end == "contexts":
            with optimizer.objective("retain"):
                retain(called).backward()
            with at.direction():
                remember(called).backward()
            with optimizer.objective("forget", at=at):
                forget(called).backward()
        else:
            perturbed = gs.Perturbed(lambda: forget(called), lambda: remember(called), at)  # noqa: B023
            optimizer.join(forget=perturbed, retain=retain(called)).backward()
        optimizer.step()
        optimizer.zero_grad()
        row = gradient_at_moved_weights(plain, of_all(0, step, -1.0), of_all(2, step), RADIUS, scale)
        oracle.step([{"forget": as_loss(plain, row), "retain": of_all(1, step)(plain)}])
        close(whole(model), whole(plain), STEPPED)


@pytest.mark.parametrize("front_end", ["contexts", "join"])
@pytest.mark.parametrize("scale", ["global", "tensor"])
@pytest.mark.parametrize("wrapper", ["ddp", "bucket view", "fsdp2"])
def test_two_processes_take_the_steps_of_one(wrapper: str, front_end: str, scale: str) -> None:
    run(scenario, wrapper, front_end, scale)
