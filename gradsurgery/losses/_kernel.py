"""Log-odds of rows of logits, and their gradients, by kernels: one in C++ on a CPU, Triton's on a GPU where chosen.

Where they are not `usable`, ``reduce_`` and ``gradient`` of `_log_odds` do the same in plain PyTorch. The tests compare
them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.losses import _odds_kernel
from gradsurgery.losses._backend import by_triton, worth_a_kernel
from gradsurgery.losses._log_odds import log1p_exp

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Statistics(NamedTuple):
    """What is found in rows of logits, tensors ``[n]`` in float32.

    m is the largest logit that is not the label's, or 0 where all of those are minus infinity.

    Attributes:
        own: Log-odds of the label.
        other: Log-odds of the runner-up.
        largest: m.
        runner_up: The token with the logit m, the first of equals.
        label: z_y - m.
        total: log of the sum of exp(z - m) over all tokens but the label.
        other_total: The same over all but the runner-up.
        labels: The labels, int64.
        scale: As `reduce` was given it.
        softcap: As `reduce` was given it.
    """

    own: Tensor
    other: Tensor
    largest: Tensor
    runner_up: Tensor
    label: Tensor
    total: Tensor
    other_total: Tensor
    labels: Tensor
    scale: float
    softcap: float | None


def usable(logits: Tensor) -> bool:
    """Whether a kernel takes these rows, and is worth calling."""
    if by_triton(logits) is not None:
        return logits.dtype in _TYPES and logits.is_contiguous()
    return compiled(logits)


def compiled(logits: Tensor) -> bool:
    """Whether that kernel is the one in C++, which writes gradients elsewhere too, and takes labels -100."""
    return worth_a_kernel(logits)


def reduce(logits: Tensor, labels: Tensor, scale: float, softcap: float | None) -> Statistics:
    """Read ``[n, V]`` raw logits once, scaled, capped and in float32 as they are read; they are not changed."""
    labels = labels.long().contiguous()
    largest, rest, label, runner_up = _kernels(logits).reduce(logits, labels, scale, softcap)
    alone = (largest == -torch.inf) & (rest == 0.0)  # a NaN is passed over by the first, and shows in the second
    largest = largest.masked_fill(alone, 0.0)
    log_rest, label = rest.log(), label - largest
    total, other_total = log1p_exp(log_rest), torch.logaddexp(log_rest, label)
    # A label that is excluded too, or no number, makes one of these no number.
    own = torch.where(alone, label + torch.inf, label - total)
    other = -torch.where(alone, label + torch.inf, other_total)
    return Statistics(own, other, largest, runner_up, label, total, other_total, labels, scale, softcap)


def gradient_(
    logits: Tensor, statistics: Statistics, own: Tensor, other: Tensor | None, to: Tensor | None = None
) -> None:
    """Overwrite raw logits by the gradient of ``own * d_y + other * d_v`` with respect to them.

    Args:
        logits: ``[n, V]``, those that `reduce` has read.
        statistics: What `reduce` returned.
        own: ``[n]``, the slope by the labels' log-odds.
        other: ``[n]``, the slope by the runners-up's log-odds, or None.
        to: What to write instead of the logits, where the kernel is `compiled`.
    """
    own = own.contiguous()  # the kernel reads number n at place n, and a slope may be an expanded tensor
    other = None if other is None else other.contiguous()
    at_label, at_runner_up = own, -own * (-statistics.total).exp()
    if other is not None:
        share = (statistics.label - statistics.other_total).exp()
        at_label = at_label - other * share.masked_fill(statistics.label == -torch.inf, 0.0)
        at_runner_up = at_runner_up + other
    arguments = (
        logits,
        statistics.largest,
        # Exponents instead of factors: the factor of a runner-up that is nearly certain would overflow.
        (statistics.total, own),
        None if other is None else (statistics.other_total, other),
        ((statistics.labels, at_label), (statistics.runner_up, at_runner_up)),
        (statistics.scale, statistics.softcap),
    )
    _kernels(logits).gradient_(*arguments, **({} if to is None else {"to": to}))


def _kernels(logits: Tensor) -> Any:
    kernels = by_triton(logits) or _odds_kernel.built()
    if isinstance(kernels, str):
        raise RuntimeError(f"expected a kernel, found that {kernels}; `usable` tells")
    return kernels
