r"""Two distributions $p$ and $q$ over the vocabulary, one block of rows at a time: divergence, cross-entropy, $p - q$.

With half the log ratio $h = \tfrac12 \log(p/q)$, the difference is $p - q = (p + q) \tanh h$. No digit is lost where
$p$ and $q$ nearly agree, and nothing overflows where they do not. Where they are far apart, $p - q$ itself is as exact
and takes a fifth of the time. The divergence of $q$ from $p$ is the sum of
$p - q - q \log(p/q)$, no term of which is negative. A term equals $(p + q)(\tanh h - h + h \tanh h)$, with
$\tanh h - h$ by its series where $h$ is small.

On a CPU one tanh takes a quarter of the time of an ``expm1``, one addition or product a tenth, and a choice by a mask
(``where``, ``masked_fill``) as long as twenty of those. So nothing is masked where there is nothing to mask, and the
buffers stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradsurgery.losses._checks import float_type

BLOCKS = {"cpu": 2**17, "other": 2**24}
"""Logits worked on at once, in six float32 buffers. On a CPU a buffer is half a MiB: with smaller ones the calls take
most of the time, and larger ones do not fit into the second cache. Elsewhere a block must take longer than the launch
of its kernels."""

Room: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Six buffers ``[n, V]`` for intermediate results."""


def blocks(logits: Tensor) -> Iterator[tuple[slice, Room]]:
    """Slices of the rows, each with the buffers for it; all slices share the same memory."""
    rows = max(1, BLOCKS.get(logits.device.type, BLOCKS["other"]) // logits.shape[1])
    room = logits.new_empty(6, min(rows, len(logits)), logits.shape[1], dtype=float_type(logits.dtype)).unbind()
    for start in range(0, len(logits), rows):
        if len(logits) - start < len(room[0]):
            room = tuple(buffer[: len(logits) - start] for buffer in room)
        yield slice(start, start + rows), room  # pyright: ignore[reportReturnType] (unbind's length is not in its type)


class Totals(NamedTuple):
    """Five numbers per row, ``[n, 1]`` each, that save a second `Pair` of the same rows all sums over the vocabulary.

    Attributes:
        top: The largest logit.
        reference_top: The largest logit of the reference.
        share: The factor from the exponentials of p to the scale of those of q: ``of_q`` / sum of p's exponentials.
        of_q: The sum of q's exponentials.
        shift: Half the logarithm of ``share``.
    """

    top: Tensor
    reference_top: Tensor
    share: Tensor
    of_q: Tensor
    shift: Tensor


class Pair:
    """A block of rows of p and q, ``[n, V]``; without a reference q is uniform.

    The methods overwrite the buffers. Call each at most once, and in the order in which they are defined.

    Args:
        logits: ``[n, V]``; they are not changed.
        reference: ``[n, V]`` or None.
        room: The buffers.
        lowered: Tokens ``[n]``, and the number by which their reference logits are lowered.
        totals: The ``totals`` of an earlier `Pair` of the same rows, if there was one.
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
        # The fractional parts leave out the 1 of a token that is certain: with it the logarithm of the sum would round
        # to 0.
        rest = torch.frac(p, out=free).sum(1, keepdim=True)
        log_total = torch.where(self._of_p < 2.0, rest.log1p(), self._of_p.log())
        return (log_total - _sums(torch.mul(model, self._q, out=free), self._q) / self.totals.of_q).squeeze(1)

    def divergence(self) -> Tensor:
        """Sum of q log(q/p), ``[n]``."""
        half, tangent, both, _, one, other = self._room
        self._compare()
        first = half if self._flat else torch.mul(half, self._q, out=one)
        values = _sums(first, self._q).mul_(-2.0) / self.totals.of_q
        # A sum of terms of both signs is exact enough if it is large. Only on a CPU is it cheap to look; a NaN is not
        # large.
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
        half, tangent, both, _, plain, _ = self._room
        scale = outer[:, None] / self.totals.of_q
        if not self._added and self._subtract(plain):
            _write(plain, scale, out)
            return
        self._compare()
        self._add()
        row = tangent if self._bent else half.tanh_()
        # An exact row sums to 0. The sum of this one is the rounding error of the totals. Left in, it would hide the
        # difference of distributions that are only 1e-4 apart.
        excess = _sums(row.mul_(both), both) / self.totals.of_q
        if self._flat:
            row.sub_(excess)
        else:
            row.addcmul_(self._q, excess, value=-1.0)
        _write(row, scale, out)

    def _subtract(self, row: Tensor) -> bool:
        """Write p - q, in the scale of q's exponentials, as it is into ``row``. Returns whether that is exact enough.

        The difference is off by a rounding of p + q. That is few roundings of the difference where its length is not
        small beside theirs. Only on a CPU is it cheap to look; a NaN is small.
        """
        if row.device.type != "cpu":
            return False
        torch.mul(self._room[2], self.totals.share, out=row).sub_(1.0 if self._flat else self._q)
        # No exponential is larger than 1, or than share, and so no square is larger than that times the exponential.
        longest = (self.totals.of_q * (1.0 + self.totals.share)).sqrt_()
        return bool((torch.linalg.vector_norm(row, dim=1, keepdim=True) >= APART * longest).all())

    def _compare(self) -> None:
        """Overwrite p's logits by half the log ratio."""
        if self._compared:
            return
        self._compared = True
        half, other, *_ = self._room
        # First the difference of the logits: it is exact if they are close, unlike a difference of two
        # log-probabilities.
        torch.add(self.totals.shift, half if self._flat else half.sub_(other), alpha=0.5, out=half)

    def _add(self) -> None:
        """Overwrite p's exponentials by p + q, in the scale of q's exponentials."""
        if self._added:
            return
        self._added = True
        p = self._room[2]
        if self._flat:  # on a CPU addcmul with two numbers per row takes four times as long as with one
            p.mul_(self.totals.share).add_(1.0)
        else:
            torch.addcmul(self._q, p, self.totals.share, out=p)


def _write(row: Tensor, scale: Tensor, out: Tensor) -> None:
    if out.dtype == row.dtype:
        torch.mul(row, scale, out=out)
    else:
        out.copy_(row.mul_(scale))


def shifted(logits: Tensor, out: Tensor, top: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The logits minus the largest of their row, and that one: exact, while a logsumexp of 1e4 has three decimals."""
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
"""Divergences of at least this size are the plain sum of q log(q/p). Rounding puts it off by about four roundings of 1;
for a divergence of a quarter or more that is at most sixteen roundings of the divergence itself."""
APART = 1 / 32
"""Where p - q is at least this long, beside what p and q can be, it is their plain difference, which is off by at most
64 roundings of its length."""
NEAR = 0.125
"""Half log ratios h up to this size take tanh h - h from its series; beyond, the difference loses up to three bits."""
_SERIES = (-1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075, -929569 / 638512875)
"""tanh h = h + h^3 (c_0 + c_1 h^2 + ...). Relative to h tanh h, the first term left out is 1e-8 after three terms
(float32) and 2e-17 after seven (float64)."""


def _terms(near: Tensor, tangent: Tensor, free: Tensor, out: Tensor) -> Tensor:
    r"""The factor $A$ in $p - q - q \log(p/q) = (p + q) A - 2 q (h - h_0)$, with $h_0$ (``near``) $h$ clamped to ±1/8.

    The tangent is split in the same way (softshrink), so that no element needs a case of its own. Within the limits
    $h = h_0$ and $A = (\tanh h - h) + h \tanh h$. Beyond them $A$ does not grow with $h$, because $p \log(p/q)$ is no
    part of the divergence.
    """
    square = torch.square(near, out=free)
    *coefficients, last = _SERIES[: 3 if near.dtype == torch.float32 else 7]
    torch.mul(square, last, out=out)
    for coefficient in reversed(coefficients):
        out.add_(coefficient).mul_(square)
    out.add_(tangent).mul_(near)
    return out.add_(torch.ops.aten.softshrink.out(tangent, math.tanh(NEAR), out=free))


def _sums(product: Tensor, weight: Tensor) -> Tensor:
    """Sums ``[n, 1]`` of products with a weight; 0 times anything counts as 0, also times infinity or NaN."""
    sums = product.sum(1, keepdim=True)
    # On a CPU it is cheap to see that there is nothing to mask. A weight that is NaN does not equal 0, so its NaN
    # stays.
    if product.device.type != "cpu" or not math.isfinite(sums.sum().item()):
        sums = product.masked_fill_(weight == 0.0, 0.0).sum(1, keepdim=True)
    return sums
