"""Every coordinate-free rule, on one page: pure functions Gram matrix -> coefficients; `gradsurgery.rules` says what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from gradsurgery.rules import elementwise
from gradsurgery.rules._algebra import (
    normalised,
    norms_of,
    pinv,
    ratio,
    rule,
    scaled,
    unit_forget,
    vaccinated,
    with_first,
)
from gradsurgery.rules._programs import (
    ACCURACY,
    TOLERANCE,
    faces_of,
    least_norm,
    lengths_of,
    multipliers_of,
    pick,
    simplex,
)
from gradsurgery.rules.stateful import GradVac, StatefulRule

__all__ = ["RULES", "GradVac", "Rule", "StatefulRule", "by_name"]


class Rule(Protocol):
    """A pure function ``gram [..., K, K] -> coefficients [..., K]``."""

    def __call__(self, gram: Tensor, /) -> Tensor:
        """The coefficients of the rows."""
        ...


# ---------------------------------------------------------------------------------------------------------------------------------
# Fixed weights
# ---------------------------------------------------------------------------------------------------------------------------------


@rule
def sum(gram: Tensor) -> Tensor:
    """Add all rows: c = (1, ..., 1), plain training on the sum of the losses."""
    return gram.new_ones(gram.shape[:-1])


@rule
def gradient_difference(gram: Tensor, *, gamma: float = 1.0, alpha: float = 1.0) -> Tensor:
    """GradDiff, the weighted sum: c = (gamma, alpha, ..., alpha). ``alpha=0`` is the forget row alone.

    Source: TOFU (2401.06121), section 4, "gradient difference"; the defaults are open-unlearning's.
    """
    return torch.cat(
        [gram.new_full((*gram.shape[:-2], 1), gamma), gram.new_full((*gram.shape[:-2], gram.shape[-1] - 1), alpha)], -1
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# Projections of the forget row
# ---------------------------------------------------------------------------------------------------------------------------------


@rule
def gru(gram: Tensor) -> Tensor:
    r"""GRU: the update nearest to f that conflicts with no protected row.

    .. math:: \min_u \lVert u - f\rVert^2 \;\text{ s.t. }\; \langle u, r_k\rangle \ge 0, \qquad
        u = f + \sum_k \lambda_k r_k, \quad \lambda \ge 0 .

    One protected row: c = (1, max(0, -c)/R). Several: the quadratic program is solved exactly (active set on the K x K matrix), not
    one constraint after another, which can re-violate the first. It is unchanged when a protected row is rescaled.

    Source: Gradient Rectified Unlearning (2503.09117), the closed form of its problem for one retain gradient; several constraints
    are our generalisation. Difference from the authors' code: sign and coefficient come from the same float64 matrix (there the sign
    is decided from bf16 products). The EMA of the retain gradient is the optimizer's ``ema_decay``, not part of the rule.
    """
    return _rectified(gram, 0.0)


@rule
def gem(gram: Tensor, *, margin: float = 0.0) -> Tensor:
    r"""GEM: as `gru` with :math:`\langle u, r_k\rangle \ge` ``margin``, in the units of the Gram matrix.

    Source: Gradient Episodic Memory (1706.08840), equation 11. Difference from the authors' code: no 1e-3 is added to the matrix, and
    their ``memory_strength`` bounds the multipliers from below instead of the products. An infeasible margin (opposite protected
    rows) gives non-finite coefficients.
    """
    return _rectified(gram, margin)


@rule
def a_gem(gram: Tensor) -> Tensor:
    """A-GEM: `gru` against the mean of the protected rows only, c = (1, b, ..., b)/(K-1) with b = max(0, -<f, mean r>)/|mean r|^2.

    Source: Averaged GEM (1812.00420), equation 11. With one protected row it is `gru`; with several it promises only that their mean
    does not get worse.
    """
    others = gram.shape[-1] - 1
    if others == 0:
        return torch.ones_like(gram[..., 0])
    product, square = gram[..., 0, 1:].mean(-1), gram[..., 1:, 1:].mean((-1, -2))
    shared = ratio((-product).clamp_min(0.0), square) / others
    return with_first(torch.ones_like(product), shared[..., None].expand(*shared.shape, others))


@rule
def cos_clip(gram: Tensor, *, floor: float = -0.5) -> Tensor:
    """GRU's ``cos_clip`` option: `gru` with each cosine of f and r_k taken as at least ``floor``.

    Below the floor the update still conflicts, <u, r> = sqrt(FR) (cos - floor), but never shrinks to nothing: opposite rows give
    (1 + floor) f instead of a standstill.

    Source: the GRU authors' code (floor -0.5, off by default), one protected row; several are our generalisation.
    """
    if not -1.0 <= floor <= 0.0:
        raise ValueError(f"floor: expected a cosine in [-1, 0], found {floor}")
    unit, norms = normalised(gram)
    return unit_forget(multipliers_of(unit[..., 1:, 1:], unit[..., 0, 1:].clamp_min(floor)), norms)


@rule
def gu(gram: Tensor) -> Tensor:
    """GU: remove from f its whole component in the span of the protected rows, b = -M^+ q (one row: -c/R), synergy included.

    Source: Geometric-disentanglement Unlearning (2511.17100), which takes the Gram matrix in the optimizer's metric
    (``metric="optimizer"`` here).
    """
    unit, norms = normalised(gram)
    return unit_forget(-(pinv(unit[..., 1:, 1:]) @ unit[..., 1:, :1]).squeeze(-1), norms)


@rule
def orthograd(gram: Tensor, *, gamma: float = 1.0, alpha: float = 1.0) -> Tensor:
    r"""OrthoGrad: gamma times what `gu` leaves of f, and alpha times the mean of the K - 1 protected rows.

    .. math:: c = (\gamma,\; -\gamma M^+ q + \alpha/(K - 1)), \qquad M_{kl} = \langle r_k, r_l\rangle,\ q_k = \langle f, r_k\rangle .

    Meant for one protected row a retain *example* (an objective each: ``objectives=("forget", "retain_0", "retain_1", ...)``): f is made
    orthogonal to the gradient of every one, and not of their mean alone. ``alpha=0`` and one protected row is `gu`.

    Source: Go Beyond Your Means (2503.02312), per-sample gradient orthogonalization. Its weights are here ``gamma`` and ``alpha``;
    the projection is the Gram matrix's pseudo-inverse where a QR decomposition of all the rows' coordinates is usual.
    """
    number = gram.shape[-1] - 1
    unit, norms = normalised(gram)
    across = unit_forget(-(pinv(unit[..., 1:, 1:]) @ unit[..., 1:, :1]).squeeze(-1), norms)
    mean = torch.cat([gram.new_zeros(1), gram.new_full((number,), alpha / max(number, 1))])
    return gamma * across + mean


@rule
def gradvac(gram: Tensor, *, target: float = 0.0) -> Tensor:
    r"""GradVac, one-sided and stateless: raise the cosine of f with each protected row to at least ``target``, in index order.

    .. math:: b = \frac{\lVert f\rVert\,(t\sqrt{1-\cos^2} - \cos\sqrt{1-t^2})}{\lVert r\rVert\sqrt{1-t^2}}
        \;\text{ if } \cos < t, \text{ else } 0 .

    ``target=0`` with one protected row is `gru`. `GradVac` moves the target as the paper does.

    Source: Gradient Vaccine (2010.05874), equation 3; there every task is adjusted towards every other, in random order.
    """
    return vaccinated(gram, gram.new_full((gram.shape[-1] - 1,), _checked_target(target)))[0]


@rule
def blur(gram: Tensor, *, gamma: float = 1.0) -> Tensor:
    """BLUR, forgetting first: u = r + (gamma - c/F) f with r the sum of the protected rows, so that <u, f> = gamma F always.

    Source: BLUR (2506.08164), the bi-level update of its authors' code. A zero forget row leaves u = r.
    """
    product = gram[..., 0, 1:].sum(-1)
    return with_first(gamma - ratio(product, gram[..., 0, 0]), torch.ones_like(gram[..., 0, 1:]))


@rule
def hamu(gram: Tensor, *, gain: float, radius: float) -> Tensor:
    r"""HAMU-Q: the step of length at most ``radius`` that gains ``gain`` on forgetting at the least cost to retention.

    .. math:: \max_u \langle r, u\rangle \;\text{ s.t. }\; \langle f, u\rangle \ge \mathrm{gain},\ \lVert u\rVert \le \mathrm{radius},

    with r the sum of the protected rows: (0, radius/sqrt(R)) where the pure retain step already forgets enough; otherwise
    a = gain/F - s c/(F n), b = s/n, s^2 = radius^2 - gain^2/F, n^2 = R - c^2/F. A gain out of reach (gain > radius sqrt(F)) gives the
    step of that length along f, a zero forget row the retain step. The answer is a displacement: use it with plain SGD of learning rate 1.

    Source: HAMU (2606.02119) and its authors' code. It is not scale-free; ``gain`` and ``radius`` carry units. Differences from the code:
    it works tensor by tensor (``scope="tensor"`` here) with the gain divided among the tensors, leaves the ball for a gain out of reach,
    and stands still at a zero forget row.
    """
    first, second = _hamu(gram[..., 0, 0], gram[..., 0, 1:].sum(-1), gram[..., 1:, 1:].sum((-1, -2)), gain, radius)
    return with_first(first, second[..., None].expand_as(gram[..., 0, 1:]))


@rule
def hamu_u(gram: Tensor, *, gain: float, radius: float) -> Tensor:
    r"""HAMU-U: `hamu` with the roles of f and r exchanged, the step that forgets most while retention gains ``gain``.

    .. math:: \max_u \langle f, u\rangle \;\text{ s.t. }\; \langle r, u\rangle \ge \mathrm{gain},\ \lVert u\rVert \le \mathrm{radius} .

    ``gain=0`` asks that retention gets no worse. Everything else is as in `hamu`, the other way round.

    Source: HAMU (2606.02119), variant ``hamu-u`` of its authors' code; differences as in `hamu`.
    """
    second, first = _hamu(gram[..., 1:, 1:].sum((-1, -2)), gram[..., 0, 1:].sum(-1), gram[..., 0, 0], gain, radius)
    return with_first(first, second[..., None].expand_as(gram[..., 0, 1:]))


def _hamu(forget: Tensor, product: Tensor, retain: Tensor, gain: float, radius: float) -> tuple[Tensor, Tensor]:
    """The coefficients of the row that must gain (square ``forget``) and of the other (square ``retain``)."""
    if not (radius > 0.0 and gain >= 0.0):
        raise ValueError(f"gain, radius: expected gain >= 0 and radius > 0, found gain={gain}, radius={radius}")
    slack = (radius**2 - ratio(forget.new_full((), gain**2), forget)).clamp_min(0.0).sqrt()
    across = (retain - ratio(product.square(), forget)).clamp_min(0.0)
    sideways = torch.where(across > TOLERANCE * retain, ratio(slack, across.sqrt()), 0.0)
    first = ratio(gain - sideways * product, forget)
    enough = (product * radius >= gain * retain.sqrt()) & (retain > 0.0)
    unreachable = gain > radius * forget.sqrt()
    only_forget, only_retain = (
        ratio(forget.new_full((), radius), forget.sqrt()),
        ratio(forget.new_full((), radius), retain.sqrt()),
    )
    enough = enough | (forget == 0.0)  # nothing can be gained on forgetting: what is left is retention
    first = torch.where(enough, 0.0, torch.where(unreachable, only_forget, first))
    return first, torch.where(enough, only_retain, torch.where(unreachable, 0.0, sideways))


# ---------------------------------------------------------------------------------------------------------------------------------
# Multi-task rules: every row has the same standing
# ---------------------------------------------------------------------------------------------------------------------------------


@rule
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
                mixed[..., i, j] -= ratio(product.clamp_max(0.0), gram[..., j, j])
    return mixed.sum(-2)


@rule
def mgda(gram: Tensor) -> Tensor:
    """MGDA: the convex combination of least norm, min_w w^T G w over the simplex. Identical rows share their weight.

    Source: Multiple-Gradient Descent Algorithm (Desideri, 2012); exact, by enumerating faces (at most 10 rows), where the usual code
    runs Frank-Wolfe. It stalls where a protected row is near zero.
    """
    return least_norm(scaled(gram)[0])


@rule
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
    gram, _ = scaled(gram)
    number = gram.shape[-1]
    mean = gram.new_full((number,), 1.0 / number)
    along = gram.mean(-1)  # <row_k, g_0>
    radius = c * (along.mean(-1)).clamp_min(0.0).sqrt()
    faces, matrix = faces_of(gram)
    # On a face the stationary point is x = mu G^-1 1 - G^-1 <row, g_0> with mu such that |g_x| = c |g_0|, and w = x / sum(x).
    right = torch.stack([faces.expand_as(matrix[..., 0]), faces * along[..., None, :]], -1)
    ones, other = torch.linalg.solve_ex(matrix, right)[0].unbind(-1)
    quadratic, linear = (ones * faces).sum(-1), (other * faces).sum(-1)
    constant = (other * faces * along[..., None, :]).sum(-1) - radius[..., None].square()
    root = (linear.square() - quadratic * constant).clamp_min(0.0).sqrt()
    weights = ((linear + root) / quadratic)[..., None] * ones - other
    # With c = 0 the solutions on the vertices are 0/0: offer the vertices themselves.
    vertices = torch.eye(number, dtype=gram.dtype, device=gram.device).expand_as(gram)
    weights = torch.cat([simplex(weights * faces), least_norm(gram)[..., None, :], vertices], -2)
    lengths = lengths_of(gram, weights)
    value = (weights @ along[..., None]).squeeze(-1) + radius[..., None] * lengths
    best = pick(weights, value)
    length = lengths_of(gram, best[..., None, :]).squeeze(-1)
    # Where g_w is 0 up to rounding its direction says nothing, and every update of the ball without conflict is optimal: take the
    # one nearest to g_0.
    noise = number * TOLERANCE * (best.square() * gram.diagonal(dim1=-2, dim2=-1)).sum(-1) + TOLERANCE**2
    vanished = length.square() <= noise
    unit, norms = normalised(gram)
    size = along.mean(-1, keepdim=True).clamp_min(0.0).sqrt()
    nearest = ratio(multipliers_of(unit, ratio(ratio(along, norms), size)) * size, norms)
    return mean + torch.where(vanished[..., None], nearest, ratio(radius, length)[..., None] * best)


@rule
def imtl_g(gram: Tensor) -> Tensor:
    """IMTL-G: equal projections of the update on every row's direction, coefficients adding up to 1; zero rows get 0.

    Two rows: the bisector, (sqrt(R), sqrt(F))/(sqrt(F) + sqrt(R)). In general G^+ sqrt(diag G), normalised.

    Source: Towards Impartial Multi-task Learning (ICLR 2021), section 3.1. Where no such update exists but 0 (unit rows adding up to
    0) the coefficients are those of equal unit weights.
    """
    unit, norms = normalised(gram)
    there = (norms > 0.0).to(gram.dtype)
    weights = (pinv(unit) @ there[..., None]).squeeze(-1)
    weights = torch.where(weights.sum(-1, keepdim=True).abs() > TOLERANCE, weights, there)
    weights = ratio(weights, norms / norms.amax(-1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny))
    return ratio(weights, weights.sum(-1, keepdim=True))


@rule
def ngdiff(gram: Tensor) -> Tensor:
    """NGDiff: the sum of the unit rows, c_k = 1/|row_k| (0 for a zero row).

    Source: Normalized Gradient Difference (2410.22086), whose g_F is -f here; its automatic learning rate is the scheduler's business.
    """
    return ratio(torch.ones_like(gram[..., 0]), norms_of(gram))


@rule
def nash_mtl(gram: Tensor) -> Tensor:
    """Nash-MTL: the bargaining solution, coefficients with G c = 1/c. Two rows: (1/sqrt(F), 1/sqrt(R))/sqrt(1 + cos).

    Source: Multi-Task Learning as a Bargaining Game (2202.01017), equation 3. The strictly convex problem behind it,
    min 1/2 c^T G c - sum log c, is solved by damped Newton steps; the authors alternate convex approximations and clip the result.
    Opposite rows have no bargain: the coefficients grow without bound. Zero rows get 0.
    """
    unit, norms = normalised(gram)
    number = gram.shape[-1]
    identity = torch.eye(number, dtype=gram.dtype, device=gram.device)
    unit = unit + identity * (norms == 0.0)[..., None]
    if number == 2:
        return ratio((1.0 + unit[..., 0, 1]).clamp_min(0.0).rsqrt()[..., None].expand_as(norms), norms)
    x = torch.ones_like(norms)
    for _ in range(64):  # damped phase gains at least a constant a step, then digits double
        gradient = (unit @ x[..., None]).squeeze(-1) - 1.0 / x
        step = torch.linalg.solve_ex(unit + identity / x.square()[..., None], gradient)[0]
        decrement = (gradient * step).sum(-1, keepdim=True).clamp_min(0.0).sqrt()
        x = x - step / (1.0 + decrement)
    return ratio(x, norms)


@rule
def aligned_mtl(gram: Tensor) -> Tensor:
    """Aligned-MTL: rotate and rescale the rows to an orthogonal system of equal lengths, and take the mean (w = 1/K).

    c = sqrt(lambda_min) G^{-1/2} w, over the eigenvalues above K eps lambda_max.

    Source: Independent Component Alignment (2305.19000), algorithm 1, scale "min".
    """
    gram, _ = scaled(gram)
    number = gram.shape[-1]
    values, vectors = torch.linalg.eigh(gram)
    kept = values > number * torch.finfo(gram.dtype).eps * values[..., -1:]
    least = torch.where(kept, values, torch.inf).amin(-1, keepdim=True)
    inverse_root = torch.where(kept, (least / values.clamp_min(torch.finfo(gram.dtype).tiny)).sqrt(), 0.0)
    return (vectors @ (inverse_root * vectors.mean(-2))[..., None]).squeeze(-1)


@rule
def upgrad(gram: Tensor) -> Tensor:
    """UPGrad: project every row onto the cone that conflicts with no row, and take the mean.

    Two rows: half of `pcgrad`. Source: Jacobian Descent (2406.16232), section 3; solved exactly, without TorchJD's regularisation.
    """
    number = gram.shape[-1]
    unit, norms = normalised(gram)
    multipliers = multipliers_of(unit[..., None, :, :].expand(*unit.shape[:-2], number, number, number), unit)
    # Row i of the projections, in units of |row_i|: row_i + sum_k multipliers[i, k] unit_k.
    lifted = multipliers * norms[..., :, None]
    return (1.0 + ratio(lifted.sum(-2), norms)) / number


def _rectified(gram: Tensor, margin: float) -> Tensor:
    unit, norms = normalised(gram)
    if margin == 0.0:
        return unit_forget(multipliers_of(unit[..., 1:, 1:], unit[..., 0, 1:]), norms)
    # With a margin the problem has a unit: work with unit protected rows and the forget row as it is.
    required = ratio(torch.full_like(norms[..., 1:], margin), norms[..., 1:])
    wanted = unit[..., 0, 1:] * norms[..., :1] - required
    size = wanted.abs().amax(-1, keepdim=True) if wanted.shape[-1] else wanted
    multipliers = multipliers_of(unit[..., 1:, 1:], ratio(wanted, size)) * size
    # Only a margin can be infeasible, and the last ridge would then answer with a broken promise.
    slack = (unit[..., 1:, 1:] @ multipliers[..., None]).squeeze(-1) + wanted
    kept = (slack >= -0.01 * required.abs() - ACCURACY * size).all(-1, keepdim=True)
    return with_first(torch.ones_like(norms[..., 0]), torch.where(kept, ratio(multipliers, norms[..., 1:]), torch.nan))


def _checked_target(target: float) -> float:
    if not -1.0 < target < 1.0:
        raise ValueError(f"target: expected a cosine in (-1, 1), found {target}")
    return target


RULES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        sum, gradient_difference, gru, a_gem, gem, cos_clip, pcgrad, gradvac, cagrad, mgda, imtl_g, nash_mtl, aligned_mtl, upgrad,
        ngdiff, blur, gu, orthograd, hamu, hamu_u,
    )
}  # fmt: skip
"""Every rule by its name; tests, the command line and the README's table read this."""


def by_name(name: str) -> Callable[..., Any]:
    """The rule called ``name``: one of this page, or of `gradsurgery.elementwise`.

    Raises:
        ValueError: If there is none.

    Example:
        >>> by_name("gru") is gru
        True
    """
    known: dict[str, Callable[..., Any]] = {**RULES, **elementwise.ELEMENTWISE}
    if name not in known:
        raise ValueError(f"rule: expected one of {', '.join(known)}, found {name!r}")
    return known[name]
