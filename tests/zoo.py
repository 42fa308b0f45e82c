"""A zoo of row systems ``rows [K, 8]`` and their Gram matrices, the same on every run: the ordinary, the degenerate and the extreme."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

DIMENSION = 8
SIZES = (1, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Animal:
    """K rows and their Gram matrix, both float64."""

    name: str
    rows: Tensor
    gram: Tensor


def gram_of(rows: Tensor) -> Tensor:
    return rows @ rows.mT


def _random(number: int, seed: int) -> Tensor:
    return torch.randn(number, DIMENSION, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def _at_cosine(number: int, cosine: float) -> Tensor:
    """Row 0 along one axis and every other row at ``cosine`` to it, each tilted along an axis of its own, with lengths 1, 2, 3..."""
    rows = torch.zeros(number, DIMENSION, dtype=torch.float64)
    rows[0, 0] = 1.0
    for k in range(1, number):
        rows[k, 0] = cosine
        rows[k, k] = (1.0 - cosine**2) ** 0.5
    return rows * torch.arange(1.0, number + 1, dtype=torch.float64)[:, None]


@functools.cache
def animals(number: int) -> tuple[Animal, ...]:
    """Every kind of system of ``number`` rows."""
    base, lengths = _random(number, number), 1.0 + torch.arange(number, dtype=torch.float64)[:, None]
    line = _unit(_random(1, 100 + number))
    signs = torch.tensor([1.0] + [-1.0] * (number - 1), dtype=torch.float64)[:, None]
    first, last = base.clone(), base.clone()
    first[0], last[-1] = 0.0, 0.0
    # The forget row against the sum of orthogonal protected rows: it conflicts with each of them.
    against_all = torch.eye(number, DIMENSION, dtype=torch.float64)
    against_all[0] = torch.where(torch.arange(DIMENSION) < number, -0.5, 0.0)
    against_all[0, 0] = 1.0
    opposite_protected = base.clone()
    if number > 2:
        opposite_protected[2] = -0.5 * opposite_protected[1]
    exponents = (
        torch.linspace(-30.0, 30.0, number, dtype=torch.float64)[:, None] if number > 1 else torch.full((1, 1), 30.0)
    )
    systems = {
        "random": base,
        "random_again": _random(number, 50 + number),
        "rank_one": _random(number, 200 + number)[:, :1] * line,
        "rank_two": _random(number, 300 + number)[:, :2] @ _random(2, 400 + number),
        "zero": torch.zeros_like(base),
        "zero_forget": first,
        "zero_protected": last,
        "identical": line.expand(number, DIMENSION).clone(),
        "parallel": lengths * line,
        "opposite": lengths * signs * line,
        "opposite_protected": opposite_protected,
        "nearly_parallel": _at_cosine(number, 1.0 - 1e-9),
        "nearly_opposite": _at_cosine(number, -1.0 + 1e-9),
        "no_conflict": base.abs(),
        "conflict_with_all": against_all,
        "different_lengths": _unit(base) * 10.0**exponents,
        "different_lengths_reversed": _unit(base) * 10.0**-exponents,
        "tiny": base * 1e-30,
        "huge": base * 1e30,
    }
    return tuple(Animal(name, rows, gram_of(rows)) for name, rows in systems.items())


def names() -> tuple[str, ...]:
    return tuple(animal.name for animal in animals(2))


def stacked(number: int, *kinds: str) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """(names, rows ``[Z, K, 8]``, Gram matrices ``[Z, K, K]``) of the kinds named, of all when none is."""
    chosen = [animal for animal in animals(number) if not kinds or animal.name in kinds]
    return (
        tuple(animal.name for animal in chosen),
        torch.stack([animal.rows for animal in chosen]),
        torch.stack([animal.gram for animal in chosen]),
    )


@functools.cache
def random_rows(number: int, count: int, seed: int, dimension: int = DIMENSION) -> Tensor:
    """``count`` full-rank systems ``[count, number, dimension]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, number, dimension, dtype=torch.float64, generator=generator)


@functools.cache
def degenerate_rows(number: int, count: int, seed: int, dimension: int = DIMENSION) -> Tensor:
    """``count`` systems ``[count, number, dimension]`` of small integers: full of zero, equal, opposite and dependent rows, exactly."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-1, 2, (count, number, 3), generator=generator).double()
    return torch.nn.functional.pad(rows, (0, dimension - 3))
