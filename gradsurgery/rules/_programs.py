"""The two small optimisation problems behind the rules, solved exactly, in batches, with no wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gradsurgery.rules._algebra import ratio

# An inner product that is smaller than this multiple of the rows' lengths is rounding noise of the float64 Gram matrix.
TOLERANCE = 1e-13
# A quadratic program on unit rows counts as solved when its optimality conditions hold up to this.
ACCURACY = 1e-10
# Where they cannot hold, one of these numbers is added to the diagonal of the matrix.
_RIDGES = (0.0, 1e-10, 1e-7, 1e-5)
# From so many rows on, block pivoting guesses the active constraints, in at most so many rounds.
_ROWS_WORTH_A_GUESS, _GUESSES = 8, 12
# Enumerating the subsets of K rows means solving 2^K - 1 small systems.
_MOST_ENUMERATED_ROWS = 10


def multipliers_of(matrix: Tensor, products: Tensor) -> Tensor:
    r"""The multipliers of the program that minimises $|u - f|^2$ subject to $\langle u, r_k\rangle \ge 0$.

    They are the solution of $\lambda \ge 0,\ M\lambda + q \ge 0,\ \lambda^T(M\lambda + q) = 0$, and
    $u = f + \sum_k \lambda_k r_k$.

    Where the rows are nearly dependent, rounding can make M slightly indefinite (by 1e-7 for products of float32 rows),
    and then no solution to within `ACCURACY` may exist. Such a problem gets the smallest of `_RIDGES`, added to the
    diagonal of M, with which it has a solution; $\langle u, r_k\rangle$ is then at least
    $-\sqrt{\mathrm{ridge}}\,|f|\,|r_k|$.

    Args:
        matrix: M ``[..., m, m]``, the Gram matrix of the protected rows, each of length 1 (or 0).
        products: q ``[..., m]``, the inner products of f with the protected rows.

    Returns:
        ``[..., m]``; NaN where no ridge helps.
    """
    m = products.shape[-1]
    if m == 0:
        return products
    if m == 1:
        return (-products).clamp_min(0.0) / torch.where(matrix[..., 0] > 0.0, matrix[..., 0], 1.0)
    if _host_sees(matrix):
        return _one_after_another(matrix.reshape(-1, m, m), products.reshape(-1, m)).view_as(products)
    # All ridges at once: on an accelerator a larger batch costs nothing, but asking which one is needed would wait.
    identity = torch.eye(m, dtype=matrix.dtype, device=matrix.device)
    matrices = torch.stack([matrix + ridge * identity for ridge in _RIDGES])
    solutions = _active_set(matrices, products.expand(len(_RIDGES), *products.shape))
    solved = _solved(matrices, products, solutions)
    answer = torch.full_like(products, torch.nan)
    for ridge in reversed(range(len(_RIDGES))):
        answer = torch.where(solved[ridge], solutions[ridge], answer)
    return answer


def _host_sees(matrix: Tensor) -> bool:
    """Whether Python may look at the numbers without waiting: on a CPU, where nothing is traced or batched by vmap."""
    if matrix.device.type != "cpu" or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    try:
        bool(matrix.isfinite().all())
    except RuntimeError:  # under vmap a tensor has no numbers
        return False
    return True


def _one_after_another(matrix: Tensor, products: Tensor) -> Tensor:
    """The same answer bit for bit, by the ridges that are needed, each for the problems that need it."""
    m = products.shape[-1]
    identity = torch.eye(m, dtype=matrix.dtype, device=matrix.device)
    answer = torch.full_like(products, torch.nan)
    open_ = torch.arange(len(products), device=matrix.device)
    for ridge in _RIDGES:
        eased, its = matrix[open_] + ridge * identity, products[open_]
        x, active = torch.zeros_like(its), torch.zeros_like(its, dtype=torch.bool)
        if ridge == 0.0 and m >= _ROWS_WORTH_A_GUESS:
            active = _guess(eased, its)
        moving = torch.arange(len(its), device=matrix.device)
        for _ in range(_rounds(m)):
            x[moving], active[moving], moved = _round(eased[moving], its[moving], x[moving], active[moving])
            moving = moving[moved]  # a round that moves nothing is repeated by all later ones
            if not len(moving):
                break
        solved = _solved(eased, its, x).squeeze(-1)
        answer[open_[solved]] = x[solved]
        open_ = open_[~solved]
        if not len(open_):
            break
    return answer


def _guess(matrix: Tensor, products: Tensor) -> Tensor:
    """The constraints that are active at the solution, where they are soon found; none where they are not.

    Block pivoting (Portugal, Judice and Vicente) exchanges all constraints that are on the wrong side at once. It needs
    about 5 solves where the active-set method needs one for each active constraint, but it may go round in a circle.
    Where the rows are far from dependent, the solution is unique, so that the active-set method would end with the
    same constraints; it starts from the guess and stays there, or moves on from it as it moves on from none.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    sure = (failed == 0) & (factor.diagonal(dim1=-2, dim2=-1).amin(-1) > 1e-3)
    identity = torch.eye(products.shape[-1], dtype=matrix.dtype, device=matrix.device)
    active = torch.zeros_like(products, dtype=torch.bool)
    moving = sure.nonzero().flatten()
    wrong = products[moving] < -TOLERANCE
    for _ in range(_GUESSES):
        active[moving] ^= wrong
        moving = moving[wrong.any(-1)]
        if not len(moving):
            break
        its, q = active[moving], products[moving]
        both = its[..., :, None] & its[..., None, :]
        goal = torch.linalg.solve_ex(torch.where(both, matrix[moving], identity), torch.where(its, -q, 0.0))[0]
        slack = (matrix[moving] @ goal[..., None]).squeeze(-1) + q
        wrong = torch.where(its, goal <= 0.0, slack < -TOLERANCE)
    active[moving] = False
    return active


def _solved(matrix: Tensor, products: Tensor, x: Tensor) -> Tensor:
    """Whether the optimality conditions hold, ``[..., 1]``."""
    slack = (matrix @ x[..., None]).squeeze(-1) + products
    return (torch.minimum(x, slack).abs() <= ACCURACY * (1.0 + x.amax(-1, keepdim=True))).all(-1, keepdim=True)


def _rounds(m: int) -> int:
    return 5 * m + 5


def _active_set(matrix: Tensor, products: Tensor) -> Tensor:
    """Lawson and Hanson's active-set method on the Gram matrix.

    Where M is positive definite it ends after finitely many solves. Every problem of the batch takes the same
    fixed number of rounds, with masks, because a loop that ends when all are done would wait for the device.
    """
    x, active = torch.zeros_like(products), torch.zeros_like(products, dtype=torch.bool)
    for _ in range(_rounds(products.shape[-1])):
        x, active, _moved = _round(matrix, products, x, active)
    return x


def _round(matrix: Tensor, products: Tensor, x: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The next multipliers and active constraints, and which problems moved, ``[...]``."""
    m = products.shape[-1]
    numbers = torch.arange(m, device=matrix.device)
    identity = torch.eye(m, dtype=matrix.dtype, device=matrix.device)
    both = active[..., :, None] & active[..., None, :]
    goal = torch.linalg.solve_ex(torch.where(both, matrix, identity), torch.where(active, -products, 0.0))[0]
    blocked = active & (goal <= 0.0)
    stuck = blocked.any(-1, keepdim=True)
    # Walk towards the goal as far as all multipliers stay >= 0, and release the constraints where one reached 0.
    share = torch.where(blocked, x / (x - goal).clamp_min(torch.finfo(x.dtype).tiny), torch.inf).amin(-1, keepdim=True)
    x = torch.where(stuck, x + share.clamp_max(1.0).nan_to_num(0.0) * (goal - x), goal)
    released = stuck & blocked & (x <= TOLERANCE)
    # Where the goal was reached, take in the constraint that is violated most.
    slack = (matrix @ x[..., None]).squeeze(-1) + products
    violated = torch.where(active, torch.inf, slack)
    worst = violated.argmin(-1, keepdim=True) == numbers
    taken = ~stuck & worst & (violated < -TOLERANCE)
    active = (active & ~released) | taken
    return torch.where(active, x, 0.0), active, (stuck | taken).any(-1)


def faces_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The faces of the simplex, largest first, as masks ``[2^K - 1, K]``, and G restricted to each of them.

    The restricted matrices ``[..., 2^K - 1, K, K]`` equal the identity outside their face, so that all of them can be
    solved as one batch.

    Raises:
        ValueError: If there are more than 10 rows.
    """
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
    """The candidates, clipped at 0 and scaled to sum 1; NaN for those outside the simplex by more than rounding."""
    total = weights.sum(-1, keepdim=True)
    weights = weights / total
    good = weights.isfinite().all(-1, keepdim=True) & (weights >= -1e-9).all(-1, keepdim=True)
    weights = weights.clamp_min(0.0)
    return torch.where(good, weights / weights.sum(-1, keepdim=True), torch.nan)


def lengths_of(gram: Tensor, weights: Tensor) -> Tensor:
    """The length ``[..., n]`` of the combined row g_w = sum_k w_k row_k, for n weights w ``[..., n, K]``."""
    return ((weights @ gram) * weights).sum(-1).clamp_min(0.0).sqrt()


def pick(weights: Tensor, value: Tensor) -> Tensor:
    """The weights with the smallest value. Among equal values the largest face wins, so that identical rows share."""
    value = torch.where(value.isnan(), torch.inf, value)
    least = value.amin(-1, keepdim=True)
    first = (value <= least + 1e-12 * (1.0 + least.abs())).to(torch.uint8).argmax(-1)
    return torch.take_along_dim(weights, first[..., None, None], -2).squeeze(-2)


def least_norm(gram: Tensor) -> Tensor:
    """The weights of the simplex with the smallest |g_w|.

    On each face the minimum solves the bordered system [[G, 1], [1, 0]]; the best face wins.
    """
    faces, matrix = faces_of(gram)
    number = gram.shape[-1]
    # In units of the face's longest row: beside the border of ones, far shorter ones would count as zeros.
    longest = (faces * gram.diagonal(dim1=-2, dim2=-1)[..., None, :]).amax(-1)[..., None, None]
    matrix = torch.where(faces[:, :, None] * faces[:, None, :] > 0.0, ratio(matrix, longest.expand_as(matrix)), matrix)
    border = faces.expand(*matrix.shape[:-1])
    top = torch.cat([matrix, border[..., None]], -1)
    bottom = torch.cat([border, torch.zeros_like(border[..., :1])], -1)[..., None, :]
    bordered = torch.cat([top, bottom], -2)
    weights = simplex(torch.linalg.pinv(bordered, hermitian=True, rtol=1e-12)[..., :number, number] * faces)
    return pick(weights, lengths_of(gram, weights))
