"""Independent, slow versions of the plan of waiting requests, on explicit gradients in float64 numpy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def projected(request: Vector, retain: Vector) -> Vector:
    """The request's gradient without what conflicts with retention."""
    conflict = min(0.0, float(request @ retain))
    return request - conflict / float(retain @ retain) * retain


def steps(gradients: list[Vector]) -> float:
    """Walks along the sum of the unit gradients, a unit of length a step, until each fell by its own length."""
    units = [gradient / np.linalg.norm(gradient) for gradient in gradients]
    way = np.sum(units, axis=0)
    way = way / np.linalg.norm(way)
    rates = [float(gradient @ way) for gradient in gradients]
    if min(rates) <= 0:
        return np.inf
    return max(float(np.linalg.norm(gradient)) / rate for gradient, rate in zip(gradients, rates, strict=True))


def greedy(gradients: list[Vector]) -> list[list[int]]:
    """The agglomeration, with every estimate made anew in every round."""
    found = [[place] for place in range(len(gradients))]
    while True:
        gains = []
        for one, other in combinations(found, 2):
            parts = [steps([gradients[place] for place in group]) for group in (one, other, one + other)]
            gains.append((parts[0] + parts[1] - parts[2], -one[0], -other[0]))
        best = max(gains, default=(0.0, 0, 0))
        if best[0] <= 1e-9:
            return found
        one, other = (next(group for group in found if group[0] == -first) for first in best[1:])
        found = sorted([group for group in found if group not in (one, other)] + [sorted(one + other)])
