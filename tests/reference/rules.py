"""Oracles of the rules on explicit row vectors ``rows [K, n]`` (float64 numpy, row 0 the forget row): each returns the update ``[n]``.

They solve the papers' own problems, or run the papers' algorithms, instead of using the coefficients derived from them, with general
numerical routines (NNLS, SLSQP, root finding, SVD). The closed forms for two rows, and GRU's for two protected rows, follow at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

Vector = NDArray[np.float64]


def _unit(row: Vector) -> Vector:
    length = np.linalg.norm(row)
    return row / length if length > 0.0 else row


def _nnls(matrix: Vector, target: Vector) -> Vector:
    if matrix.shape[1] == 0:
        return np.zeros(0)
    return optimize.nnls(matrix, target, maxiter=100 * matrix.shape[1])[0]


def dual_cone(vector: Vector, rows: Vector) -> Vector:
    """The point nearest to ``vector`` that conflicts with no row. Moreau's decomposition; the polar part by NNLS."""
    size = np.linalg.norm(vector)
    if size == 0.0 or len(rows) == 0:
        return vector.copy()
    generators = np.stack([_unit(row) for row in rows], 1)
    return vector + size * generators @ _nnls(generators, -vector / size)


def sum(rows: Vector) -> Vector:
    return rows.sum(0)


def gradient_difference(rows: Vector, *, gamma: float = 1.0, alpha: float = 1.0) -> Vector:
    return gamma * rows[0] + alpha * rows[1:].sum(0)


def gru(rows: Vector) -> Vector:
    return dual_cone(rows[0], rows[1:])


def gem(rows: Vector, *, margin: float = 0.0) -> Vector:
    """min |u - f| s.t. <u, r_k> >= margin, as least-distance programming (Lawson and Hanson, chapter 23) by NNLS."""
    forget, protected = rows[0], rows[1:]
    if len(protected) == 0:
        return forget.copy()
    wanted = margin - protected @ forget
    scale = np.maximum(np.abs(protected).max(1), np.abs(wanted))
    protected, wanted = protected / scale[:, None], wanted / scale
    matrix = np.vstack([protected.T, wanted])
    target = np.zeros(len(matrix))
    target[-1] = 1.0
    residual = matrix @ _nnls(matrix, target) - target
    return forget - residual[:-1] / residual[-1]


def a_gem(rows: Vector) -> Vector:
    forget = rows[0]
    if len(rows) == 1:
        return forget.copy()
    mean = rows[1:].mean(0)
    product = forget @ mean
    return forget if product >= 0.0 else forget - product / (mean @ mean) * mean


def gu(rows: Vector) -> Vector:
    """f without its component in the span of the protected rows, the span by SVD of the unit rows."""
    if len(rows) == 1:
        return rows[0].copy()
    _, singular, basis = np.linalg.svd(np.stack([_unit(row) for row in rows[1:]]), full_matrices=False)
    basis = basis[singular > 1e-7 * max(singular.max(), 1.0)]
    return rows[0] - basis.T @ (basis @ rows[0])


def orthograd(rows: Vector, *, gamma: float = 1.0, alpha: float = 1.0) -> Vector:
    """gamma times the residual of f's least-squares fit by the unit protected rows, and alpha times their mean."""
    forget, protected = rows[0], rows[1:]
    if len(protected) == 0:
        return gamma * forget
    directions = np.stack([_unit(row) for row in protected], 1)
    fit = np.linalg.lstsq(directions, forget, rcond=1e-7)[0]
    return gamma * (forget - directions @ fit) + alpha * protected.mean(0)


def gradvac(rows: Vector, *, target: float = 0.0) -> Vector:
    """Algorithm 1 of the paper for the forget row alone, in index order."""
    update = rows[0].copy()
    for row in rows[1:]:
        lengths = np.linalg.norm(update) * np.linalg.norm(row)
        if lengths == 0.0:
            continue
        cosine = np.clip(update @ row / lengths, -1.0, 1.0)
        if cosine < target:
            angle, wanted = np.arccos(cosine), np.arccos(target)
            # The law of sines in the triangle of the update, the row's share and their sum.
            update = update + np.linalg.norm(update) * np.sin(angle - wanted) / np.sin(wanted) * _unit(row)
    return update


def blur(rows: Vector, *, gamma: float = 1.0) -> Vector:
    """The retain direction made orthogonal to f, and gamma f: the bi-level update."""
    direction, retain = _unit(rows[0]), rows[1:].sum(0)
    return gamma * rows[0] + retain - (retain @ direction) * direction


def hamu(rows: Vector, *, gain: float, radius: float) -> Vector:
    """max <r, u> s.t. <f, u> >= gain, |u| <= radius, by SLSQP in the plane of f and r; gain within reach."""
    forget, retain = rows[0], rows[1:].sum(0)
    basis, coordinates = np.linalg.qr(np.stack([forget, retain], 1))
    f, r = coordinates[:, 0], coordinates[:, 1]
    result = optimize.minimize(
        lambda u: -(r @ u) / np.linalg.norm(r),
        x0=f / np.linalg.norm(f) * 0.5 * (gain / np.linalg.norm(f) + radius),
        jac=lambda _: -r / np.linalg.norm(r),
        constraints=[
            {
                "type": "ineq",
                "fun": lambda u: (f @ u - gain) / np.linalg.norm(f),
                "jac": lambda _: f / np.linalg.norm(f),
            },
            {"type": "ineq", "fun": lambda u: radius**2 - u @ u, "jac": lambda u: -2.0 * u},
        ],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return basis @ result.x


def hamu_u(rows: Vector, *, gain: float, radius: float) -> Vector:
    """max <f, u> s.t. <r, u> >= gain, |u| <= radius: the same program with the rows exchanged."""
    return hamu(np.stack([rows[1:].sum(0), rows[0]]), gain=gain, radius=radius)


def pcgrad(rows: Vector, *, orders: list[list[int]] | None = None) -> Vector:
    """Algorithm 1, summed. ``orders[i]`` is the order in which row i meets the others; index order by default."""
    total = np.zeros_like(rows[0])
    for i, row in enumerate(rows):
        projected = row.copy()
        for j in range(len(rows)) if orders is None else orders[i]:
            other = rows[j]
            if j != i and projected @ other < 0.0:
                projected -= projected @ other / (other @ other) * other
        total += projected
    return total


def mgda(rows: Vector) -> Vector:
    """The point of least norm in the hull of the rows: NNLS of [rows^T; 1^T] against (0, 1), scaled to weights that add up to 1."""
    scale = np.linalg.norm(rows, axis=1).max()
    if scale == 0.0:
        return np.zeros_like(rows[0])
    weights = _nnls(np.vstack([rows.T / scale, np.ones(len(rows))]), np.append(np.zeros(rows.shape[1]), 1.0))
    return weights / weights.sum() @ rows


def cagrad(rows: Vector, *, c: float = 0.5) -> Vector:
    """Equation 3: min over w in the simplex of <g_w, g_0> + radius |g_w|, radius = c |g_0|.

    With radius |p| = min over t > 0 of |p|^2 / (2 t) + t radius^2 / 2 it is jointly convex in (w, t), and for a fixed t the point of least
    norm in the hull of the rows shifted by t g_0. Valid where g_w is not 0 at the optimum.
    """
    mean = rows.mean(0)
    radius = c * np.linalg.norm(mean)
    longest = np.linalg.norm(rows, axis=1).max()
    if radius == 0.0:
        return mean

    def dual(log_t: float) -> tuple[float, Vector]:
        t = np.exp(log_t)
        point = mgda(rows + t * mean) - t * mean
        return point @ mean + point @ point / (2.0 * t) + t * radius**2 / 2.0, point

    start, end = np.log(1e-8 * longest / radius), np.log(1e2 * longest / radius)
    grid = np.linspace(start, end, 41)
    best = int(np.argmin([dual(x)[0] for x in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    result = optimize.minimize_scalar(lambda x: dual(x)[0], bounds=bounds, method="bounded", options={"xatol": 1e-10})
    return mean + radius * _unit(dual(result.x)[1])


def imtl_g(rows: Vector) -> Vector:
    """Weights that add up to 1 and make the projections on all unit rows equal (section 3.1); independent rows."""
    units = np.stack([_unit(row) for row in rows])
    system = np.vstack([(units[:1] - units[1:]) @ rows.T / np.linalg.norm(rows, axis=1).max(), np.ones(len(rows))])
    return np.linalg.solve(system, np.append(np.zeros(len(rows) - 1), 1.0)) @ rows


def ngdiff(rows: Vector) -> Vector:
    return np.stack([_unit(row) for row in rows]).sum(0)


def nash_mtl(rows: Vector) -> Vector:
    """The root of J J^T a = 1/a (equation 3), a > 0, in the logarithm of a."""
    gram = rows @ rows.T

    def equations(log_a: Vector) -> Vector:
        a = np.exp(log_a)
        return a * (gram @ a) - 1.0

    def jacobian(log_a: Vector) -> Vector:
        a = np.exp(log_a)
        return a[:, None] * gram * a[None, :] + np.diag(a * (gram @ a))

    start = optimize.minimize(
        lambda log_a: 0.5 * np.exp(log_a) @ gram @ np.exp(log_a) - log_a.sum(),
        x0=-0.5 * np.log(np.diag(gram)),
        jac=equations,
        method="BFGS",
    )
    result = optimize.root(equations, start.x, jac=jacobian, tol=1e-14)
    assert np.abs(result.fun).max() < 1e-9, "the oracle found no bargain"
    return np.exp(result.x) @ rows


def aligned_mtl(rows: Vector) -> Vector:
    """All singular values of the rows are set to the least of those that are not 0 (algorithm 1), and the mean is taken."""
    left, singular, right = np.linalg.svd(rows, full_matrices=False)
    if singular.max() == 0.0:
        return np.zeros_like(rows[0])
    kept = singular > 1e-7 * singular.max()
    balanced = singular[kept].min() * left[:, kept] @ right[kept]
    return balanced.mean(0)


def upgrad(rows: Vector) -> Vector:
    return np.stack([dual_cone(row, rows) for row in rows]).mean(0)


ORACLES: dict[str, Callable[..., Vector]] = {
    function.__name__: function
    for function in (
        sum, gradient_difference, gru, gem, a_gem, gu, orthograd, gradvac, blur, hamu, hamu_u, pcgrad, mgda, cagrad, imtl_g, ngdiff, nash_mtl, aligned_mtl,
        upgrad,
    )
}  # fmt: skip


# The table of closed forms: F = <f, f>, R = <r, r>, p = <f, r> -> the coefficients (a, b) of u = a f + b r.


def _mgda_two(F: float, R: float, p: float) -> tuple[float, float]:
    distance = F + R - 2.0 * p
    x = 0.5 if distance == 0.0 else min(max((R - p) / distance, 0.0), 1.0)
    return x, 1.0 - x


def _cagrad_two(F: float, R: float, p: float, *, c: float = 0.5) -> tuple[float, float]:
    distance, across, lead = F + R - 2.0 * p, F * R - p * p, (F - R) / 2.0
    radius = c * np.sqrt((F + R + 2.0 * p) / 4.0)
    height = across / distance
    if radius**2 * distance <= lead**2:
        x = 0.0 if lead > 0.0 else 1.0
    else:
        x = (R - p) / distance - lead * np.sqrt(height) / np.sqrt(distance * (radius**2 * distance - lead**2))
        x = min(max(x, 0.0), 1.0)
    length = np.sqrt(F * x**2 + 2.0 * p * x * (1.0 - x) + R * (1.0 - x) ** 2)
    return 0.5 + radius * x / length, 0.5 + radius * (1.0 - x) / length


def _aligned_two(F: float, R: float, p: float) -> tuple[float, float]:
    area = np.sqrt(F * R - p * p)
    least = (F + R - np.sqrt((F + R) ** 2 - 4.0 * area**2)) / 2.0
    k = 0.5 * np.sqrt(least) / (area * np.sqrt(F + R + 2.0 * area))
    return k * (R + area - p), k * (F + area - p)


def _gradvac_two(F: float, R: float, p: float, *, target: float = 0.0) -> tuple[float, float]:
    cosine, t = p / np.sqrt(F * R), target
    if cosine >= t:
        return 1.0, 0.0
    across = np.sqrt(1.0 - t**2)
    return 1.0, np.sqrt(F) * (t * np.sqrt(1.0 - cosine**2) - cosine * across) / (np.sqrt(R) * across)


def _cos_clip_two(F: float, R: float, p: float, *, floor: float = -0.5) -> tuple[float, float]:
    return 1.0, 0.0 if p >= 0.0 else -np.sqrt(F) * max(p / np.sqrt(F * R), floor) / np.sqrt(R)


def _hamu_two(F: float, R: float, p: float, *, gain: float, radius: float) -> tuple[float, float]:
    if p >= gain * np.sqrt(R) / radius:
        return 0.0, radius / np.sqrt(R)
    slack, across = np.sqrt(radius**2 - gain**2 / F), np.sqrt(R - p * p / F)
    return gain / F - slack * p / (F * across), slack / across


def _nash_two(F: float, R: float, p: float) -> tuple[float, float]:
    t = 1.0 / np.sqrt(1.0 + p / np.sqrt(F * R))
    return t / np.sqrt(F), t / np.sqrt(R)


def _projected_two(F: float, R: float, p: float) -> tuple[float, float]:
    return 1.0, max(0.0, -p) / R


TWO_ROWS: dict[str, Callable[..., tuple[float, float]]] = {
    "sum": lambda F, R, p: (1.0, 1.0),
    "gradient_difference": lambda F, R, p, *, gamma=1.0, alpha=1.0: (gamma, alpha),
    "gru": _projected_two,
    "a_gem": _projected_two,
    "gem": lambda F, R, p, *, margin=0.0: (1.0, max(0.0, margin - p) / R),
    "cos_clip": _cos_clip_two,
    "pcgrad": lambda F, R, p: (1.0 - min(0.0, p) / F, 1.0 - min(0.0, p) / R),
    "gradvac": _gradvac_two,
    "blur": lambda F, R, p, *, gamma=1.0: (gamma - p / F, 1.0),
    "gu": lambda F, R, p: (1.0, -p / R),
    "mgda": _mgda_two,
    "cagrad": _cagrad_two,
    "imtl_g": lambda F, R, p: (np.sqrt(R) / (np.sqrt(F) + np.sqrt(R)), np.sqrt(F) / (np.sqrt(F) + np.sqrt(R))),
    "ngdiff": lambda F, R, p: (1.0 / np.sqrt(F), 1.0 / np.sqrt(R)),
    "nash_mtl": _nash_two,
    "aligned_mtl": _aligned_two,
    "upgrad": lambda F, R, p: ((1.0 - min(0.0, p) / F) / 2.0, (1.0 - min(0.0, p) / R) / 2.0),
    "hamu": _hamu_two,
    "hamu_u": lambda F, R, p, *, gain, radius: _hamu_two(R, F, p, gain=gain, radius=radius)[::-1],
    "orthograd": lambda F, R, p, *, gamma=1.0, alpha=1.0: (gamma, -gamma * p / R + alpha),
}


def gru_two_protected(q1: float, q2: float, A: float, h: float, B: float) -> tuple[float, float]:
    """The multipliers of two protected rows with Gram matrix [[A, h], [h, B]] and products q = (<f, r_1>, <f, r_2>), case by case."""
    tolerance = 1e-12 * (abs(q1) + abs(q2))
    if q1 >= 0.0 and q2 >= 0.0:
        return 0.0, 0.0
    if q1 < 0.0 and A > 0.0 and q2 - h * q1 / A >= -tolerance:
        return -q1 / A, 0.0
    if q2 < 0.0 and B > 0.0 and q1 - h * q2 / B >= -tolerance:
        return 0.0, -q2 / B
    area = A * B - h * h
    return (h * q2 - B * q1) / area, (h * q1 - A * q2) / area
