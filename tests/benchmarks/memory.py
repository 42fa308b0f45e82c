"""How much memory surgery takes: what PyTorch allocates on a CPU, beside what `memory_estimate` names."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import gradsurgery as gs
from tests.benchmarks import limit
from tests.benchmarks.growth import backends
from tests.benchmarks.telling import progress, table

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler announces every start; `keep_heap` starts anew with it


def peaks(backward: Callable[[], None], step: Callable[[], None]) -> dict[str, int]:
    """Largest sum of live allocations on the CPU in three rounds, while backward passes run and while a step is made."""
    gc.collect()  # what is freed inside must have been allocated inside
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(3):
            backward()
            with record_function("the step"):
                step()
    profiler: Any = recorded.profiler
    events = profiler.kineto_results.events()
    steps = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "the step"]
    live, found = 0, {"backward": 0, "step": 0}
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        phase = "step" if any(start <= event.start_ns() <= end for start, end in steps) else "backward"
        found[phase] = max(found[phase], live, live + event.nbytes())
        live += event.nbytes()
    return found


class Extra(NamedTuple):
    """Bytes of a surgery pass over ready rows, in a steady state.

    Attributes:
        allocated: Largest sum of live allocations of the pass itself.
        named: What of it `memory_estimate` names.
        copy: Of one gradient copy.
    """

    allocated: int
    named: int
    copy: int

    @property
    def copies(self) -> float:
        """What it does not name, in gradient copies."""
        return (self.allocated - self.named) / self.copy


def extra(rows: Sequence[Sequence[Tensor]], choice: Any, **options: Any) -> Extra:
    """What a step of `GradientSurgery` with ready gradients allocates, over plain SGD, whose own step allocates nothing.

    Args:
        rows: One for each objective; the first is overwritten.
        choice: The backend.
        options: Of the optimizer.
    """
    weights = [nn.Parameter(torch.zeros_like(tensor)) for tensor in rows[0]]
    objectives = ("forget", *(f"protected {number}" for number in range(1, len(rows))))
    optimizer = gs.GradientSurgery(torch.optim.SGD(weights, lr=1e-9), objectives=objectives, **options)

    def capture() -> None:
        for name, row in zip(reversed(objectives), reversed(rows), strict=True):
            with optimizer.objective(name):
                for weight, gradient in zip(weights, row, strict=True):
                    weight.grad = gradient

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    with gs.gram.backend(choice):
        for _ in range(2):  # averages are made
            capture()
            step()
        averages = sum(
            value.nbytes
            for state in optimizer.state_dict()["state"].values()
            for key, value in state.items()
            if key.startswith("gradsurgery_ema_")
        )
        found = peaks(capture, step)
    copy = sum(tensor.nbytes for tensor in rows[0])
    named = optimizer.memory_estimate() - (len(rows) - 1) * copy - averages
    return Extra(max(found.values()), named, copy)


def pass_table(small: bool) -> None:
    """Beyond the estimate, list by list; chunks are of one size, so that what they take shows in small lists."""
    variants: dict[str, dict[str, Any]] = {"gru": {}, "gru, ema": {"ema_decay": 0.2}}
    columns: dict[str, dict[str, str]] = {name: {} for name in limit.LISTS}
    for name, (dtype, adapters) in limit.LISTS.items():
        progress(f"memory, {name}")
        for choice in backends():
            for variant, options in variants.items():
                found = extra(limit.filled(limit.shapes(adapters, small), 2, dtype), choice, **options)
                beyond = (found.allocated - found.named) / 2**20
                columns[name][f"{choice}, {variant}"] = f"{found.copies:.3f} ({beyond:.2f} MiB)"
    print(f"\nAllocated by a pass over ready rows beyond memory_estimate().\n\n{table('gradient copies', columns)}")
