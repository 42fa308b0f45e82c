# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""Triton kernels over rows of logits.

One program per row reads every element once and, for the gradient, writes it once in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether Triton runs in its interpreter (TRITON_INTERPRET=1), on CPU tensors: tests without a GPU."""

_BLOCK = 4096
_WARPS = 8


def reduce(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over rows of logits z ``[n, V]``.

    Returns:
        The largest logit m of the tokens that are not the label, the sum of exp(z - m) over those tokens without the
        largest itself, the label's logit, and the place of m; ``[n]`` each.
    """
    rows, width = logits.shape
    largest, rest, label = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    runner_up = torch.empty(rows, dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device, wherever the tensors are
        _reduce[(rows,)](
            logits, labels, largest, rest, label, runner_up, width, scale, softcap or 1.0,
            CAPPED=softcap is not None, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return largest, rest, label, runner_up


def gradient_(
    logits: Tensor,
    largest: Tensor,
    own: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor] | None,
    at: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    scaling: tuple[float, float | None],
) -> None:
    """Overwrite logits z by -(a exp(z - m - s) + b exp(z - m - t)), and by given numbers at two places of each row.

    Args:
        logits: ``[n, V]``, raw.
        largest: m, ``[n]``.
        own: (s, a), ``[n]`` each.
        other: (t, b), ``[n]`` each, or None for b = 0.
        at: (place, number) for the label and for the runner-up, ``[n]`` each.
        scaling: The number by which logits are multiplied, and the one at which they are capped.
    """
    rows, width = logits.shape
    (labels, at_label), (runner_up, at_runner_up) = at
    scale, softcap = scaling
    second = other or own
    with torch.cuda.device_of(logits):
        _gradient[(rows,)](
            logits, labels, runner_up, largest, *own, *second, at_label, at_runner_up, width, scale, softcap or 1.0,
            CAPPED=softcap is not None, BOTH=other is not None, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip


@triton.jit
def _capped(z, scale, cap, CAPPED: tl.constexpr):
    z = z * scale
    if CAPPED:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)  # tanh, with the functions that every Triton has
    return z


@triton.jit
def _reduce(
    logits, labels, largest, rest, at_label, runner_up, width, scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    start = logits + row.to(tl.int64) * width
    lanes = tl.arange(0, BLOCK)
    # Each lane keeps its own largest logit, its place, and the sum of the others relative to it. That takes one
    # exponential per element, and no exchange between lanes before the end.
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        columns = begin + lanes
        counts = (columns < width) & (columns != label)
        z = _capped(tl.load(start + columns, mask=counts, other=0.0).to(tl.float32), scale, cap, CAPPED)
        z = tl.where(counts, z, -float("inf"))
        share = tl.where(z == -float("inf"), 0.0, tl.exp(-tl.abs(z - top)))
        larger = z > top
        total = tl.where(
            larger, (total + 1.0) * share, total + share
        )  # a NaN ends up here, whatever the comparison says
        where = tl.where(larger, columns.to(tl.int64), where)
        top = tl.where(larger, z, top)
    most = tl.max(top, 0)
    first = tl.min(tl.where(top == most, where, width), 0)
    mine = (top == most) & (where == first)
    weight = tl.where(top == -float("inf"), 0.0, tl.exp(top - most))
    total = tl.sum(weight * tl.where(mine | (weight == 0.0), total, total + 1.0), 0)
    own = _capped(tl.load(start + label).to(tl.float32), scale, cap, CAPPED)
    tl.store(largest + row, most)
    tl.store(rest + row, total)
    tl.store(at_label + row, own)
    tl.store(runner_up + row, first)


@triton.jit
def _gradient(
    logits, labels, runner_up, largest, shift, slope, other_shift, other_slope, at_label, at_runner_up, width, scale, cap,
    CAPPED: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * width
    label, second, most = tl.load(labels + row), tl.load(runner_up + row), tl.load(largest + row)
    s, a = tl.load(shift + row), tl.load(slope + row)
    t, b = tl.load(other_shift + row), tl.load(other_slope + row)
    one, two = tl.load(at_label + row), tl.load(at_runner_up + row)
    for begin in range(0, width, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < width
        z = _capped(tl.load(start + columns, mask=inside, other=0.0).to(tl.float32), scale, cap, CAPPED)
        distance = z - most  # exact and small, while z - (m + s) is exact to three decimals only for logits near 1e4
        found = -a * tl.exp(distance - s)
        if BOTH:  # what underflows is no part of the sum whose logarithm is t, and may be far above it
            found -= tl.where(tl.exp(distance) == 0.0, 0.0, b * tl.exp(distance - t))
        found = tl.where(columns == label, one, tl.where(columns == second, two, found)) * scale
        if CAPPED:
            found *= 1.0 - (z / cap) * (z / cap)
        tl.store(start + columns, found, mask=inside)
