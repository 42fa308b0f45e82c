"""Oracles of the probes and of the choice of a checkpoint: loops that follow the definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A matrix rounded to nearest, one number at a time, to one of the 2^bits - 1 levels of its row."""
    result = weight.clone().double()
    for row in result:
        largest = max(abs(float(value)) for value in row)
        if largest == 0.0:
            continue
        levels = [level * largest / (2 ** (bits - 1) - 1) for level in range(1 - 2 ** (bits - 1), 2 ** (bits - 1))]
        for index, value in enumerate(row.tolist()):
            row[index] = min(levels, key=lambda level: abs(level - value))
    return result


def best(points: Sequence[Mapping[str, float]], target: float) -> Mapping[str, float] | None:
    """The best trade-off by its definition, chosen from all points at once."""
    known = [point for point in points if not (math.isnan(point["forget"]) or math.isnan(point["retain"]))]
    enough = [point for point in known if point["forget"] < target]
    if enough:
        return next(point for point in enough if point["retain"] == max(each["retain"] for each in enough))
    if known:
        return next(point for point in known if point["forget"] == min(each["forget"] for each in known))
    return None


def probability(table: Tensor, tokens: Sequence[int], labels: Sequence[int]) -> float:
    """exp of the mean log-probability of the labelled tokens of a bigram model."""
    logs = [
        float(torch.log_softmax(table[tokens[at - 1]].double(), 0)[labels[at]])
        for at in range(1, len(tokens))
        if labels[at] != -100
    ]
    return math.exp(sum(logs) / len(logs))


def relearned(table: Tensor, taught: Sequence[tuple[list[int], list[int]]], steps: int, lr: float) -> Tensor:
    """A bigram model after so many AdamW steps on all of the taught answers at once."""
    weight = nn.Parameter(table.detach().clone())
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        terms = [
            -torch.log_softmax(weight[tokens[at - 1]], 0)[labels[at]]
            for tokens, labels in taught
            for at in range(1, len(tokens))
            if labels[at] != -100
        ]
        optimizer.zero_grad()
        torch.stack(terms).mean().backward()
        optimizer.step()
    return weight.detach()
