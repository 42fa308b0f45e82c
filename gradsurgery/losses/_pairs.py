r"""Two distributions over the vocabulary, p and q, a block of rows at a time: their divergence, cross-entropy, and p - q.

With half the log ratio :math:`h = \tfrac12 \log(p/q)`, the difference is :math:`p - q = (p + q) \tanh h`: no digit is lost where p and q
nearly agree, and nothing overflows where they do not. The divergence of q from p is the sum of :math:`p - q - q \log(p/q)`, no
term of which is negative; a term is :math:`(p + q)(\tanh h - h + h \tanh h)`, with tanh h - h by its series where h is small.

On a CPU a tanh takes a quarter of an ``expm1``, arithmetic a tenth, and a choice by a mask (``where``, ``masked_fill``) as much as
twenty of them: hence no masks where there is nothing to mask, and buffers that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradsurgery.losses._log_odds import float_type

BLOCKS = {"cpu": 2**17, "other": 2**24}
"""Logits worked on at once, in six float32 buffers. On a CPU half a MiB each: smaller ones pay for every call, larger ones leave the second
cache. Elsewhere a block must outlast the launch of its kernels."""

Room: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def blocks(logits: Tensor) -> Iterator[tuple[slice, Room]]:
    """Slices of the rows, and room ``[n, V]`` to work on each of them in."""
    rows = max(1, BLOCKS.get(logits.device.type, BLOCKS["other"]) // logits.shape[1])
    room = logits.new_empty(6, min(rows, len(logits)), logits.shape[1], dtype=float_type(logits.dtype)).unbind()
    for start in range(0, len(logits), rows):
        if len(logits) - start < len(room[0]):
            room = tuple(buffer[: len(logits) - start] for buffer in room)
        yield slice(start, start + rows), room  # pyright: ignore[reportReturnType] (unbind's length is not in its type)


class Totals(NamedTuple):
    """What is left of a block of logits and reference logits, ``[n, 1]`` each: with it a second visit needs no reductions.

    Attributes:
        top: The largest logit.
        reference_top: That of the reference.
        share: What p's exponentials are multiplied by to be in q's unit.
        of_q: That unit, the sum of q's exponentials.
        shift: Half the share's logarithm.
    """

    top: Tensor
    reference_top: Tensor
    share: Tensor
    of_q: Tensor
    shift: Tensor


class Pair:
    """A block of rows of p and q, ``[n, V]``; without a reference q is uniform.

    Its questions can be asked once each, in the order in which they stand here.

    Args:
        logits: ``[n, V]``; they stay as they are.
        reference: ``[n, V]`` or None.
        room: What it works in.
        lowered: Tokens ``[n]``, and what is taken off their reference logits.
        totals: What an earlier visit of these rows found.
    """

    def __init__(
        self,
        logits: Tensor,
        reference: Tensor | None,
        room: Room,
        lowered: tuple[Tensor, float] | None = None,
        totals: Totals | None = None,
    ) -> None:
        self._room = room
        self._flat = reference is None
        model, other, p, q, *_ = room
        _, top = shifted(logits, model, totals and totals.top)
        torch.exp(model, out=p)
        if reference is None:
            self._q, reference_top = top.new_ones(1, 1), top
        else:
            reference_top = _lowered(reference, other, totals and totals.reference_top, lowered)
            self._q = torch.exp(other, out=q)
        if totals is None:
            self._of_p = p.sum(1, keepdim=True)
            of_q = torch.full_like(top, logits.shape[1]) if reference is None else q.sum(1, keepdim=True)
            share = of_q / self._of_p
            totals = Totals(top, reference_top, share, of_q, share.log().mul_(0.5))
        self.totals = totals
        self._compared = self._added = self._bent = False

    def cross_entropy(self) -> Tensor:
        """Sum of q (-log p), ``[n]``."""
        model, _, p, _, free, _ = self._room
        # The fractions leave out the 1 of a token that is certain: with it the sum's logarithm would round to 0.
        rest = torch.frac(p, out=free).sum(1, keepdim=True)
        log_total = torch.where(self._of_p < 2.0, rest.log1p(), self._of_p.log())
        return (log_total - _sums(torch.mul(model, self._q, out=free), self._q) / self.totals.of_q).squeeze(1)

    def divergence(self) -> Tensor:
        """Sum of q log(q/p), ``[n]``."""
        half, tangent, both, _, one, other = self._room
        self._compare()
        first = half if self._flat else torch.mul(half, self._q, out=one)
        values = _sums(first, self._q).mul_(-2.0) / self.totals.of_q
        # Only a CPU can be asked. A sum of both signs has its last digits too where it is not small; a NaN is not large.
        if half.device.type == "cpu" and bool((values >= LARGE).all()):
            return values.squeeze(1)
        self._add()
        torch.tanh(half, out=tangent)
        self._bent = True
        near = torch.clamp(half, -NEAR, NEAR, out=one)
        beyond = _sums(half.sub_(near).mul_(self._q), self._q)
        terms = _terms(near, tangent, other, out=half)
        values = _sums(terms.mul_(both), both).sub_(beyond, alpha=2.0)
        return values.div_(self.totals.of_q).squeeze(1)

    def difference(self, outer: Tensor, out: Tensor) -> None:
        """Write p - q, its rows multiplied by ``outer`` ``[n]``, into ``out`` ``[n, V]``."""
        half, tangent, both, *_ = self._room
        self._compare()
        self._add()
        row = tangent if self._bent else half.tanh_()
        # An exact row sums to 0. What this one sums to is the rounding of the totals, which would drown distributions 1e-4 apart.
        excess = _sums(row.mul_(both), both) / self.totals.of_q
        if self._flat:
            row.sub_(excess)
        else:
            row.addcmul_(self._q, excess, value=-1.0)
        scale = outer[:, None] / self.totals.of_q
        if out.dtype == row.dtype:
            torch.mul(row, scale, out=out)
        else:
            out.copy_(row.mul_(scale))

    def _compare(self) -> None:
        """Half the log ratio, where p's logits were."""
        if self._compared:
            return
        self._compared = True
        half, other, *_ = self._room
        # The logits' difference first: it is exact where they are close, which a difference of two log-probabilities is not.
        torch.add(self.totals.shift, half if self._flat else half.sub_(other), alpha=0.5, out=half)

    def _add(self) -> None:
        """Both distributions, p + q in q's unit, where p was."""
        if self._added:
            return
        self._added = True
        p = self._room[2]
        if self._flat:  # addcmul of two numbers a row takes a CPU four times as long as of one
            p.mul_(self.totals.share).add_(1.0)
        else:
            torch.addcmul(self._q, p, self.totals.share, out=p)


def shifted(logits: Tensor, out: Tensor, top: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits less the largest, and that: a difference of logits is exact where a logsumexp of 1e4 has three decimals."""
    rows = logits if logits.dtype == out.dtype else out.copy_(logits)
    if top is None:
        top = rows.amax(1, keepdim=True)
    return torch.sub(rows, top, out=out), top


def _lowered(logits: Tensor, out: Tensor, top: Tensor | None, lowered: tuple[Tensor, float] | None) -> Tensor:
    if lowered is None:
        return shifted(logits, out, top)[1]
    index, beta = lowered[0][:, None], lowered[1]
    out.copy_(logits)
    label = out.gather(1, index)
    if top is None:
        top = out.scatter_(1, index, -torch.inf).amax(1, keepdim=True).maximum(label - beta)
    out.sub_(top).scatter_(1, index, (label - top).sub_(beta))
    return top


LARGE = 0.25
"""Divergences of which four roundings of a total of 1 are not more than sixteen of their own."""
NEAR = 0.125
"""Half log ratios up to which tanh h - h comes from its series; beyond, the difference loses at most three bits."""
_SERIES = (-1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075, -929569 / 638512875)
"""tanh h = h + h^3 (c_0 + c_1 h^2 + ...). The first one left out is 1e-8 of h tanh h after three terms, and 2e-17 after seven."""


def _terms(near: Tensor, tangent: Tensor, free: Tensor, out: Tensor) -> Tensor:
    """A in p - q - q log(p/q) = (p + q) A - 2 q (h - near), where ``near`` is h kept within -1/8 and 1/8.

    The tangent is split as h is, so that no element has to be told apart: within, A = (tanh h - h) + h tanh h and there is nothing else;
    beyond, A does not grow with h, for p log(p/q) is no part of the divergence.
    """
    square = torch.square(near, out=free)
    *coefficients, last = _SERIES[: 3 if near.dtype == torch.float32 else 7]
    torch.mul(square, last, out=out)
    for coefficient in reversed(coefficients):
        out.add_(coefficient).mul_(square)
    out.add_(tangent).mul_(near)
    return out.add_(torch.ops.aten.softshrink.out(tangent, math.tanh(NEAR), out=free))


def _sums(product: Tensor, weight: Tensor) -> Tensor:
    """Sums ``[n, 1]`` of products with a weight, which are 0 where the weight is 0, though its factor be infinite or NaN."""
    sums = product.sum(1, keepdim=True)
    # A CPU can see that there is nothing to mask. A NaN does not equal 0, and stays.
    if product.device.type != "cpu" or not math.isfinite(sums.sum().item()):
        sums = product.masked_fill_(weight == 0.0, 0.0).sum(1, keepdim=True)
    return sums
