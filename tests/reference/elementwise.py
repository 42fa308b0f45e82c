"""Oracles of the elementwise rules, from the papers' formulas: loops over coordinates in Python's own numbers, and a training loop."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.reference.training import flat, gradient


def sago(row: Sequence[float], *, gamma: float = 1.0, alpha: float = 1.0) -> float:
    forget, retain = row[0], math.fsum(row[1:])
    opposite = (forget < 0.0 < retain) or (retain < 0.0 < forget)
    return alpha * retain if opposite else gamma * forget


def sign_agreement(row: Sequence[float]) -> float:
    """All positive, or all negative; where all are zero so is the mean."""
    agree = all(x > 0.0 for x in row) or all(x < 0.0 for x in row)
    return statistics.fmean(row) if agree else 0.0


def cglearn(row: Sequence[float], *, tau: float) -> float:
    mean, deviation = statistics.fmean(row), statistics.stdev(row)
    return mean if abs(mean) > tau * deviation else 0.0


def graddrop_choices(row: Sequence[float]) -> tuple[float, float, float]:
    """The probability of keeping the positive entries, their sum, and the negative entries' sum."""
    positive, negative = math.fsum(x for x in row if x > 0.0), math.fsum(x for x in row if x < 0.0)
    size = math.fsum(abs(x) for x in row)
    return (0.5 * (1.0 + math.fsum(row) / size) if size else 0.5), positive, negative


def saliency_mask(forget: Sequence[float], *, quantile: float) -> list[float]:
    threshold = sorted(abs(x) for x in forget)[math.floor(quantile * len(forget))]
    return [x if abs(x) >= threshold else 0.0 for x in forget]


def everywhere(rule: Callable[..., float], rows: Sequence[Sequence[float]], **options: float) -> list[float]:
    """The rule at each coordinate of K flat rows."""
    return [rule(coordinate, **options) for coordinate in zip(*rows, strict=True)]


@dataclass
class Training:
    """A model trained with an elementwise rule: rows flattened in float64, the rule as a loop, the base a plain optimizer.

    Attributes:
        rule: A coordinate's K numbers -> its update.
        ema_decay: Of the protected rows.
        add: Multiple of the second objective's current row.
    """

    model: nn.Module
    base: torch.optim.Optimizer
    rule: Callable[[Sequence[float]], float]
    ema_decay: float | None = None
    add: float = 0.0
    max_norm: float | None = None
    averages: dict[int, Tensor] = field(default_factory=dict)
    steps: int = 0

    def step(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """One step; returns the rows seen ``[K, n]``, the update and the parameter change, flattened."""
        parameters = list(self.model.parameters())
        rows = []
        for name in micro_batches[0]:
            total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
            for losses in micro_batches:
                total += flat(gradient(losses[name] / len(micro_batches), parameters), parameters)
            rows.append(total)
        current = rows[1]
        self.steps += 1
        if self.ema_decay is not None:
            for k in range(1, len(rows)):
                old = self.averages.get(k, torch.zeros_like(rows[k]))
                self.averages[k] = self.ema_decay * old + (1.0 - self.ema_decay) * rows[k]
                rows[k] = self.averages[k] / (1.0 - self.ema_decay**self.steps)
        combined = everywhere(self.rule, [row.tolist() for row in rows])
        update = torch.tensor(combined, dtype=torch.float64) + self.add * current
        if self.max_norm is not None:
            update *= min(1.0, self.max_norm / (float(update.norm()) + 1e-6))
        start = 0
        for parameter in parameters:
            part = update[start : start + parameter.numel()]
            parameter.grad = part.view_as(parameter).to(parameter)
            start += parameter.numel()
        before = flat([p.detach() for p in parameters], parameters)
        self.base.step()
        self.base.zero_grad()
        return torch.stack(rows), update, flat([p.detach() for p in parameters], parameters) - before
