r"""The coordinate-free rules: pure functions Gram matrix -> coefficients.

A rule takes ``gram [..., K, K]`` (float64, row 0 is the objective being rectified, ``"forget"``; rows 1 .. K-1 are protected) and
returns ``coefficients [..., K]``: the update is :math:`u = \sum_k c_k\,\mathrm{row}_k`, along which the optimizer descends. Options
are keywords; `functools.partial` binds them.

Why this signature is enough: if a rule does not depend on the choice of coordinates (rotating all gradients rotates the answer),
reflecting across the rows' span shows that its answer lies in the span, and the first fundamental theorem of invariants for O(n) that
its coefficients are functions of inner products only. So Gram -> coefficients *is* the class of all coordinate-free rules.

Every rule is batched over leading dimensions, stays on its device (rules that need an eigendecomposition let CUDA's solver
synchronise, no other does), never modifies its input, and answers a matrix with a NaN or inf in it by NaN, for that matrix only. Zero,
parallel and opposite rows give finite coefficients (Nash-MTL excepted for opposite rows, whose bargain has no solution). Notation in
the docstrings: f = row 0, r = a protected row, F = <f, f>, R = <r, r>, c = <f, r>.

Example:
    >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]], dtype=torch.float64)
    >>> gru(gram)
    tensor([1.0000, 0.6000], dtype=torch.float64)
    >>> float((gram @ gru(gram))[1])  # the protected row is no longer in conflict with the update
    0.0
"""

from gradsurgery.rules.projections import (
    RULES,
    Rule,
    a_gem,
    aligned_mtl,
    blur,
    by_name,
    cagrad,
    cos_clip,
    gem,
    gradient_difference,
    gradvac,
    gru,
    gu,
    hamu,
    hamu_u,
    imtl_g,
    mgda,
    nash_mtl,
    ngdiff,
    orthograd,
    pcgrad,
    sum,
    upgrad,
)
from gradsurgery.rules.stateful import GradVac, StatefulRule

__all__ = [
    "RULES",
    "GradVac",
    "Rule",
    "StatefulRule",
    "a_gem",
    "aligned_mtl",
    "blur",
    "by_name",
    "cagrad",
    "cos_clip",
    "gem",
    "gradient_difference",
    "gradvac",
    "gru",
    "gu",
    "hamu",
    "hamu_u",
    "imtl_g",
    "mgda",
    "nash_mtl",
    "ngdiff",
    "orthograd",
    "pcgrad",
    "sum",
    "upgrad",
]
