"""Algebra on Gram matrices that several rules share, and the decorator that makes a function of one a rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def of_gram(function: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Check the matrix, compute in float64, and answer a non-finite matrix by NaN (its place is taken by the identity meanwhile)."""

    @functools.wraps(function)
    def wrapped(gram: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
            raise ValueError(f"gram: expected [..., K, K] with K >= 1, found {list(gram.shape)}")
        if not gram.is_floating_point():
            raise TypeError(f"gram: expected a real floating-point matrix, found {gram.dtype}")
        gram = gram.detach().double()
        finite = gram.isfinite().all(-1).all(-1)
        # torch.where and not an if: a branch on a tensor would make the device wait for the host.
        gram = torch.where(
            finite[..., None, None], gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        )
        return torch.where(finite[..., None], function(gram, *args, **kwargs), torch.nan)

    return wrapped


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, and 0 where the denominator is 0."""
    zero = denominator == 0.0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def norms_of(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()


def normalised(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines ``[..., K, K]`` (0 for a zero row, its own diagonal included) and the norms ``[..., K]``."""
    norms = norms_of(gram)
    inverse = ratio(torch.ones_like(norms), norms)
    return gram * inverse[..., :, None] * inverse[..., None, :], norms


def scaled(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix divided by its trace, so that rules without a unit of their own work from 1e-150 to 1e150, and the trace."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return ratio(gram, trace.expand_as(gram)), trace


def with_first(first: Tensor, others: Tensor) -> Tensor:
    return torch.cat([first[..., None], others], -1)


def unit_forget(multipliers: Tensor, norms: Tensor) -> Tensor:
    """Coefficients (1, b) from multipliers ``[..., K-1]`` of unit protected rows in units of the forget row's norm."""
    return with_first(torch.ones_like(norms[..., 0]), ratio(multipliers * norms[..., :1], norms[..., 1:]))


def pinv(matrix: Tensor) -> Tensor:
    return torch.linalg.pinv(matrix, hermitian=True, rtol=matrix.shape[-1] * 1e-14) if matrix.shape[-1] else matrix


def vaccinated(gram: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """GradVac's coefficients for targets ``[..., K-1]``, and the cosines ``[..., K-1]`` that it met on the way."""
    unit, norms = normalised(gram)
    mixed = torch.zeros_like(norms)
    mixed[..., 0] = 1.0
    cosines: list[Tensor] = []
    for k in range(1, gram.shape[-1]):
        length = (mixed * (unit @ mixed[..., None]).squeeze(-1)).sum(-1).clamp_min(0.0).sqrt()
        cosine = ratio((unit[..., k, :] * mixed).sum(-1), length).clamp(-1.0, 1.0)
        t = target[..., k - 1]
        lift = (
            length
            * (t * (1.0 - cosine.square()).sqrt() - cosine * (1.0 - t.square()).sqrt())
            / (1.0 - t.square()).sqrt()
        )
        mixed[..., k] += torch.where((cosine < t) & (norms[..., k] > 0.0), lift, 0.0)
        cosines.append(cosine)
    met = torch.stack(cosines, -1) if cosines else gram.new_zeros((*gram.shape[:-2], 0))
    return unit_forget(mixed[..., 1:], norms), met
