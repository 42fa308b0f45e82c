"""Questions with given answers: whether the model thinks the right one the likeliest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.metrics.functional.numbers import as_numbers

_NORMAL_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


def multiple_choice_accuracy(
    log_likelihoods: Tensor | Sequence[Sequence[float]], right: Tensor | Sequence[int]
) -> Tensor:
    r"""Whether the right option of each question is the likeliest: 1 if $\arg\max_o \log p(o \mid \mathrm{prompt})$ is.

    Of equally likely options the first counts as the model's choice, as in lm-evaluation-harness (`acc`). WMDP and MMLU
    are scored so, each option being a letter; chance is 1/m.

    Args:
        log_likelihoods: of the m options of n questions, in nats, `[n, m]`, higher is likelier.
        right: the places of the right options, `[n]`, from 0 to m - 1.

    Returns:
        1 or 0 for each question, float64 `[n]`; NaN where a log-likelihood is NaN.

    Raises:
        ValueError: if a shape is not the one stated or empty, or a place is none of an option.

    Example:
        >>> multiple_choice_accuracy([[-1.0, -2.0], [-3.0, -3.0]], [0, 1])
        tensor([1., 0.], dtype=torch.float64)
    """
    options, _ = as_numbers(log_likelihoods, "log_likelihoods", "[n, m]", dimensions=2)
    places, _ = as_numbers(right, "right", "[n]", dimensions=1)
    n, m = options.shape
    if len(places) != n:
        raise ValueError(f"expected log_likelihoods [n, m] and right [n] with the same n, found {n} and {len(places)}")
    if bool(((places < 0) | (places >= m) | (places != places.floor())).any()):
        raise ValueError(f"expected right as places of options, 0 to {m - 1}, found {places.tolist()}")
    # Not options.argmax, which may return the last of several.
    best = (options == options.amax(dim=-1, keepdim=True)).to(torch.int8).argmax(dim=-1)
    correct = (best == places.to(best)).to(torch.float64)
    return correct.masked_fill(options.isnan().any(dim=-1), math.nan)


def accuracy_interval(accuracy: float, n: int) -> tuple[float, float]:
    r"""Wilson's 95 % confidence interval of an accuracy over n independent questions.

    $$\frac{1}{1 + z^2 / n} \left( \hat p + \frac{z^2}{2 n} \pm
    z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4 n^2}} \right), \qquad z = 1.96$$

    Unlike $\hat p \pm 1.96$ standard errors it stays in [0, 1] and has a width at 0 and 1. Source: Wilson 1927;
    `scipy.stats.binomtest(...).proportion_ci(method="wilson")` is the same.

    Args:
        accuracy: the share of right answers.
        n: the number of questions, at least 1.

    Raises:
        ValueError: if the accuracy is not in [0, 1] (NaN may be), or there is no question.

    Example:
        >>> [round(limit, 3) for limit in accuracy_interval(0.25, 100)]
        [0.175, 0.343]
    """
    if n < 1 or not (0.0 <= accuracy <= 1.0 or math.isnan(accuracy)):
        raise ValueError(f"expected an accuracy in [0, 1] over at least one question, found {accuracy} over {n}")
    z2 = _NORMAL_95**2
    centre = (accuracy + z2 / (2 * n)) / (1 + z2 / n)
    half = _NORMAL_95 * math.sqrt(accuracy * (1 - accuracy) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return (math.nan, math.nan) if math.isnan(accuracy) else (max(0.0, centre - half), min(1.0, centre + half))
