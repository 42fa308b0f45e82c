"""The two small optimisation problems behind the rules, solved exactly and batched, without a question to the host."""

from __future__ import annotations

import torch
from torch import Tensor

# Below this share of the rows' lengths a product is rounding noise of the float64 Gram matrix.
TOLERANCE = 1e-13
# Quadratic programs on unit rows are solved when their conditions hold to this, and eased by these ridges where they cannot.
ACCURACY = 1e-10
_RIDGES = (0.0, 1e-10, 1e-7, 1e-5)
# Enumerating every subset of K rows solves 2^K - 1 small systems.
_MOST_ENUMERATED_ROWS = 10


def multipliers_of(matrix: Tensor, products: Tensor) -> Tensor:
    r"""The multipliers of min |u - f|^2 s.t. <u, r_k> >= 0: :math:`\lambda \ge 0,\ M\lambda + q \ge 0,\ \lambda^T(M\lambda + q) = 0`.

    For the Gram matrix M ``[..., m, m]`` of unit rows (or zero rows) and q ``[..., m]``: exact where the conditions can be met to
    `ACCURACY`. Nearly dependent rows, whose M is semidefinite only up to the rounding of its products (1e-7 where the rows are float32),
    take the least of `_RIDGES` that lets them; <u, r_k> is then at least -sqrt(ridge) |f| |r_k|.
    """
    m = products.shape[-1]
    if m == 0:
        return products
    if m == 1:
        return (-products).clamp_min(0.0) / torch.where(matrix[..., 0] > 0.0, matrix[..., 0], 1.0)
    identity = torch.eye(m, dtype=matrix.dtype, device=matrix.device)
    # All ridges at once, because on an accelerator a larger batch costs nothing and a question to the host does.
    matrices = torch.stack([matrix + ridge * identity for ridge in _RIDGES])
    found = _active_set(matrices, products.expand(len(_RIDGES), *products.shape))
    slack = (matrices @ found[..., None]).squeeze(-1) + products
    solved = (torch.minimum(found, slack).abs() <= ACCURACY * (1.0 + found.amax(-1, keepdim=True))).all(
        -1, keepdim=True
    )
    answer = torch.full_like(products, torch.nan)
    for ridge in reversed(range(len(_RIDGES))):
        answer = torch.where(solved[ridge], found[ridge], answer)
    return answer


def _active_set(matrix: Tensor, products: Tensor) -> Tensor:
    """Lawson and Hanson's active-set method on the Gram matrix: it ends after finitely many exact solves where M is definite.

    A fixed number of rounds with masks instead of a loop until done keeps the host out of it.
    """
    m = products.shape[-1]
    numbers = torch.arange(m, device=matrix.device)
    identity = torch.eye(m, dtype=matrix.dtype, device=matrix.device)
    x, active = torch.zeros_like(products), torch.zeros_like(products, dtype=torch.bool)
    for _ in range(5 * m + 5):
        both = active[..., :, None] & active[..., None, :]
        goal = torch.linalg.solve_ex(torch.where(both, matrix, identity), torch.where(active, -products, 0.0))[0]
        blocked = active & (goal <= 0.0)
        stuck = blocked.any(-1, keepdim=True)
        # Walk towards the goal as far as every multiplier stays >= 0, and let go of those that reached 0 ...
        share = torch.where(blocked, x / (x - goal).clamp_min(torch.finfo(x.dtype).tiny), torch.inf).amin(
            -1, keepdim=True
        )
        x = torch.where(stuck, x + share.clamp_max(1.0).nan_to_num(0.0) * (goal - x), goal)
        released = stuck & blocked & (x <= TOLERANCE)
        # ... or, having arrived, take in the constraint violated most.
        slack = (matrix @ x[..., None]).squeeze(-1) + products
        violated = torch.where(active, torch.inf, slack)
        worst = violated.argmin(-1, keepdim=True) == numbers
        taken = ~stuck & worst & (violated < -TOLERANCE)
        active = (active & ~released) | taken
        x = torch.where(active, x, 0.0)
    return x


def faces_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Every face of the simplex as a mask ``[2^K - 1, K]``, and G restricted to it ``[..., 2^K - 1, K, K]`` (1 elsewhere)."""
    number = gram.shape[-1]
    if number > _MOST_ENUMERATED_ROWS:
        raise ValueError(
            f"gram: this rule enumerates subsets of at most {_MOST_ENUMERATED_ROWS} rows, found {number}; use upgrad"
        )
    subsets = torch.arange(2**number - 1, 0, -1, device=gram.device)
    faces = (subsets[:, None] >> torch.arange(number, device=gram.device) & 1).to(gram.dtype)
    faces = faces[faces.sum(-1).argsort(descending=True, stable=True)]
    both = faces[:, :, None] * faces[:, None, :]
    identity = torch.eye(number, dtype=gram.dtype, device=gram.device)
    return faces, both * gram[..., None, :, :] + identity * (1.0 - faces)[:, :, None]


def simplex(weights: Tensor) -> Tensor:
    """Candidates that are weights of the simplex up to rounding, scaled to sum 1; NaN in place of the others."""
    total = weights.sum(-1, keepdim=True)
    weights = weights / total
    good = weights.isfinite().all(-1, keepdim=True) & (weights >= -1e-9).all(-1, keepdim=True)
    weights = weights.clamp_min(0.0)
    return torch.where(good, weights / weights.sum(-1, keepdim=True), torch.nan)


def lengths_of(gram: Tensor, weights: Tensor) -> Tensor:
    """|g_w| for weights ``[..., n, K]``: ``[..., n]``."""
    return ((weights @ gram) * weights).sum(-1).clamp_min(0.0).sqrt()


def pick(weights: Tensor, value: Tensor) -> Tensor:
    """The weights of least value; of equal ones the largest face, so that identical rows are treated alike."""
    value = torch.where(value.isnan(), torch.inf, value)
    least = value.amin(-1, keepdim=True)
    first = (value <= least + 1e-12 * (1.0 + least.abs())).to(torch.uint8).argmax(-1)
    return torch.take_along_dim(weights, first[..., None, None], -2).squeeze(-2)


def least_norm(gram: Tensor) -> Tensor:
    """The weights of the simplex with the smallest |g_w|: on each face the bordered system [[G, 1], [1, 0]], and the best face."""
    faces, matrix = faces_of(gram)
    number = gram.shape[-1]
    border = faces.expand(*matrix.shape[:-1])
    top = torch.cat([matrix, border[..., None]], -1)
    bottom = torch.cat([border, torch.zeros_like(border[..., :1])], -1)[..., None, :]
    bordered = torch.cat([top, bottom], -2)
    weights = simplex(torch.linalg.pinv(bordered, hermitian=True, rtol=1e-12)[..., :number, number] * faces)
    return pick(weights, lengths_of(gram, weights))
