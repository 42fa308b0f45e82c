"""Tiny problems that the tests of the optimizer share: a model, its losses of every step, and the loops that train it with surgery.

A loss of objective k at (step, micro-batch) is the same number on every call, so that two loops can be compared step by step. In float64
every comparison is sharp. The forget losses ascend, so that some steps conflict and some do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradsurgery import GradientSurgery
from gradsurgery.optimizer.record import Record

Losses: TypeAlias = Callable[[nn.Module, int, int], dict[str, Tensor]]
"""(model, step, micro-batch) -> a loss for each objective."""

TWO = ("forget", "retain")
FOUR = ("forget", "retain", "utility", "style")

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.02),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
}
"""Every optimizer of torch.optim that steps without a closure, SGD also with momentum."""


def mlp(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """43 parameters in 4 tensors."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batch(objective: int, step: int, micro: int = 0, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Four inputs and their classes."""
    generator = torch.Generator().manual_seed(10_000 * objective + 100 * step + micro)
    inputs = torch.randn(4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(0, 3, (4,), generator=generator)


def classification(objectives: Sequence[str] = TWO) -> Losses:
    """Cross-entropy on random classes, negative for the first objective."""

    def losses(model: nn.Module, step: int, micro: int) -> dict[str, Tensor]:
        dtype = next(model.parameters()).dtype
        found = {}
        for index, name in enumerate(objectives):
            inputs, labels = batch(index, step, micro, dtype=dtype)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            found[name] = -loss if index == 0 else loss
        return found

    return losses


def contexts(
    model: nn.Module,
    optimizer: GradientSurgery,
    losses: Losses,
    steps: Iterable[int],
    *,
    micro_batches: int = 1,
    after_step: Callable[[int, Record], Any] = lambda step, record: None,
) -> None:
    """Train with the context front end; the loss of a step is the mean over its micro-batches."""
    for step in steps:
        for micro in range(micro_batches):
            for name, loss in losses(model, step, micro).items():
                with optimizer.objective(name):
                    (loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(step, taken(optimizer))


def joined(
    model: nn.Module,
    optimizer: GradientSurgery,
    losses: Losses,
    steps: Iterable[int],
    *,
    micro_batches: int = 1,
    after_step: Callable[[int, Record], Any] = lambda step, record: None,
) -> None:
    """As `contexts` through one scalar a micro-batch."""
    for step in steps:
        for micro in range(micro_batches):
            (optimizer.join(**losses(model, step, micro)) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(step, taken(optimizer))


FRONT_ENDS = {"contexts": contexts, "join": joined}


def taken(optimizer: GradientSurgery) -> Record:
    """The record of a step that happened."""
    record = optimizer.record
    assert record is not None
    assert record.applied
    return record


def values(model: nn.Module | Iterable[Tensor]) -> Tensor:
    """All parameters in one vector."""
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def snapshot(model: nn.Module, optimizer: GradientSurgery) -> list[tuple[str, Tensor]]:
    """Everything that a refused call must leave alone: parameters, gradients, base state and averages, copied."""
    found: list[tuple[str, Tensor]] = []

    def collect(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found.append((path, value.detach().clone()))
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                collect(f"{path}.{key}", entry)
        elif isinstance(value, (int, float)):
            found.append((path, torch.tensor(value, dtype=torch.float64)))

    state_dict = optimizer.state_dict()
    collect("state", state_dict["state"])
    collect(
        "group", {i: {k: v for k, v in g.items() if k != "params"} for i, g in enumerate(state_dict["param_groups"])}
    )
    for name, parameter in model.named_parameters():
        collect(name, parameter)
        if parameter.grad is not None and not parameter.grad.is_sparse:
            collect(f"{name}.grad", parameter.grad)
    return found


def assert_same(found: Sequence[tuple[str, Tensor]], expected: Sequence[tuple[str, Tensor]]) -> None:
    """Bit for bit, NaN equal to NaN."""
    ours, theirs = dict(found), dict(expected)
    assert ours.keys() == theirs.keys(), f"only in one: {sorted(ours.keys() ^ theirs.keys())}"
    differing = [
        path for path, value in ours.items() if value.dtype != theirs[path].dtype or not equal(value, theirs[path])
    ]
    assert not differing, f"changed: {differing}"


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
