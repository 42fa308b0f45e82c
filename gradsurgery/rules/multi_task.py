"""Multi-task rules: every row has the same standing."""

import torch
from torch import Tensor

from gradsurgery.rules import _algebra, _programs
from gradsurgery.rules._algebra import of_gram


@of_gram
def pcgrad(gram: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """PCGrad, the symmetric sum: project every row off every other one it conflicts with, one after another, and add up.

    Two rows: a = 1 - min(0, c)/F, b = 1 - min(0, c)/R. For more the order matters: index order, or a random one (shared by a batch of
    matrices) drawn from a CPU ``generator`` as in the paper; give every rank the same seed.

    Source: Gradient Surgery for Multi-Task Learning (2001.06782), algorithm 1. The common re-implementation takes the mean.
    """
    number = gram.shape[-1]
    mixed = torch.zeros_like(gram) + torch.eye(number, dtype=gram.dtype, device=gram.device)
    for i in range(number):
        order = list(range(number)) if generator is None else torch.randperm(number, generator=generator).tolist()
        for j in order:
            if j != i:
                product = (mixed[..., i, :] * gram[..., :, j]).sum(-1)
                mixed[..., i, j] -= _algebra.ratio(product.clamp_max(0.0), gram[..., j, j])
    return mixed.sum(-2)


@of_gram
def mgda(gram: Tensor) -> Tensor:
    """MGDA: the convex combination of least norm, min_w w^T G w over the simplex. Identical rows share their weight.

    Source: Multiple-Gradient Descent Algorithm (Desideri, 2012); exact, by enumerating faces (at most 10 rows), where the usual code
    runs Frank-Wolfe. It stalls where a protected row is near zero.
    """
    return _programs.least_norm(_algebra.scaled(gram)[0])


@of_gram
def cagrad(gram: Tensor, *, c: float = 0.5) -> Tensor:
    r"""CAGrad: the update that helps the worst-off row most, within ``c`` times the mean's length of the mean row g_0.

    .. math:: \max_u \min_k \langle u, \mathrm{row}_k\rangle \;\text{ s.t. }\; \lVert u - g_0\rVert \le c\lVert g_0\rVert, \qquad
        u = g_0 + \frac{c\lVert g_0\rVert}{\lVert g_w\rVert} g_w,\quad
        w = \arg\min_{w \in \Delta} \langle g_w, g_0\rangle + c\lVert g_0\rVert\lVert g_w\rVert .

    Source: Conflict-Averse Gradient Descent (2110.14048), equations 2 and 3. Not rescaled by 1/(1 + c^2) as some code does; exact, by
    enumerating faces (at most 10 rows), where the authors call a numerical optimizer.
    """
    if not c >= 0.0:
        raise ValueError(f"c: expected a non-negative number, found {c}")
    gram, _ = _algebra.scaled(gram)
    number = gram.shape[-1]
    mean = gram.new_full((number,), 1.0 / number)
    along = gram.mean(-1)  # <row_k, g_0>
    radius = c * (along.mean(-1)).clamp_min(0.0).sqrt()
    faces, matrix = _programs.faces_of(gram)
    # On a face the stationary point is x = mu G^-1 1 - G^-1 <row, g_0> with mu such that |g_x| = c |g_0|, and w = x / sum(x).
    right = torch.stack([faces.expand_as(matrix[..., 0]), faces * along[..., None, :]], -1)
    ones, other = torch.linalg.solve_ex(matrix, right)[0].unbind(-1)
    quadratic, linear = (ones * faces).sum(-1), (other * faces).sum(-1)
    constant = (other * faces * along[..., None, :]).sum(-1) - radius[..., None].square()
    root = (linear.square() - quadratic * constant).clamp_min(0.0).sqrt()
    weights = ((linear + root) / quadratic)[..., None] * ones - other
    # With c = 0 the solutions on the vertices are 0/0: offer the vertices themselves.
    vertices = torch.eye(number, dtype=gram.dtype, device=gram.device).expand_as(gram)
    weights = torch.cat([_programs.simplex(weights * faces), _programs.least_norm(gram)[..., None, :], vertices], -2)
    lengths = _programs.lengths_of(gram, weights)
    value = (weights @ along[..., None]).squeeze(-1) + radius[..., None] * lengths
    best = _programs.pick(weights, value)
    length = _programs.lengths_of(gram, best[..., None, :]).squeeze(-1)
    # Where g_w is 0 up to rounding its direction says nothing, and every update of the ball without conflict is optimal: take the
    # one nearest to g_0.
    noise = (
        number * _programs.TOLERANCE * (best.square() * gram.diagonal(dim1=-2, dim2=-1)).sum(-1)
        + _programs.TOLERANCE**2
    )
    vanished = length.square() <= noise
    unit, norms = _algebra.normalised(gram)
    size = along.mean(-1, keepdim=True).clamp_min(0.0).sqrt()
    nearest = _algebra.ratio(
        _programs.multipliers_of(unit, _algebra.ratio(_algebra.ratio(along, norms), size)) * size, norms
    )
    return mean + torch.where(vanished[..., None], nearest, _algebra.ratio(radius, length)[..., None] * best)


@of_gram
def imtl_g(gram: Tensor) -> Tensor:
    """IMTL-G: equal projections of the update on every row's direction, coefficients adding up to 1; zero rows get 0.

    Two rows: the bisector, (sqrt(R), sqrt(F))/(sqrt(F) + sqrt(R)). In general G^+ sqrt(diag G), normalised.

    Source: Towards Impartial Multi-task Learning (ICLR 2021), section 3.1. Where no such update exists but 0 (unit rows adding up to
    0) the coefficients are those of equal unit weights.
    """
    unit, norms = _algebra.normalised(gram)
    there = (norms > 0.0).to(gram.dtype)
    weights = (_algebra.pinv(unit) @ there[..., None]).squeeze(-1)
    weights = torch.where(weights.sum(-1, keepdim=True).abs() > _programs.TOLERANCE, weights, there)
    weights = _algebra.ratio(weights, norms / norms.amax(-1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny))
    return _algebra.ratio(weights, weights.sum(-1, keepdim=True))


@of_gram
def ngdiff(gram: Tensor) -> Tensor:
    """NGDiff: the sum of the unit rows, c_k = 1/|row_k| (0 for a zero row).

    Source: Normalized Gradient Difference (2410.22086), whose g_F is -f here; its automatic learning rate is the scheduler's business.
    """
    return _algebra.ratio(torch.ones_like(gram[..., 0]), _algebra.norms_of(gram))


@of_gram
def nash_mtl(gram: Tensor) -> Tensor:
    """Nash-MTL: the bargaining solution, coefficients with G c = 1/c. Two rows: (1/sqrt(F), 1/sqrt(R))/sqrt(1 + cos).

    Source: Multi-Task Learning as a Bargaining Game (2202.01017), equation 3. The strictly convex problem behind it,
    min 1/2 c^T G c - sum log c, is solved by damped Newton steps; the authors alternate convex approximations and clip the result.
    Opposite rows have no bargain: the coefficients grow without bound. Zero rows get 0.
    """
    unit, norms = _algebra.normalised(gram)
    number = gram.shape[-1]
    identity = torch.eye(number, dtype=gram.dtype, device=gram.device)
    unit = unit + identity * (norms == 0.0)[..., None]
    if number == 2:
        return _algebra.ratio((1.0 + unit[..., 0, 1]).clamp_min(0.0).rsqrt()[..., None].expand_as(norms), norms)
    x = torch.ones_like(norms)
    for _ in range(64):  # damped phase gains at least a constant a step, then digits double
        gradient = (unit @ x[..., None]).squeeze(-1) - 1.0 / x
        step = torch.linalg.solve_ex(unit + identity / x.square()[..., None], gradient)[0]
        decrement = (gradient * step).sum(-1, keepdim=True).clamp_min(0.0).sqrt()
        x = x - step / (1.0 + decrement)
    return _algebra.ratio(x, norms)


@of_gram
def aligned_mtl(gram: Tensor) -> Tensor:
    """Aligned-MTL: rotate and rescale the rows to an orthogonal system of equal lengths, and take the mean (w = 1/K).

    c = sqrt(lambda_min) G^{-1/2} w, over the eigenvalues above K eps lambda_max.

    Source: Independent Component Alignment (2305.19000), algorithm 1, scale "min".
    """
    gram, _ = _algebra.scaled(gram)
    number = gram.shape[-1]
    values, vectors = torch.linalg.eigh(gram)
    kept = values > number * torch.finfo(gram.dtype).eps * values[..., -1:]
    least = torch.where(kept, values, torch.inf).amin(-1, keepdim=True)
    inverse_root = torch.where(kept, (least / values.clamp_min(torch.finfo(gram.dtype).tiny)).sqrt(), 0.0)
    return (vectors @ (inverse_root * vectors.mean(-2))[..., None]).squeeze(-1)


@of_gram
def upgrad(gram: Tensor) -> Tensor:
    """UPGrad: project every row onto the cone that conflicts with no row, and take the mean.

    Two rows: half of `pcgrad`. Source: Jacobian Descent (2406.16232), section 3; solved exactly, without TorchJD's regularisation.
    """
    number = gram.shape[-1]
    unit, norms = _algebra.normalised(gram)
    multipliers = _programs.multipliers_of(unit[..., None, :, :].expand(*unit.shape[:-2], number, number, number), unit)
    # Row i of the projections, in units of |row_i|: row_i + sum_k multipliers[i, k] unit_k.
    lifted = multipliers * norms[..., :, None]
    return (1.0 + _algebra.ratio(lifted.sum(-2), norms)) / number
