r"""Multi-task rules: every row has the same standing.

`gradsurgery.rules` says what all rules have in common. Notation: row 0 is f and, where there are two rows, row 1 is r;
$F = \langle f, f\rangle$, $R = \langle r, r\rangle$, $c = \langle f, r\rangle$.
"""

import torch
from torch import Tensor

from gradsurgery.rules import _algebra, _programs
from gradsurgery.rules._algebra import of_gram


@of_gram
def pcgrad(gram: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """PCGrad: project every row off each other row it conflicts with, one after another, and add the results.

    Two rows: the coefficients are 1 - min(0, c)/F and 1 - min(0, c)/R. With more rows the order of the projections
    matters.

    Source: Gradient Surgery for Multi-Task Learning (2001.06782), algorithm 1: the sum, where the common
    re-implementation takes the mean.

    Args:
        gram: ``[..., K, K]``.
        generator: Draws a random order, as in the paper, shared by all matrices of a batch. It must be on the CPU; give
            every rank the same seed. None: the order of the rows.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> pcgrad(gram)
        tensor([1.1200, 1.6000], dtype=torch.float64)
    """
    number = gram.shape[-1]
    mixed = torch.zeros_like(gram) + torch.eye(number, dtype=gram.dtype, device=gram.device)
    for i in range(number):
        order = list(range(number)) if generator is None else _shuffled(number, generator)
        for j in order:
            if j != i:
                product = (mixed[..., i, :] * gram[..., :, j]).sum(-1)
                mixed[..., i, j] -= _algebra.ratio(product.clamp_max(0.0), gram[..., j, j])
    return mixed.sum(-2)


def _shuffled(number: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(number, generator=generator, device=generator.device).tolist()


@of_gram
def mgda(gram: Tensor) -> Tensor:
    r"""MGDA: the convex combination of least norm, $\min_w w^T G w$ over the simplex.

    Identical rows share their weight. It stalls where a protected row is near zero.

    Source: Multiple-Gradient Descent Algorithm (Désidéri, 2012). Solved exactly, by enumerating the faces of the
    simplex, where the usual code runs Frank-Wolfe.

    Raises:
        ValueError: If there are more than 10 rows.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> mgda(gram)
        tensor([0.2222, 0.7778], dtype=torch.float64)
    """
    return _programs.least_norm(_algebra.scaled(gram)[0])


@of_gram
def cagrad(gram: Tensor, *, c: float = 0.5) -> Tensor:
    r"""CAGrad: the update that helps the worst-off row most, within a ball around the mean row $g_0$.

    $$\max_u \min_k \langle u, \mathrm{row}_k\rangle \;\text{ s.t. }\;
    \lVert u - g_0\rVert \le c\lVert g_0\rVert,$$

    $$u = g_0 + \frac{c\lVert g_0\rVert}{\lVert g_w\rVert} g_w,
    \quad w = \arg\min_{w \in \Delta} \langle g_w, g_0\rangle + c\lVert g_0\rVert\lVert g_w\rVert .$$

    Source: Conflict-Averse Gradient Descent (2110.14048), equations 2 and 3. Not rescaled by $1/(1 + c^2)$, as
    some code does. Solved exactly, by enumerating the faces of the simplex, where the authors call a numerical
    optimizer.

    Args:
        gram: ``[..., K, K]``.
        c: The ball's radius, in units of the mean row's length, >= 0.

    Raises:
        ValueError: If ``c`` is negative or NaN, or there are more than 10 rows.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> cagrad(gram)
        tensor([0.5000, 1.0477], dtype=torch.float64)
    """
    if not c >= 0.0:
        raise ValueError(f"c: expected a non-negative number, found {c}")
    gram, _ = _algebra.scaled(gram)
    number = gram.shape[-1]
    mean = gram.new_full((number,), 1.0 / number)
    along = gram.mean(-1)  # <row_k, g_0>
    radius = c * (along.mean(-1)).clamp_min(0.0).sqrt()
    faces, matrix = _programs.faces_of(gram)
    # On a face the stationary point is x = mu G^-1 1 - G^-1 <row, g_0>, with mu such that |g_x| = c |g_0|; then
    # w = x / sum(x).
    right = torch.stack([faces.expand_as(matrix[..., 0]), faces * along[..., None, :]], -1)
    ones, other = torch.linalg.solve_ex(matrix, right)[0].unbind(-1)
    quadratic, linear = (ones * faces).sum(-1), (other * faces).sum(-1)
    constant = (other * faces * along[..., None, :]).sum(-1) - radius[..., None].square()
    root = (linear.square() - quadratic * constant).clamp_min(0.0).sqrt()
    weights = ((linear + root) / quadratic)[..., None] * ones - other
    # With c = 0 the solutions on the vertices are 0/0, so the vertices themselves are candidates too.
    vertices = torch.eye(number, dtype=gram.dtype, device=gram.device).expand_as(gram)
    weights = torch.cat([_programs.simplex(weights * faces), _programs.least_norm(gram)[..., None, :], vertices], -2)
    lengths = _programs.lengths_of(gram, weights)
    value = (weights @ along[..., None]).squeeze(-1) + radius[..., None] * lengths
    best = _programs.pick(weights, value)
    length = _programs.lengths_of(gram, best[..., None, :]).squeeze(-1)
    # Where g_w is 0 up to rounding, its direction means nothing. Every update in the ball that has no conflict is
    # optimal there: take the one nearest to g_0.
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
    r"""IMTL-G: equal projections of the update on every row's direction; the coefficients add up to 1.

    They are $G^+ \sqrt{\mathrm{diag}\, G}$, normalised. Two rows: the bisector,
    $(\sqrt R, \sqrt F)/(\sqrt F + \sqrt R)$. Zero rows get 0. Where the only such update is 0 (normalised rows
    that add up to 0), the normalised rows get equal weights.

    Source: Towards Impartial Multi-task Learning (ICLR 2021), section 3.1.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> imtl_g(gram)
        tensor([0.3090, 0.6910], dtype=torch.float64)
    """
    unit, norms = _algebra.normalised(gram)
    nonzero = (norms > 0.0).to(gram.dtype)
    weights = (_algebra.pinv(unit) @ nonzero[..., None]).squeeze(-1)
    weights = torch.where(weights.sum(-1, keepdim=True).abs() > _programs.TOLERANCE, weights, nonzero)
    weights = _algebra.ratio(weights, norms / norms.amax(-1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny))
    return _algebra.ratio(weights, weights.sum(-1, keepdim=True))


@of_gram
def ngdiff(gram: Tensor) -> Tensor:
    r"""NGDiff: the sum of the normalised rows, with coefficients 1/norm (0 for a zero row).

    Source: Normalized Gradient Difference (2410.22086), whose g_F is -f here. Its automatic learning rate is left to
    the scheduler.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> ngdiff(gram)
        tensor([0.2000, 0.4472], dtype=torch.float64)
    """
    return _algebra.ratio(torch.ones_like(gram[..., 0]), _algebra.norms_of(gram))


@of_gram
def nash_mtl(gram: Tensor) -> Tensor:
    r"""Nash-MTL: the bargaining solution, coefficients x with $G x = 1/x$. Zero rows get 0.

    Two rows: $(1/\sqrt F, 1/\sqrt R)/\sqrt{1 + \cos}$. Opposite rows have no bargain: the coefficients grow
    without bound, and with more rows are NaN where no solution is found.

    Source: Multi-Task Learning as a Bargaining Game (2202.01017), equation 3. The strictly convex problem behind it,
    $\min_x \tfrac12 x^T G x - \sum_k \log x_k$, is solved by damped Newton steps, where the authors alternate
    convex approximations and clip the result.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> nash_mtl(gram)
        tensor([0.2338, 0.5228], dtype=torch.float64)
    """
    unit, norms = _algebra.normalised(gram)
    number = gram.shape[-1]
    identity = torch.eye(number, dtype=gram.dtype, device=gram.device)
    unit = unit + identity * (norms == 0.0)[..., None]
    if number == 2:
        return _algebra.ratio((1.0 + unit[..., 0, 1]).clamp_min(0.0).rsqrt()[..., None].expand_as(norms), norms)
    x = torch.ones_like(norms)
    for _ in range(64):  # ample: the damped phase gains at least a constant per step, then the digits double
        gradient = (unit @ x[..., None]).squeeze(-1) - 1.0 / x
        step = torch.linalg.solve_ex(unit + identity / x.square()[..., None], gradient)[0]
        decrement = (gradient * step).sum(-1, keepdim=True).clamp_min(0.0).sqrt()
        x = x - step / (1.0 + decrement)
    # Rounding may have given rows that are nearly opposite a Gram matrix of no rows at all, and that has no solution.
    off = (x * (unit @ x[..., None]).squeeze(-1) - 1.0).abs()
    found = ((x > 0.0) & (off < 0.05)).all(-1, keepdim=True)
    return _algebra.ratio(torch.where(found, x, torch.nan), norms)


@of_gram
def aligned_mtl(gram: Tensor) -> Tensor:
    r"""Aligned-MTL: rotate and rescale the rows to orthogonal ones of equal length, and take their mean.

    The coefficients are $\sqrt{\lambda_{\min}}\, G^{-1/2} w$ with all $w_k = 1/K$, over the eigenvalues
    above $K \epsilon \lambda_{\max}$ ($\epsilon$ of float64).

    Source: Independent Component Alignment (2305.19000), algorithm 1, scale "min".

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> aligned_mtl(gram)
        tensor([0.2592, 0.5353], dtype=torch.float64)
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
    """UPGrad: project every row onto the cone of updates that conflict with no row, and take the mean.

    Two rows: half of `pcgrad`.

    Source: Jacobian Descent (2406.16232), section 3; solved exactly, without TorchJD's regularisation.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> upgrad(gram)
        tensor([0.5600, 0.8000], dtype=torch.float64)
    """
    number = gram.shape[-1]
    unit, norms = _algebra.normalised(gram)
    multipliers = _programs.multipliers_of(unit[..., None, :, :].expand(*unit.shape[:-2], number, number, number), unit)
    # In units of |row_i|, the projection of row i is row_i + sum_k multipliers[i, k] unit_k.
    lifted = multipliers * norms[..., :, None]
    return (1.0 + _algebra.ratio(lifted.sum(-2), norms)) / number
