r"""The Jensen-Shannon divergence of two models and its gradient, one block of rows at a time.

With $u = \log(q/p)$, $s = \log(1 + e^{-|u|})$ and $m = \tfrac12 (p + q)$ it takes one logarithm for both:
$\log(p/m) = \log 2 - s - \max(u, 0)$ and $\log(q/m) = \log 2 - s - \max(-u, 0)$.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.losses._backward import check_first_derivative, rowwise
from gradsurgery.losses._checks import float_type
from gradsurgery.losses._pairs import Room, blocks, shifted

_EXCLUDED = -1e4
"""A log-probability whose exponential is 0 in every type, and that is finite: minus infinity times 0 is not 0."""
_LOG_2 = math.log(2.0)


class _Block(NamedTuple):
    """A block of rows ``[n, V]``: exponentials of p and q with their sums ``[n]``, log(p/m), u, and log 2 - s."""

    p: Tensor
    q: Tensor
    sum_p: Tensor
    sum_q: Tensor
    of_p: Tensor
    u: Tensor
    rest: Tensor


def jensen_shannon_(logits: Tensor, labels: object, reference: Tensor, weights: Tensor | None) -> Tensor:
    """Values ``[n]`` of logits, which are overwritten by the gradient of the weighted sum, given weights."""
    del labels
    values = logits.new_empty(len(logits), dtype=float_type(logits.dtype))
    for rows, block in _blocks(logits, reference):
        one, other = _halves(block)
        values[rows] = 0.5 * (one + other)
        if weights is not None:
            logits[rows] = _gradient(block, one, weights[rows])
    return values


def compare(logits: Tensor, reference: Tensor) -> Tensor:
    """Values ``[N]``; the reference is a constant."""
    return _JensenShannon.apply(logits, reference.detach())


class _JensenShannon(torch.autograd.Function):
    """The backward pass computes the rows again, so that nothing but the inputs is held."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor) -> Tensor:
        ctx.save_for_backward(logits, reference)
        return jensen_shannon_(logits, None, reference, None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_first_derivative()
        logits, reference = ctx.saved_tensors

        def gradient(outer: Tensor) -> Tensor:
            result = torch.empty_like(logits)
            for rows, block in _blocks(logits, reference):
                result[rows] = _gradient(block, _of_model(block), outer[rows])
            return result

        return rowwise(gradient, gradients[0]), None


def _blocks(logits: Tensor, reference: Tensor) -> Iterator[tuple[slice, _Block]]:
    for rows, room in blocks(logits):
        yield rows, _block(logits[rows], reference[rows], room)


def _block(logits: Tensor, reference: Tensor, room: Room) -> _Block:
    of_p, log_q, p, q, u, rest = room
    sum_p, sum_q = _log_softmax(logits, of_p, p), _log_softmax(reference, log_q, q)
    torch.sub(log_q, of_p, out=u)
    torch.abs(u, out=rest).neg_().exp_().log1p_().neg_().add_(_LOG_2)
    torch.clamp_min(u, 0.0, out=of_p).neg_().add_(rest)
    return _Block(p, q, sum_p, sum_q, of_p, u, rest)


def _log_softmax(logits: Tensor, log: Tensor, exponentials: Tensor) -> Tensor:
    """Log-probabilities, none below the one that excludes a token, and exponentials, into buffers; their sums."""
    rows, _ = shifted(logits, log)
    total = torch.exp(rows, out=exponentials).sum(1, keepdim=True)
    rows.sub_(total.log()).clamp_min_(_EXCLUDED)
    return total.squeeze(1)


def _halves(block: _Block) -> tuple[Tensor, Tensor]:
    """KL(p || m) and KL(q || m), ``[n]`` each."""
    of_q = block.u.clamp_max_(0.0).add_(block.rest)
    return _of_model(block), of_q.mul_(block.q).sum(1) / block.sum_q


def _of_model(block: _Block) -> Tensor:
    return (block.of_p * block.p).sum(1) / block.sum_p


def _gradient(block: _Block, of_model: Tensor, weights: Tensor) -> Tensor:
    return block.of_p.sub_(of_model[:, None]).mul_(block.p).mul_((0.5 * weights / block.sum_p)[:, None])
