# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""Triton kernels over rows of logits: one program a row, every element read once and, for the gradient, written once in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Triton runs in its interpreter (TRITON_INTERPRET=1): on CPU tensors, to test the kernels where there is no GPU."""

_BLOCK = 4096
_WARPS = 8


def reduce(
    logits: Tensor, labels: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest logit but the label's, sum of exp(z - it) over the rest (without it), the label's logit, and where the largest is."""
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
    labels: Tensor,
    runner_up: Tensor,
    largest: Tensor,
    own: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor] | None,
    at: tuple[Tensor, Tensor],
    scale: float,
    softcap: float | None,
) -> None:
    """Overwrite z by -(a exp(z - m - s) + b exp(z - m - t)), (s, a) being ``own``, (t, b) ``other``; by ``at`` at label and runner-up."""
    rows, width = logits.shape
    second = other or own
    with torch.cuda.device_of(logits):
        _gradient[(rows,)](
            logits, labels, runner_up, largest, *own, *second, *at, width, scale, softcap or 1.0,
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
    # Each lane keeps its own largest logit, where it was, and the sum of the others relative to it: one exponential an element, and no
    # exchange between lanes before the end.
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
        distance = z - most  # exact, and small: z - (m + s) would have three decimals for logits of 1e4
        found = -a * tl.exp(distance - s)
        if BOTH:
            found -= b * tl.exp(distance - t)
        found = tl.where(columns == label, one, tl.where(columns == second, two, found)) * scale
        if CAPPED:
            found *= 1.0 - (z / cap) * (z / cap)
        tl.store(start + columns, found, mask=inside)
