"""The probability of an answer: alone, and as its share among the options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.metrics.functional.numbers import Numbers, answers_and_options, as_numbers


def answer_probability(answer_nll: Numbers) -> Tensor:
    r"""The probability of the answer, normalised for its length: the geometric mean of its tokens' probabilities.

    $$p_i = \exp(-\mathrm{nll}_i) = P(\mathrm{answer}_i \mid \mathrm{question}_i)^{1 / \mathrm{tokens}_i}$$

    Source: TOFU, section 2.2.2; locuslab/tofu and open-unlearning agree on it. ULD's published tables print another
    number as "Forget Probability": the share of the answer among the options, `p / (p + sum of the perturbed)` (.364
    where this gives .144).

    Args:
        answer_nll: `[n]`.

    Returns:
        `[n]`, in [0, 1].

    Example:
        >>> answer_probability([0.0, 0.6931471805599453])
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    nll, dtype = as_numbers(answer_nll, "answer_nll", "[n]", dimensions=1)
    return torch.exp(-nll).to(dtype)


def option_probability(answer_nll: Numbers, perturbed_nll: Tensor | Sequence[Sequence[float]]) -> Tensor:
    r"""The share of the right answer among the options, as in a multiple-choice test.

    $$p_i = \frac{\exp(-\mathrm{nll}_i)}{\exp(-\mathrm{nll}_i) + \sum_j \exp(-\mathrm{nll}^{\mathrm{perturbed}}_{ij})}$$

    which is a softmax, computed in log space: it is finite for a diverged model (nll of 10,000), and NaN only where no
    option has any probability left. With m wrong answers, guessing scores 1 / (m + 1).

    Source: TOFU, section 2.2.2, its "probability" on real authors and world facts. open-unlearning adds 1e-10 to the
    denominator (equal to 5e-9 on published logs).

    Args:
        answer_nll: of the right answer, `[n]`.
        perturbed_nll: of the wrong answers, `[n, m]`.

    Returns:
        `[n]`, in [0, 1].

    Raises:
        ValueError: if a shape is not the one stated, or empty.

    Example:
        >>> option_probability([1.0, 1e4], [[1.0, 1.0, 1.0], [1e4, 2e4, 2e4]])
        tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    answer, perturbed, dtype = answers_and_options("answer_nll", answer_nll, "perturbed_nll", perturbed_nll)
    options = torch.cat([answer.unsqueeze(-1), perturbed], dim=-1)
    return torch.softmax(-options, dim=-1)[:, 0].to(dtype)
