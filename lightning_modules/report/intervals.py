"""How sure a mean over examples is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_AT_ONCE = 1_000_000  # numbers drawn at once: 16 MB with their indices


class Interval(NamedTuple):
    """A confidence interval of a mean, and the number of examples."""

    low: float
    high: float
    n: int


def mean_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 5000, seed: int = 0
) -> Interval | None:
    r"""Percentile bootstrap interval of a mean.

    Examples are drawn with replacement, n of n, `resamples` times; the interval lies between the :math:`(1 \mp c) / 2` quantiles of the
    means (Efron and Tibshirani 1993, section 13.3; `scipy.stats.bootstrap(method="percentile")`). It takes the examples for independent:
    several questions about one author are not, and it is too narrow for them. It says nothing about another seed. Drawn with a seed, it
    is the same every time.

    Args:
        values: One an example.
        confidence: c, in (0, 1).
        resamples: Means to draw.
        seed: Of the draws.

    Returns:
        None for fewer than two values, of which nothing can be said; NaN limits where a value is not finite.

    Raises:
        ValueError: If the confidence or the number of draws is outside its domain.

    Example:
        >>> mean_interval([0.0, 1.0] * 50)
        Interval(low=0.4, high=0.6, n=100)
    """
    if not 0.0 < confidence < 1.0 or resamples < 1:
        raise ValueError(
            f"mean_interval: expected a confidence in (0, 1) and resamples >= 1, found {confidence}, {resamples}"
        )
    sample = np.asarray(values, dtype=np.float64)
    n = len(sample)
    if n < 2:
        return None
    if not np.isfinite(sample).all():
        return Interval(float("nan"), float("nan"), n)
    draws, rows = np.random.default_rng(seed), max(1, _AT_ONCE // n)
    means = np.concatenate(
        [
            sample[draws.integers(n, size=(min(rows, resamples - start), n))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return Interval(float(low), float(high), n)
