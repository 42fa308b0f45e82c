"""The spread of one method over seeds, and the differences between two methods with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple, TypeVar

Seed = TypeVar("Seed")


class Spread(NamedTuple):
    """Mean, sample standard deviation (None for one value) and number of values."""

    mean: float
    sd: float | None
    n: int


class Paired(NamedTuple):
    """Differences of pairs: mean, standard deviation, how many of the n are above 0, Student's interval of the mean.

    For a single pair there is neither a standard deviation nor an interval (None).
    """

    mean: float
    sd: float | None
    wins: int
    n: int
    low: float | None
    high: float | None


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation of the values; None if there are no values.

    Example:
        >>> spread([1.0, 3.0])
        Spread(mean=2.0, sd=1.4142135623730951, n=2)
    """
    if not values:
        return None
    if len(values) < 2:
        return Spread(values[0], None, 1)
    # Python 3.11's stdev raises AttributeError on a NaN.
    return Spread(fmean(values), stdev(values) if all(map(math.isfinite, values)) else math.nan, len(values))


def paired(ours: Mapping[Seed, float], theirs: Mapping[Seed, float], *, confidence: float = 0.95) -> Paired | None:
    r"""How much larger ours is than theirs, over the seeds that both have; None if there are no such seeds.

    With differences $d_i$ of $n$ pairs, their mean $\bar d$ and standard deviation $s$, the
    interval is Student's, $\bar d \pm t_{n-1} s / \sqrt n$, as in `scipy.stats.ttest_rel`. It takes the pairs for
    independent. Pairs that share a start model are not quite independent, so with few model seeds the interval is too
    narrow for a claim about other models.

    Args:
        ours: Seeds -> value.
        theirs: Seeds -> value of the baseline.
        confidence: Of the interval.

    Example:
        >>> paired({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.25, 2: 0.9})[:4]
        (0.375, 0.1767766952966369, 2, 2)
    """
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    found = spread(differences)
    if found is None:
        return None
    wins = sum(difference > 0.0 for difference in differences)
    if found.sd is None:
        return Paired(found.mean, None, wins, found.n, None, None)
    from scipy.stats import t

    half = float(t.ppf(0.5 + confidence / 2.0, found.n - 1)) * found.sd / math.sqrt(found.n)
    return Paired(found.mean, found.sd, wins, found.n, found.mean - half, found.mean + half)
