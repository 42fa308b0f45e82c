"""Model utility: one number for everything that a model should still know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import SupportsFloat

UTILITY_SPLITS = ("retain", "real_authors", "world_facts")
UTILITY_METRICS = ("probability", "rouge_l_recall", "truth_ratio")
UTILITY_NAMES = tuple(f"{split}/{metric}" for split in UTILITY_SPLITS for metric in UTILITY_METRICS)
"""The names of the nine numbers, as `ModelUtility` has them."""


def model_utility(nine: Mapping[str, SupportsFloat]) -> float:
    r"""TOFU's model utility: the harmonic mean of nine numbers, which is small as soon as one of them is.

    $$\mathrm{MU} = 9 \Big/ \sum_{k=1}^{9} \frac{1}{x_k}$$

    over {probability, ROUGE-L recall, truth ratio} x {retain, real authors, world facts}, each the mean over its split:
    the probability is `answer_probability` on retain and `option_probability` on the two others, and the truth ratio is
    max(0, 1 - R). Higher is better. A zero among the nine makes it 0, a NaN makes it NaN.

    TOFU, section 2.2.2; equal to `scipy.stats.hmean` of the nine. Llama-2-7B fine-tuned on all of TOFU scores .6227,
    retrained without the forget set (retain90) .6137. locuslab's utils.py gives .5859 and .5752 for the same logs,
    because it defines the truth ratio differently (see `truth_ratio`).

    Args:
        nine: name -> number, each finite and at least 0, or NaN. The names are free; `ModelUtility` uses
            `UTILITY_NAMES`, `"<split>/<metric>"`.

    Returns:
        A float.

    Raises:
        ValueError: if there are not nine of them, or one is negative or infinite.

    Example:
        >>> model_utility(dict.fromkeys(UTILITY_NAMES, 0.5))
        0.5
        >>> model_utility({**dict.fromkeys(UTILITY_NAMES, 0.5), "retain/probability": 0.0})
        0.0
    """
    if len(nine) != len(UTILITY_NAMES):
        raise ValueError(
            f"expected exactly nine numbers, such as {', '.join(UTILITY_NAMES)}, found {len(nine)}: "
            f"{', '.join(map(str, nine)) or 'none'}"
        )
    values = {name: _number(name, value) for name, value in nine.items()}
    for name, value in values.items():
        if value < 0.0 or math.isinf(value):
            raise ValueError(f"expected {name} to be finite and at least 0 (or NaN, where it diverged), found {value}")
    if any(math.isnan(value) for value in values.values()):
        return math.nan
    if not all(values.values()):
        return 0.0
    return len(values) / math.fsum(1.0 / value for value in values.values())


def _number(name: str, value: SupportsFloat) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected {name} to be one number, found {value!r}: {error}") from error
