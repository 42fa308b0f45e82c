"""Whether an unlearned model can be told from one that never saw the forget set."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from lightning_modules.metrics.functional.numbers import Numbers, as_numbers


class ForgetQualityResult(NamedTuple):
    """The result of a two-sample Kolmogorov-Smirnov test.

    Attributes:
        statistic: the largest distance between the two distribution functions.
        pvalue: scipy's, exact up to 10,000 examples.
        log10_pvalue: its base-10 logarithm, finite also where `pvalue` underflows to 0. There it is exact for two
            samples of one size. For others it is the leading term of the asymptotic series, which lies above it.
        n: the size of the first sample.
    """

    statistic: float
    pvalue: float
    log10_pvalue: float
    n: int


def forget_quality(truth_ratio: Numbers, reference_truth_ratio: Numbers) -> ForgetQualityResult:
    """TOFU's forget quality: whether two models' truth ratios on the forget set can be told apart.

    It is the p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios R of the unlearned model and
    those of a model that never saw the forget set (TOFU, section 2.2.2). Higher is better: the retrained model itself
    has 1. A model that still knows everything has about 1e-3, 1e-14 and 1e-20 on TOFU's 1, 5 and 10 % splits, because
    at an equal statistic p falls with n. The test compares ranks only, so R and 1/R give the same result.

    Args:
        truth_ratio: `[n]`, `truth_ratio(..., kind="ratio")` of the unlearned model.
        reference_truth_ratio: `[m]`, those of the model that never saw the forget set.

    Raises:
        ValueError: if a sample is empty or not one-dimensional, or holds a NaN, which has no rank.

    Example:
        >>> forget_quality([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4])
        ForgetQualityResult(statistic=0.0, pvalue=1.0, log10_pvalue=0.0, n=4)
    """
    from scipy.stats import ks_2samp

    ours, _ = as_numbers(truth_ratio, "truth_ratio", "[n]", 1)
    theirs, _ = as_numbers(reference_truth_ratio, "reference_truth_ratio", "[m]", 1)
    for name, values in (("truth_ratio", ours), ("reference_truth_ratio", theirs)):
        if values.isnan().any():
            raise ValueError(f"{name}: expected numbers that can be ranked, found NaN: the model diverged")
    result: Any = ks_2samp(ours.cpu().numpy(), theirs.cpu().numpy())
    statistic, pvalue, n, m = float(result.statistic), float(result.pvalue), len(ours), len(theirs)
    log10 = math.log10(pvalue) if pvalue > 0.0 else _log10_of_underflowed(statistic, n, m)
    return ForgetQualityResult(statistic, pvalue, log10, n)


def _log10_of_underflowed(statistic: float, n: int, m: int) -> float:
    r"""The base-10 logarithm of a p-value that underflows, from the leading term of its series.

    The next term is smaller by more than 300 digits. scipy has no such logarithm: `kstwo.logsf` and `kstwobign.logsf`
    are minus infinity here.

    - n = m: the exact series $2 \sum_k (-1)^{k-1} C(2n, n - kh) / C(2n, n)$ with $h = n D$;
    - otherwise: the asymptotic $2 \exp(-2 D^2 nm / (n + m))$.
    """
    if n == m:
        steps = round(statistic * n)
        return (
            math.log(2.0) + 2.0 * math.lgamma(n + 1) - math.lgamma(n - steps + 1) - math.lgamma(n + steps + 1)
        ) / math.log(10.0)
    return math.log10(2.0) - 2.0 * statistic**2 * n * m / (n + m) / math.log(10.0)
