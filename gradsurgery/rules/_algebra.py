"""What several rules share: the decorator `of_gram`, and small functions of Gram matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def of_gram(function: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Make a function of a finite float64 Gram matrix a rule.

    The rule checks the matrix, converts it to float64 and detaches it. Where a matrix ``[K, K]`` of a batch
    contains NaN or inf, its coefficients are NaN; the function sees the identity in its place.

    Raises:
        ValueError: When the rule is called, if the matrix is not ``[..., K, K]`` with K >= 1.
        TypeError: When the rule is called, if the matrix is not a real floating-point tensor.

    Example:
        >>> @of_gram
        ... def average(gram):
        ...     return torch.full_like(gram[..., 0], 1 / gram.shape[-1])
        >>> average(torch.eye(2))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    @functools.wraps(function)
    def wrapped(gram: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
            raise ValueError(f"gram: expected [..., K, K] with K >= 1, found {list(gram.shape)}")
        if not gram.is_floating_point():
            raise TypeError(f"gram: expected a real floating-point matrix, found {gram.dtype}")
        gram = gram.detach().double()
        finite = gram.isfinite().all(-1).all(-1)
        # Not an if: a branch on a tensor would make the host wait for the device.
        gram = torch.where(
            finite[..., None, None], gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        )
        return torch.where(finite[..., None], function(gram, *args, **kwargs), torch.nan)

    return wrapped


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, with 0 where the denominator is 0."""
    zero = denominator == 0.0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def norms_of(gram: Tensor) -> Tensor:
    """The lengths of the rows, ``[..., K]``."""
    return gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()


def normalised(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines ``[..., K, K]`` and the norms ``[..., K]``. All cosines of a zero row are 0, with itself too."""
    norms = norms_of(gram)
    inverse = ratio(torch.ones_like(norms), norms)
    return gram * inverse[..., :, None] * inverse[..., None, :], norms


def scaled(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix divided by its trace, and the trace ``[..., 1, 1]``.

    A scale-free rule that works on the quotient neither underflows nor overflows, for rows of lengths 1e-150 to 1e150.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return ratio(gram, trace.expand_as(gram)), trace


def with_first(first: Tensor, others: Tensor) -> Tensor:
    """Coefficients ``[..., K]`` from the forget row's ``[...]`` and the protected rows' ``[..., K-1]``."""
    return torch.cat([first[..., None], others], -1)


def unit_forget(multipliers: Tensor, norms: Tensor) -> Tensor:
    """Coefficients (1, b) ``[..., K]`` of the rows, from coefficients ``[..., K-1]`` of normalised protected rows.

    The argument ``multipliers`` belongs to the problem in which every row is divided by its norm.
    """
    return with_first(torch.ones_like(norms[..., 0]), ratio(multipliers * norms[..., :1], norms[..., 1:]))


def pinv(matrix: Tensor) -> Tensor:
    """The pseudo-inverse of a symmetric matrix; eigenvalues below m * 1e-14 of the largest count as 0."""
    return torch.linalg.pinv(matrix, hermitian=True, rtol=matrix.shape[-1] * 1e-14) if matrix.shape[-1] else matrix


def vaccinated(gram: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """GradVac's coefficients for targets ``[..., K-1]``, and the cosine of the mixed row with each protected row.

    The mixed row is the forget row with the corrections so far. Its cosine with row k, in ``[..., K-1]``, is taken just
    before row k corrects it.
    """
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
