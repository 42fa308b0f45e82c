"""Log-odds of rows of logits, and their gradients in place, by Triton kernels where there is a GPU.

Where the kernels are not `usable`, ``reduce_`` and ``gradient`` of `_log_odds` do the same in plain PyTorch. The tests
compare the two.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.losses._log_odds import log1p_exp

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Statistics(NamedTuple):
    """What the gradient needs of rows of logits, tensors ``[n]`` in float32.

    m is the largest logit that is not the label's.

    Attributes:
        own: Log-odds of the label.
        other: Log-odds of the runner-up.
        largest: m.
        runner_up: The token with the logit m, the first of equals.
        label: z_y - m.
        total: log of the sum of exp(z - m) over all tokens but the label.
        other_total: The same over all but the runner-up.
        labels: The labels, as `reduce` was given them.
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
    """Whether the kernels can take these rows."""
    # Looked at first, so that nobody with a CPU waits for an import of Triton.
    if not (logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    return logits.dtype in _TYPES and logits.is_contiguous() and _kernels() is not None


def reduce(logits: Tensor, labels: Tensor, scale: float, softcap: float | None) -> Statistics:
    """Read ``[n, V]`` raw logits once, scaled, capped and in float32 as they are read; they are not changed."""
    largest, rest, label, runner_up = _required().reduce(logits, labels, scale, softcap)
    log_rest, label = rest.log(), label - largest
    total, other_total = log1p_exp(log_rest), torch.logaddexp(log_rest, label)
    return Statistics(
        label - total, -other_total, largest, runner_up, label, total, other_total, labels, scale, softcap
    )


def gradient_(logits: Tensor, statistics: Statistics, own: Tensor, other: Tensor | None) -> None:
    """Overwrite raw logits by the gradient of ``own * d_y + other * d_v`` with respect to them.

    Args:
        logits: ``[n, V]``, those that `reduce` has read.
        statistics: What `reduce` returned.
        own: ``[n]``, the slope by the labels' log-odds.
        other: ``[n]``, the slope by the runners-up's log-odds, or None.
    """
    own = own.contiguous()  # the kernel reads number n at place n, and a slope may be an expanded tensor
    other = None if other is None else other.contiguous()
    at_label, at_runner_up = own, -own * (-statistics.total).exp()
    if other is not None:
        at_label = at_label - other * (statistics.label - statistics.other_total).exp()
        at_runner_up = at_runner_up + other
    _required().gradient_(
        logits,
        statistics.largest,
        # Exponents instead of factors: the factor of a runner-up that is nearly certain would overflow.
        (statistics.total, own),
        None if other is None else (statistics.other_total, other),
        ((statistics.labels, at_label), (statistics.runner_up, at_runner_up)),
        (statistics.scale, statistics.softcap),
    )


def _required() -> Any:
    kernels = _kernels()
    if kernels is None:
        raise RuntimeError("expected Triton, which is not installed; `usable` tells")
    return kernels


@cache
def _kernels() -> Any:
    try:
        from gradsurgery.losses import _triton
    except ImportError:
        return None
    return _triton
