"""ULD's formulas written out, and decoding without any cache: slow, and independent of `gradsurgery.logit_difference`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def stays(base: Sequence[float], rate: float) -> list[bool]:
    """Token by token, in probabilities: p >= rate * max p, or among the int(rate * V) best."""
    exponentials = [math.exp(z - max(base)) for z in base]
    p = [value / math.fsum(exponentials) for value in exponentials]
    best = sorted(p, reverse=True)[: int(rate * len(p))]
    return [value >= rate * max(p) or value in best for value in p]


def difference(
    base: Sequence[float], assistant: Sequence[float], weight: float, rate: float, generating: bool
) -> list[float]:
    """One row of logits."""
    dropped = -math.inf if generating else None
    return [
        (b - weight * a) if kept else (b if dropped is None else dropped)
        for b, a, kept in zip(base, assistant, stays(base, rate), strict=True)
    ]


def row(
    base: Any, assistant: Any, tokens: Sequence[int], weight: float, rate: float, generating: bool = True
) -> Tensor:
    """Logits of the token after `tokens`, by two full passes over one sequence without padding and cache."""
    inputs = torch.tensor([list(tokens)])
    with torch.no_grad():
        b, a = (model(input_ids=inputs, use_cache=False).logits[0, -1].double().tolist() for model in (base, assistant))
    return torch.tensor(difference(b, a, weight, rate, generating))


def greedy(base: Any, assistant: Any, tokens: Sequence[int], steps: int, weight: float, rate: float) -> list[int]:
    sequence = list(tokens)
    for _ in range(steps):
        sequence.append(int(row(base, assistant, sequence, weight, rate).argmax()))
    return sequence


def sample(
    base: Any,
    assistant: Any,
    batch: Sequence[Sequence[int]],
    steps: int,
    weight: float,
    rate: float,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Multinomial sampling, one draw a step for the whole batch, from the global generator at `seed`."""
    torch.manual_seed(seed)
    sequences = [list(tokens) for tokens in batch]
    for _ in range(steps):
        rows = torch.stack([row(base, assistant, tokens, weight, rate) for tokens in sequences])
        chosen = torch.multinomial((rows / temperature).softmax(-1), 1)
        for tokens, token in zip(sequences, chosen[:, 0].tolist(), strict=True):
            tokens.append(token)
    return sequences


def beam(
    base: Any, assistant: Any, tokens: Sequence[int], steps: int, width: int, weight: float, rate: float
) -> list[int]:
    """The best of `width` hypotheses of one length by total log-probability."""
    hypotheses = [(0.0, list(tokens))]
    for _ in range(steps):
        grown = [
            (total + gain, [*sequence, token])
            for total, sequence in hypotheses
            for token, gain in enumerate(row(base, assistant, sequence, weight, rate).log_softmax(-1).tolist())
        ]
        hypotheses = sorted(grown, key=lambda hypothesis: -hypothesis[0])[:width]
    return hypotheses[0][1]
