r"""Membership inference: scores of an example that tell whether a model was trained on it.

Notation: log-probabilities are natural logarithms of the answer's tokens, `[T]` for one example, or n examples of
different lengths. `lightning_modules.evaluation.memorization.answer_token_statistics` gives them for a model.

Direction of every score: **higher means more likely a member**. (open-unlearning and MIMIR use the opposite sign and
swap the labels too, so their AUC is the same number.) A score means nothing by itself: `auc` compares the forget set
with a holdout set that no model saw, and `priv_leak` compares that AUC with the retrained model's.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.metrics.functional.numbers import Ragged, as_examples, per_example

# A log-softmax in half precision may round to slightly above 0.
_ROUNDING = 1e-2
# The smallest variance in Min-K++, as in its authors' code: where a model is certain, z would be 0 / 0.
_LEAST_VARIANCE = 1e-6


def loss_score(log_probabilities: Ragged) -> float | Tensor:
    """The mean log-probability of the tokens, which is minus the loss: the simplest attack.

    Source: Yeom et al. 2018 (arXiv 1709.01604).

    Args:
        log_probabilities: of one example `[T]`, or of n examples, each `[T_i]`.

    Returns:
        A float for one example, a float64 tensor `[n]` for n of them. Higher: more likely a member.

    Raises:
        ValueError: if there is no example, an example is empty, or a log-probability is positive.

    Example:
        >>> loss_score([-1.0, -3.0])
        -2.0
    """
    examples, alone = _log_probabilities(log_probabilities)
    return per_example([float(tokens.mean()) for tokens in examples], alone)


def min_k_score(log_probabilities: Ragged, k: float = 0.2) -> float | Tensor:
    r"""Min-K% Prob: the mean log-probability of the least likely tokens. A member has fewer unlikely tokens.

    $$\frac{1}{m} \sum_{t \in \text{the } m \text{ smallest}} \log p_t, \qquad m = \max(1, \lfloor k T \rfloor)$$

    Source: Shi et al. 2024 (arXiv 2310.16789), with k = 20 % as they have it; MUSE and open-unlearning's
    PrivLeak use 40 %.

    Args:
        log_probabilities: of one example `[T]`, or of n examples, each `[T_i]`.
        k: the share of the tokens, above 0 and at most 1; 1 is `loss_score`.

    Returns:
        A float for one example, a float64 tensor `[n]` for n of them. Higher: more likely a member. NaN if any
        log-probability of the example is NaN.

    Raises:
        ValueError: as `loss_score`, and for k out of its range.

    Example:
        >>> min_k_score([-1.0, -5.0, -2.0, -3.0], k=0.5)
        -4.0
    """
    _check_share(k)
    examples, alone = _log_probabilities(log_probabilities)
    return per_example([_mean_of_least(tokens, k) for tokens in examples], alone)


def min_k_plus_plus_score(log_probabilities: Ragged, means: Ragged, stds: Ragged, k: float = 0.2) -> float | Tensor:
    r"""Min-K%++: Min-K% of log-probabilities that are standardised by the model's own distribution at each position.

    $$z_t = \frac{\log p_t - \mu_t}{\sigma_t}, \qquad
    \mu_t = \mathbb{E}_{v \sim p_t}[\log p_t(v)], \quad \sigma_t^2 = \mathrm{Var}_{v \sim p_t}[\log p_t(v)]$$

    with mean and variance over the vocabulary, weighted by the model's own probabilities.

    Source: Zhang et al. 2025 (arXiv 2404.02936). As in the authors' code the variance is at least 1e-6, because at a
    position where the model is certain z would be 0 / 0.

    Args:
        log_probabilities: of one example `[T]`, or of n examples, each `[T_i]`.
        means: mu, in the same shapes.
        stds: sigma, in the same shapes.
        k: the share of the tokens, above 0 and at most 1.

    Returns:
        A float for one example, a float64 tensor `[n]` for n of them. Higher: more likely a member.

    Raises:
        ValueError: as `min_k_score`, and if the shapes differ or a standard deviation is negative.

    Example:
        >>> min_k_plus_plus_score([-1.0, -5.0], means=[-2.0, -2.0], stds=[1.0, 2.0], k=0.5)
        -1.5
    """
    _check_share(k)
    examples, alone = _log_probabilities(log_probabilities)
    centres, _ = as_examples(means, "means", torch.float64)
    deviations, _ = as_examples(stds, "stds", torch.float64)
    shapes = [[len(tokens) for tokens in values] for values in (examples, centres, deviations)]
    if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        raise ValueError(f"expected log_probabilities, means and stds of the same shapes, found lengths {shapes}")
    if any(bool((deviation < 0).any()) for deviation in deviations):
        raise ValueError("expected stds of at least 0, found a negative one")
    scores = [
        _mean_of_least((tokens - centre) / deviation.square().clamp(min=_LEAST_VARIANCE).sqrt(), k)
        for tokens, centre, deviation in zip(examples, centres, deviations, strict=True)
    ]
    return per_example(scores, alone)


def zlib_score(log_probabilities: Ragged, text: str | Sequence[str]) -> float | Tensor:
    """The mean log-probability of the tokens, divided by the number of bytes of the compressed text.

    Repetitive text is likely under any model. Dividing by the text's entropy, as zlib estimates it, corrects for that.

    Source: Carlini et al. 2021 (arXiv 2012.07805), section 5.2. MIMIR and open-unlearning compute the same (mean loss /
    bytes) with the opposite sign.

    Args:
        log_probabilities: of one example `[T]`, or of n examples, each `[T_i]`.
        text: the example's text (the answer, where the log-probabilities are the answer's), or n of them.

    Returns:
        A float for one example, a float64 tensor `[n]` for n of them. Higher: more likely a member.

    Raises:
        ValueError: as `loss_score`, and if there is not one text for each example.

    Example:
        >>> zlib_score([-1.0, -3.0], "In Lima.") == -2.0 / 16
        True
    """
    examples, alone = _log_probabilities(log_probabilities)
    texts = [text] if isinstance(text, str) else list(text)
    if len(texts) != len(examples) or alone != isinstance(text, str):
        raise ValueError(f"expected a text for each example, found {len(texts)} texts and {len(examples)} examples")
    sizes = [len(zlib.compress(entry.encode())) for entry in texts]
    return per_example([float(tokens.mean()) / size for tokens, size in zip(examples, sizes, strict=True)], alone)


def _log_probabilities(values: Ragged, name: str = "log_probabilities") -> tuple[list[Tensor], bool]:
    examples, alone = as_examples(values, name, torch.float64)
    highest = max((float(tokens.max()) for tokens in examples if not tokens.isnan().any()), default=0.0)
    if highest > _ROUNDING:
        raise ValueError(f"expected {name} of at most 0, found {highest}: pass log-probabilities, not losses")
    return examples, alone


def _check_share(k: float) -> None:
    if not 0.0 < k <= 1.0:
        raise ValueError(f"expected k as a share of the tokens, above 0 and at most 1, found {k}")


def _mean_of_least(values: Tensor, k: float) -> float:
    if values.isnan().any():  # sorting would put it last, where it would be cut off
        return torch.nan
    return float(values.sort().values[: max(1, int(k * len(values)))].mean())
