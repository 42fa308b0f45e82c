r"""The number that most losses per token are a function of: the log-odds of the label, and its exact gradient.

With logits $z$ and label $y$ it is $d = z_y - \log\sum_{j \ne y} e^{z_j}$. The label's probability is
$\mathrm{sigmoid}(d)$, its negative log-likelihood $\mathrm{softplus}(-d)$, and every loss $\varphi(d)$ has the gradient
$\varphi'(d)\,(e_y - q)$, where $q$ is the softmax without $y$. No step subtracts numbers that are nearly equal. A
forgotten token therefore gets a vanishing gradient instead of rounding noise, and a token that is certain gets no NaN.

A loss may also use the log-odds of the runner-up, the likeliest token that is not the label.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reduced(NamedTuple):
    """The log-odds of rows of logits, and what their gradient needs, ``[n, 1]`` each but the first two.

    m is the largest logit that is not the label's, or 0 where all of those are minus infinity.

    Attributes:
        own: ``[n]``, log-odds of the label.
        other: ``[n]``, log-odds of the runner-up, or None.
        place: The labels.
        runner_up: The token with the logit m, or None.
        total: Sum of exp(z - m) over all tokens but the label; its logarithm if there is a runner-up.
        other_total: Logarithm of the sum of exp(z - m) over all tokens but the runner-up, or None.
        label: z_y - m.
    """

    own: Tensor
    other: Tensor | None
    place: Tensor
    runner_up: Tensor | None
    total: Tensor
    other_total: Tensor | None
    label: Tensor


def reduce_(rows: Tensor, labels: Tensor, runner_up: bool) -> Reduced:
    """The log-odds of rows ``[n, V]`` of float logits, which are overwritten by what `gradient` needs."""
    index = labels[:, None]
    own = rows.gather(1, index)
    rows.scatter_(1, index, -torch.inf)
    if not runner_up:
        largest = rows.amax(1, keepdim=True)
        # Where all others are minus infinity, differences to it would be no numbers.
        largest = largest.masked_fill(largest == -torch.inf, 0.0)
        own = own - largest
        # Differences to the largest logit are exact and small, while a logsumexp of logits near 1e4 has three decimals.
        total = rows.sub_(largest).exp_().sum(1, keepdim=True)
        return Reduced((own - total.log()).squeeze(1), None, index, None, total, None, own)
    second = rows.argmax(1, keepdim=True)
    largest = rows.gather(1, second)
    alone = largest == -torch.inf
    largest = largest.masked_fill(alone, 0.0)
    own = own - largest + (largest - largest)  # no number where m is infinite
    # The sum leaves out the runner-up's own 1, which would cost the digits that its log-odds depend on.
    log_rest = rows.sub_(largest).scatter_(1, second, -torch.inf).exp_().sum(1, keepdim=True).log_()
    total = log1p_exp(log_rest)
    other_total = torch.logaddexp(log_rest, own)
    # A label that is excluded too, or no number, makes one of these no number.
    odds = torch.where(alone, own + torch.inf, own - total)
    other = -torch.where(alone, own + torch.inf, other_total)
    return Reduced(odds.squeeze(1), other.squeeze(1), index, second, total, other_total, own)


def log1p_exp(value: Tensor) -> Tensor:
    """log(1 + exp(value)), exact to the last digit; torch's softplus returns its argument beyond 20."""
    return torch.logaddexp(value, torch.zeros_like(value))


def gradient(rows: Tensor, reduced: Reduced, own: Tensor, other: Tensor | None, *, in_place: bool) -> Tensor:
    """The gradient by the logits of ``own * d_y + other * d_v``, from rows that `reduce_` has overwritten.

    Args:
        rows: ``[n, V]``.
        reduced: What `reduce_` returned.
        own: ``[n]``, the slope by the label's log-odds.
        other: ``[n]``, the slope by the runner-up's log-odds, or None.
        in_place: Whether to overwrite the rows.
    """
    first = own[:, None]
    if other is None or reduced.runner_up is None or reduced.other_total is None:
        # At least 1, unless there is nothing but the label.
        shares = -first / reduced.total.clamp_min(1.0)
        result = rows.mul_(shares) if in_place else rows * shares
        return result.scatter_(1, reduced.place, first)
    second = other[:, None]
    # The exponential of a runner-up's log-odds overflows where it is nearly certain, and what it multiplies underflows.
    # So each of the two is multiplied by the root of that exponential. Below the clamp all that it multiplies is 0.
    likely = reduced.other_total.clamp(-110.0 if rows.dtype == torch.float32 else -760.0, 0.0)
    root = (-0.5 * likely).exp()
    shares = -(first * (-reduced.total).exp() / root + second * (-reduced.other_total.clamp_min(0.0)).exp() * root)
    result = rows.mul_(root).mul_(shares) if in_place else rows * root * shares
    share = (reduced.label - reduced.other_total).exp().masked_fill(reduced.label == -torch.inf, 0.0)
    # The label last: where all others are minus infinity, the first of them may be taken for the runner-up.
    result.scatter_(1, reduced.runner_up, second - first * (-reduced.total).exp())
    return result.scatter_(1, reduced.place, first - second * share)
