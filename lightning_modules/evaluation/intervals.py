"""Confidence intervals of a mean over examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_AT_ONCE = 1_000_000  # numbers that are drawn at once; 16 MB with their indices


class Interval(NamedTuple):
    """A confidence interval of a mean, and the number of examples."""

    low: float
    high: float
    n: int


def mean_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 5000, seed: int = 0
) -> Interval | None:
    r"""Returns the percentile bootstrap interval of a mean.

    From n examples, n are drawn with replacement, `resamples` times. The interval lies between the
    $(1 \mp c) / 2$ quantiles of the means of the draws (Efron and Tibshirani 1993, section 13.3;
    `scipy.stats.bootstrap(method="percentile")`). It assumes that the examples are independent. Several questions about
    one author are not, and for them it is too narrow. It says nothing about other seeds of the training. Its own draws
    have a seed, so it is the same every time.

    Args:
        values: One value for each example.
        confidence: c, in (0, 1).
        resamples: The number of means to draw.
        seed: The seed of the draws.

    Returns:
        None for fewer than two values; NaN limits where a value is not finite.

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
