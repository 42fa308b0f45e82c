"""Losses of rows, sequences and hidden states as their papers write them, one row at a time: slow, obvious, float64 or 250 digits."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import mpmath
import torch
from torch import Tensor

DIGITS = 250


def softmax(logits: Sequence[float]) -> list[mpmath.mpf]:
    exponentials = [mpmath.exp(mpmath.mpf(value)) for value in logits]
    total = mpmath.fsum(exponentials)
    return [value / total for value in exponentials]


def lowered(reference: Sequence[float], label: int, beta: float) -> list[mpmath.mpf]:
    return [mpmath.mpf(value) - (beta if i == label else 0) for i, value in enumerate(reference)]


def exact(name: str, logits: list[float], reference: list[float], label: int, beta: float) -> tuple[float, list[float]]:
    """Value and gradient row with 250 digits."""
    return _exact(name, tuple(logits), tuple(reference), label, beta)


@functools.cache  # every path of the code under test is compared with the same digits
def _exact(
    name: str, logits: Sequence[float], reference: Sequence[float], label: int, beta: float
) -> tuple[float, list[float]]:
    with mpmath.workdps(DIGITS):
        if name == "logit_margin":
            z = [mpmath.mpf(value) for value in logits]
            margin = max(z) - mpmath.fsum(z) / len(z)
            row = [2 * margin * ((i == z.index(max(z))) - mpmath.mpf(1) / len(z)) for i in range(len(z))]
            return float(margin**2), [float(entry) for entry in row]
        p = softmax(logits)
        if name == "jensen_shannon":
            q = softmax(reference)
            ratios = [mpmath.log(2 * a / (a + b)) for a, b in zip(p, q, strict=True)]
            mine = mpmath.fsum(a * ratio for a, ratio in zip(p, ratios, strict=True))
            theirs = mpmath.fsum(b * mpmath.log(2 * b / (a + b)) for a, b in zip(p, q, strict=True))
            return float((mine + theirs) / 2), [
                float(a * (ratio - mine) / 2) for a, ratio in zip(p, ratios, strict=True)
            ]
        q = {
            "kl_divergence": lambda: softmax(reference),
            "uniform": lambda: [mpmath.mpf(1) / len(p)] * len(p),
            "undial": lambda: softmax(lowered(reference, label, beta)),
        }[name]()
        value = -mpmath.fsum(b * mpmath.log(a) for a, b in zip(p, q, strict=True) if b > 0)
        if name != "undial":
            value += mpmath.fsum(b * mpmath.log(b) for b in q if b > 0)
        return float(value), [float(a - b) for a, b in zip(p, q, strict=True)]


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    q = torch.softmax(reference.detach(), -1)
    return (q * (torch.log(q) - torch.log_softmax(logits, -1))).sum()


def jensen_shannon(logits: Tensor, reference: Tensor) -> Tensor:
    p, q = torch.softmax(logits, -1), torch.softmax(reference.detach(), -1)
    middle = (p + q) / 2
    return ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2


def uniform(logits: Tensor) -> Tensor:
    return -torch.log_softmax(logits, -1).mean() - math.log(logits.shape[-1])


def undial(logits: Tensor, label: int, reference: Tensor, beta: float) -> Tensor:
    one_hot = torch.nn.functional.one_hot(torch.tensor(label), logits.shape[-1])
    q = torch.softmax(reference.detach() - beta * one_hot, -1)
    return -(q * torch.log_softmax(logits, -1)).sum()


def logit_margin(logits: Tensor) -> Tensor:
    return (logits.max(-1).values - logits.mean(-1)) ** 2


def exact_preference(distance: float, beta: float) -> tuple[float, float]:
    """Value of -(2 / beta) log sigmoid(beta x) and its derivative by x, as probabilities of a pair: p^b / (p^b + r^b)."""
    with mpmath.workdps(DIGITS):
        odds = mpmath.exp(-mpmath.mpf(beta) * mpmath.mpf(distance))
        return float(2 / mpmath.mpf(beta) * mpmath.log(1 + odds)), float(-2 * odds / (1 + odds))


def answers(labels: list[list[int]], skip_first: int) -> list[tuple[int, int]]:
    """(sequence, position) of each token that counts, by a loop over tokens."""
    found = []
    for sequence, row in enumerate(labels):
        seen = 0
        for position, label in enumerate(row):
            if label == -100:
                continue
            seen += 1
            if seen > skip_first and position > 0:
                found.append((sequence, position))
    return found


def rmu(hidden: Tensor, target: Tensor, mask: Tensor) -> list[float]:
    values = []
    for states, wanted, counts in zip(hidden, target, mask, strict=True):
        errors = [
            sum((float(a) - float(b)) ** 2 for a, b in zip(state, aim, strict=True)) / len(state)
            for state, aim, count in zip(states, wanted, counts, strict=True)
            if count
        ]
        values.append(sum(errors) / len(errors) if errors else 0.0)
    return values
