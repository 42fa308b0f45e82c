"""The row kernel's door: log-odds and gradients of rows of logits in place, by Triton where there is a GPU.

Where this is not usable, `reduce_` and `gradient` of `_log_odds` do the same in plain PyTorch; they are its oracle.
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
    """Of rows of logits, each ``[n]`` and float32; m is the largest logit that is not the label's.

    Attributes:
        own: Log-odds of the label.
        other: Log-odds of the runner-up.
        largest: m.
        runner_up: Its index, the first of equals.
        label: z_y - m.
        total: log of the sum of exp(z - m) over all but the label.
        other_total: The same over all but the runner-up.
    """

    own: Tensor
    other: Tensor
    largest: Tensor
    runner_up: Tensor
    label: Tensor
    total: Tensor
    other_total: Tensor


def usable(logits: Tensor) -> bool:
    """Whether the kernels can take these rows."""
    # The environment first: on a CPU nobody shall wait for an import of Triton.
    if not (logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    return logits.dtype in _TYPES and logits.is_contiguous() and _kernels() is not None


def reduce(logits: Tensor, labels: Tensor, scale: float, softcap: float | None) -> Statistics:
    """One pass over ``[n, V]`` raw logits; they are scaled, capped and computed in float32 as they are read, and stay as they are."""
    kernels = _kernels()
    if kernels is None:
        raise RuntimeError("expected Triton, which is not installed; `usable` tells")
    largest, rest, label, runner_up = kernels.reduce(logits, labels, scale, softcap)
    log_rest, label = rest.log(), label - largest
    total, other_total = log1p_exp(log_rest), torch.logaddexp(log_rest, label)
    return Statistics(label - total, -other_total, largest, runner_up, label, total, other_total)


def gradient_(
    logits: Tensor,
    labels: Tensor,
    found: Statistics,
    own: Tensor,
    other: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """Overwrite raw logits by the gradient of ``own * d_y + other * d_v`` with respect to them."""
    kernels = _kernels()
    if kernels is None:
        raise RuntimeError("expected Triton, which is not installed; `usable` tells")
    own = own.contiguous()  # the kernel reads number n at n, and a slope may be an expanded one
    other = None if other is None else other.contiguous()
    at_label, at_runner_up = own, -own * (-found.total).exp()
    if other is not None:
        at_label = at_label - other * (found.label - found.other_total).exp()
        at_runner_up = at_runner_up + other
    # Exponents and not factors: a factor overflows for a runner-up that is nearly certain.
    kernels.gradient_(
        logits,
        labels,
        found.runner_up,
        found.largest,
        (found.total, own),
        None if other is None else (found.other_total, other),
        (at_label, at_runner_up),
        scale,
        softcap,
    )


@cache
def _kernels() -> Any:
    try:
        from gradsurgery.losses import _triton
    except ImportError:
        return None
    return _triton
