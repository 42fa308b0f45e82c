"""How likely wrong answers are, relative to a right one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.metrics.functional.numbers import Numbers, answers_and_options

TRUTH_RATIO_KINDS = ("ratio", "forget", "utility")


def truth_ratio(
    paraphrase_nll: Numbers, perturbed_nll: Tensor | Sequence[Sequence[float]], kind: str = "ratio"
) -> Tensor:
    r"""How likely wrong answers are, relative to a paraphrase of the right one.

    $$\log R_i = \mathrm{nll}^{\mathrm{paraphrase}}_i - \frac{1}{m} \sum_j \mathrm{nll}^{\mathrm{perturbed}}_{ij}$$

    so that R is (geometric mean of the wrong answers' probabilities) / (the right one's). It is below 1 for a model
    that knows the answer, and around 1 for one that does not. Everything is computed in log space, so that a diverged
    model (nll of 1000) gives finite numbers.

    - `"ratio"`: R itself, which `forget_quality` compares (at most the largest number of its dtype);
    - `"forget"`: min(R, 1/R) = exp(-abs(log R)), near 1 when the model cannot tell right from wrong: higher is better
      forgotten;
    - `"utility"`: max(0, 1 - R), higher is better known (retain, real authors and world facts).

    Source: TOFU, equation 1 and section 2.2.2. Other code differs: `get_model_utility` in locuslab's utils.py takes the
    arithmetic mean of the perturbed probabilities (.449 instead of .472 on a retain model's retain set);
    open-unlearning adds 1e-10 to the denominator (equal to 2e-8 on published logs, but never above 1e10); locuslab's
    per-example logs and their KS test use 1/R (the p-value is the same).

    Args:
        paraphrase_nll: of the paraphrased answer, `[n]`. Where there is no paraphrase, TOFU uses the answer itself.
        perturbed_nll: of the wrong answers, `[n, m]`.
        kind: `"ratio"`, `"forget"` or `"utility"`.

    Returns:
        `[n]`.

    Example:
        >>> truth_ratio([2.0], [[1.0, 2.0]], kind="ratio")
        tensor([1.6487], dtype=torch.float64)
        >>> truth_ratio([2.0], [[1.0, 2.0]], kind="forget")
        tensor([0.6065], dtype=torch.float64)
        >>> truth_ratio([1.0], [[1000.0, 3000.0]], kind="utility")
        tensor([1.], dtype=torch.float64)
    """
    if kind not in TRUTH_RATIO_KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(TRUTH_RATIO_KINDS)}, found {kind!r}")
    paraphrase, perturbed, dtype = answers_and_options("paraphrase_nll", paraphrase_nll, "perturbed_nll", perturbed_nll)
    log_ratio = paraphrase - perturbed.mean(dim=-1)
    if kind == "forget":
        return torch.exp(-log_ratio.abs()).to(dtype)
    if kind == "utility":
        return (-torch.expm1(log_ratio)).clamp(min=0).to(dtype)  # expm1: 1 - R keeps its digits where R is near 1
    return log_ratio.exp().clamp(max=torch.finfo(dtype).max).to(dtype)
