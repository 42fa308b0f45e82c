"""ULD's arithmetic on logits: the difference of two models' logits, and the filter that keeps the likely tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["check_weight", "logit_difference", "top_logit_mask"]


def top_logit_mask(log_probabilities: Tensor, rate: float) -> Tensor:
    """The tokens that are likely enough under the base model for the assistant to have a say in them.

    A token stays if its probability is at least `rate` times the highest, or if it is among the `int(rate * V)` most
    likely ones. Ties with the last of these stay too.

    Difference from the authors' code: with `rate * V < 1` their index of the k-th best is -1, and nothing is
    filtered. Here only the first condition counts then, and the best token always stays.

    Args:
        log_probabilities: `[..., V]`, log-softmax of the base model's logits.
        rate: In [0, 1]. Both 0 and 1 keep every token.

    Returns:
        Bool, `[..., V]`, True where a token stays. A row with NaN keeps every token, so that the NaN stays visible.

    Raises:
        ValueError: If `rate` is outside [0, 1].

    Example:
        >>> p = torch.tensor([0.6, 0.25, 0.1, 0.05])
        >>> top_logit_mask(p.log(), 0.3)
        tensor([ True,  True, False, False])
        >>> top_logit_mask(p.log(), 0.75)  # the second is below 0.45, and stays as one of the three most likely
        tensor([ True,  True,  True, False])
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"top_logit_filter: expected a rate between 0 and 1, found {rate}")
    if rate == 0.0:
        return torch.ones_like(log_probabilities, dtype=torch.bool)
    threshold = log_probabilities.amax(-1, keepdim=True) + math.log(rate)
    best = int(rate * log_probabilities.shape[-1])
    if best:
        threshold = torch.minimum(threshold, log_probabilities.topk(best, dim=-1).values[..., -1:])
    return ~(log_probabilities < threshold)


def logit_difference(
    base_logits: Tensor,
    assistant_logits: Tensor,
    weight: float = 0.75,
    top_logit_filter: float = 0.0,
    *,
    generating: bool = False,
) -> Tensor:
    """The logits `base - weight * assistant`, with the top-logit filter.

    ULD, equation 2 and section 3.2. Raw logits are subtracted, as in the paper. The authors' code takes the
    log-softmax of both first where there is no filter. That differs by one constant a row, hence in no probability.
    With a filter the constant matters, because kept and filtered tokens meet in one softmax; there both the code and
    this function subtract raw logits.

    Filtered tokens (see `top_logit_mask`)

    - keep the base logit when scoring. They are not suppressed: the kept tokens lose `weight * assistant`, so that a
      rare token can become likelier than it was. Likelihoods with a filter are therefore not those of the sampler;
    - get -inf when generating, so that no sampler chooses them (the authors' greedy loop writes -1e3).

    Args:
        base_logits: `[..., V]`, of the model that is to forget.
        assistant_logits: `[..., V]`, of the assistant.
        weight: How much of the assistant is subtracted. Paper: 0.75 on TOFU, 0.5 on Harry Potter; the authors' code
            stores it negative and adds it (-0.8 in its TOFU script).
        top_logit_filter: Rate of `top_logit_mask`; 0 is no filter. Paper: 0.01 (the authors' evaluation runs with 0.1).
        generating: Whether filtered tokens get -inf instead of the base logit.

    Returns:
        `[..., V]`, in float32 (float64 if one of the two is).

    Raises:
        ValueError: If the shapes differ, the weight is negative or not finite, or the filter's rate is outside [0, 1].

    Example:
        >>> base, assistant = torch.tensor([2.0, 1.0, -3.0]), torch.tensor([4.0, 0.0, 0.0])
        >>> logit_difference(base, assistant, weight=0.5)
        tensor([ 0.,  1., -3.])
        >>> logit_difference(base, assistant, weight=0.5, top_logit_filter=0.1, generating=True)
        tensor([0., 1., -inf])
    """
    if base_logits.shape != assistant_logits.shape:
        raise ValueError(
            f"expected base and assistant logits of one shape, found {list(base_logits.shape)} and "
            f"{list(assistant_logits.shape)}: both models need the same vocabulary and the same tokens"
        )
    check_weight(weight)
    # bfloat16 knows a logit of 20 only to 0.06: a difference in that type would be mostly rounding.
    dtype = torch.promote_types(torch.promote_types(base_logits.dtype, assistant_logits.dtype), torch.float32)
    base = base_logits.to(dtype)
    difference = base - weight * assistant_logits.to(dtype) if weight else base
    # What the base masks stays masked: infinities would cancel to NaN, the least finite numbers to an ordinary logit.
    difference = torch.where(base_logits <= torch.finfo(base_logits.dtype).min, base, difference)
    kept = top_logit_mask(base.log_softmax(-1), top_logit_filter) if top_logit_filter else None
    if kept is None:
        return difference
    return torch.where(kept, difference, base.new_tensor(-torch.inf) if generating else base)


def check_weight(weight: float) -> None:
    """Raise ValueError unless the assistant's weight is a finite number >= 0."""
    if not (weight >= 0.0 and math.isfinite(weight)):
        raise ValueError(
            f"weight: expected a finite number >= 0, found {weight}: the assistant's logits are subtracted (the authors' code stores the "
            "weight negative and adds it)"
        )
