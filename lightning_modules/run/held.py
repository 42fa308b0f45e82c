"""What a training holds in memory, in which type and in how many bytes, known from shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import gradsurgery as gs
from lightning_modules.ledger.request import ROW, row_counts
from lightning_modules.run.assembly import kind_of_start_model
from lightning_modules.run.memory import bytes_of, free, gigabytes
from lightning_modules.run.options import TrainingOptions, UnlearnOptions


class Held(NamedTuple):
    """A part of the memory.

    Attributes:
        what: Its name, with the type of its numbers.
        bytes: On each device; None where it is not known before it is there.
    """

    what: str
    bytes: int | None


def held_by_unlearning(model: nn.Module, options: UnlearnOptions) -> list[Held]:
    """What each device holds while a model is unlearned, activations aside.

    Args:
        model: With its adapters, on any device, also on the meta device.
        options: Resolved.
    """
    training, method = options.training, options.method
    trained = _shapes(model)
    base = training.base_optimizer(1.0)(trained)  # a learning rate takes no memory, and may not be known yet
    rows, sketches = row_counts(options.ledger.ledger, options.ledger.ledger_rows)
    names = ("forget",) if method.alone else ("forget", "retain", *map(ROW.format, range(rows)))
    make: Any = method.surgery(max_norm=training.max_norm, accumulate=training.accumulates)
    surgery = partial(make, objectives=names)(base)
    parts = _of_training(model, trained, base, training.optimizer)
    parts.append(
        Held(f"surgery's further rows and averages ({_types(trained)}, averages float32)", surgery.memory_estimate())
    )
    if sketches:
        parts.append(Held(f"{sketches} sketches of earlier requests, as dense gradients", sketches * _bytes(trained)))
    if method.radius:
        parts.append(Held("weights before they are moved for the forget row", _bytes(trained)))
    if method.retain_anchor:
        parts.append(Held("the anchor, at most", gs.LayerAnchor(model, method.retain_anchor).memory_estimate()))
    for needed, what in (
        (kind_of_start_model(options) == "copy", "the losses compare"),
        (options.finish.finish_steps and not training.adapters_start_at_zero, "the finish compares"),
    ):
        if needed:
            parts.append(Held(f"a copy of the model before unlearning, with which {what}", bytes_of(model)))
    if method.teacher is not None:
        parts.append(Held("the teacher", bytes_of(model)))
    return [Held(what, None if count is None else count // _shards(training)) for what, count in parts]


def held_by_teaching(model: nn.Module) -> list[Held]:
    """As `held_by_unlearning`, while a model is taught, which AdamW does."""
    trained = _shapes(model)
    return _of_training(model, trained, torch.optim.AdamW(trained), "AdamW")


def lines(parts: Sequence[Held]) -> list[str]:
    """A line for each part, their sum, and what it leaves free; a warning where that is less than nothing."""
    total = sum(part.bytes or 0 for part in parts)
    found = [f"  {gigabytes(part.bytes) if part.bytes is not None else 'not known':>10}  {part.what}" for part in parts]
    place, there = list(free().items())[-1]
    found.append(
        f"  {gigabytes(total):>10}  in all, of {gigabytes(there)} that are free on {place}; activations, which grow with --batch-size and "
        "--max-length, and what autocast keeps come on top"
    )
    if total > there:
        found.append(
            f"Warning: expected a training that fits into the memory of {place}, {gigabytes(there)} of which is free, found "
            f"{gigabytes(total)}: train adapters (--lora-rank 8), with --dtype bfloat16 below them, or shard it (--strategy fsdp2)"
        )
    return found


def _of_training(
    model: nn.Module, trained: list[tuple[str, nn.Parameter]], base: torch.optim.Optimizer, name: str
) -> list[Held]:
    frozen = bytes_of(model) - bytes_of(model, trained=True)
    parts = [Held(f"weights that are trained ({_types(trained)}, {_count(trained):,} numbers)", _bytes(trained))]
    if frozen:
        fixed = [(key, weight) for key, weight in model.named_parameters() if not weight.requires_grad]
        parts.insert(0, Held(f"weights that stay ({_types(fixed)}, {_count(fixed):,} numbers)", frozen))
    return [
        *parts,
        Held(f"their gradient ({_types(trained)})", _bytes(trained)),
        Held(f"the state of {name} ({_types(trained)})", _state(base, trained)),
    ]


def _shapes(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trained weights by name, without numbers."""
    return [
        (name, nn.Parameter(torch.empty_like(weight, device="meta")))
        for name, weight in model.named_parameters()
        if weight.requires_grad
    ]


def _state(base: torch.optim.Optimizer, trained: list[tuple[str, nn.Parameter]]) -> int | None:
    """Bytes of an optimizer's state, made in its first step; None if it cannot step weights without numbers."""
    for _, weight in trained:
        weight.grad = torch.empty_like(weight)
    step: Callable[[], Any] = base.step
    try:
        step()
    except RuntimeError:  # Adafactor and ASGD read a number
        return None
    tensors = (value for state in base.state.values() for value in state.values() if isinstance(value, torch.Tensor))
    return sum(value.numel() * value.element_size() for value in tensors)


def _bytes(named: Sequence[tuple[str, nn.Parameter]]) -> int:
    return sum(weight.numel() * weight.element_size() for _, weight in named)


def _count(named: Sequence[tuple[str, nn.Parameter]]) -> int:
    return sum(weight.numel() for _, weight in named)


def _types(named: Sequence[tuple[str, nn.Parameter]]) -> str:
    kinds = Counter(str(weight.dtype).removeprefix("torch.") for _, weight in named)
    return " and ".join(kinds)


def _shards(training: TrainingOptions) -> int:
    return training.processes if training.sharded else 1
