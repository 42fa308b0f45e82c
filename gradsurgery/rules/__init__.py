r"""Rules: how the gradients of several objectives become one update.

There are two kinds, and `gradsurgery.GradientSurgery` takes either as ``rule=``, as a function or by its name.
**Coordinate-free rules** see inner products only: Gram matrix -> coefficients. **Elementwise rules**
(`gradsurgery.rules.elementwise`) look at single coordinates: rows -> row.

# Coordinate-free rules

A rule takes ``gram [..., K, K]`` and returns ``coefficients [..., K]`` in float64. Row 0 is the objective being
rectified (``"forget"``), rows 1 to K-1 are protected. The update is $u = \sum_k c_k\,\mathrm{row}_k$, and the
optimizer descends along it. Options are keyword arguments; `functools.partial` binds them.

| rule | what it does | paper |
|---|---|---|
| `sum` | adds all rows: plain training on the sum of the losses | |
| `gradient_difference` | adds the rows with fixed weights | [2401.06121][] |
| `gru` | the nearest update that conflicts with no protected row; several are solved exactly | [2503.09117][] |
| `a_gem` | `gru` against the mean of the protected rows | [1812.00420][] |
| `gem` | `gru` with a margin | [1706.08840][] |
| `cos_clip` | `gru` that never stands still | the GRU authors' code |
| `gu` | removes the whole component along the protected rows, also where it helps them | [2511.17100][] |
| `orthograd` | `gu` plus the mean of the protected rows, one of them per retain example | [2503.02312][] |
| `gradvac` | raises the cosine with each protected row to a fixed target | [2010.05874][] |
| `GradVac` | `gradvac` with a target that follows the cosines of earlier steps | [2010.05874][] |
| `blur` | forgetting first: the retain step, corrected so that forgetting always gains the same | [2506.08164][] |
| `hamu` | gains a given amount on forgetting, within a radius, at the least cost to retention | [2606.02119][] |
| `hamu_u` | `hamu` with the roles of forgetting and retention exchanged | [2606.02119][] |
| `pcgrad` | projects every row off every other one it conflicts with | [2001.06782][] |
| `cagrad` | helps the worst-off row most, near the mean row | [2110.14048][] |
| `mgda` | the shortest convex combination | [Désidéri 2012][] |
| `imtl_g` | equal projections on every row's direction | [ICLR 2021][] |
| `nash_mtl` | the bargaining solution | [2202.01017][] |
| `aligned_mtl` | the mean after rotating the rows to orthogonal ones of equal length | [2305.19000][] |
| `upgrad` | the mean of the rows, each projected so that it conflicts with none | [2406.16232][] |
| `ngdiff` | the sum of the rows scaled to length 1 | [2410.22086][] |

Every rule is batched over leading dimensions and stays on its device. No rule waits for the device, except those that
need an eigendecomposition: CUDA's solver synchronises. Inputs are never modified. A matrix that contains NaN or inf
gets NaN coefficients, and only that matrix of a batch. Zero, parallel and opposite rows give finite coefficients
(except `nash_mtl` for opposite rows, where no bargain exists).

Why coefficients are enough: let a rule not depend on the choice of coordinates, so that rotating all gradients rotates
its answer. Reflecting across the span of the rows then shows that the answer lies in the span. By the first fundamental
theorem of invariants of O(n), its coefficients are functions of inner products only. So the functions Gram matrix ->
coefficients *are* the coordinate-free rules.

Notation in the docstrings: f = row 0, r = a protected row,
$F = \langle f, f\rangle$, $R = \langle r, r\rangle$, $c = \langle f, r\rangle$.

Example:
    >>> import torch
    >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]], dtype=torch.float64)
    >>> gru(gram)
    tensor([1.0000, 0.6000], dtype=torch.float64)
    >>> float((gram @ gru(gram))[1])  # the update no longer conflicts with the protected row
    0.0

# Your own rule

Any function ``[..., K, K] -> [..., K]`` is a rule. `of_gram` adds the checks that the rules here have. This one is
`gru` for one protected row:

    >>> import torch, gradsurgery as gs
    >>> @gs.rules.of_gram
    ... def rectified(gram):
    ...     weight = (-gram[..., 0, 1]).clamp_min(0) / gram[..., 1, 1]
    ...     return torch.stack([torch.ones_like(weight), weight], -1)
    >>> weights = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = gs.GradientSurgery(torch.optim.SGD([weights], lr=0.1), rule=rectified)
    >>> optimizer.join(forget=weights[0] - 2 * weights[1], retain=weights.sum()).backward()
    >>> optimizer.record.coefficients
    tensor([1.0000, 0.5000], dtype=torch.float64)

A rule with a memory follows the protocol `StatefulRule`, as `GradVac` does.

# Elementwise rules

| rule | what it does | paper |
|---|---|---|
| `sago` | the retain gradient where the signs are opposite, the forget gradient elsewhere | [2604.14808][] |
| `sign_agreement` | the mean of the rows where all signs are equal, 0 elsewhere | [2009.00329][] |
| `cglearn` | the mean of the rows where it exceeds tau standard deviations, 0 elsewhere | [2411.06240][] |
| `graddrop` | keeps either the positive or the negative entries, drawn by their sizes | [2010.06808][] |
| `saliency_mask` | the forget gradient where it is large, 0 elsewhere | [2310.12508][] |

`gradsurgery.DualOptimizer` keeps two states of the base optimizer instead of two rows ([2504.15827][]).

[1706.08840]: https://arxiv.org/abs/1706.08840
[1812.00420]: https://arxiv.org/abs/1812.00420
[2001.06782]: https://arxiv.org/abs/2001.06782
[2009.00329]: https://arxiv.org/abs/2009.00329
[2010.05874]: https://arxiv.org/abs/2010.05874
[2010.06808]: https://arxiv.org/abs/2010.06808
[2110.14048]: https://arxiv.org/abs/2110.14048
[2202.01017]: https://arxiv.org/abs/2202.01017
[2305.19000]: https://arxiv.org/abs/2305.19000
[2310.12508]: https://arxiv.org/abs/2310.12508
[2401.06121]: https://arxiv.org/abs/2401.06121
[2406.16232]: https://arxiv.org/abs/2406.16232
[2410.22086]: https://arxiv.org/abs/2410.22086
[2411.06240]: https://arxiv.org/abs/2411.06240
[2503.02312]: https://arxiv.org/abs/2503.02312
[2503.09117]: https://arxiv.org/abs/2503.09117
[2504.15827]: https://arxiv.org/abs/2504.15827
[2506.08164]: https://arxiv.org/abs/2506.08164
[2511.17100]: https://arxiv.org/abs/2511.17100
[2604.14808]: https://arxiv.org/abs/2604.14808
[2606.02119]: https://arxiv.org/abs/2606.02119
[Désidéri 2012]: https://doi.org/10.1016/j.crma.2012.03.014
[ICLR 2021]: https://openreview.net/forum?id=IMPnRXEWpvr
"""

# Names of rules come from the table: a new one needs a row in the docstring above and no line below.
from gradsurgery.rules import elementwise
from gradsurgery.rules._algebra import of_gram
from gradsurgery.rules.multi_task import *  # noqa: F403 (the table lists its rules)
from gradsurgery.rules.projections import *  # noqa: F403 (the table lists its rules)
from gradsurgery.rules.stateful import GradVac, StatefulRule
from gradsurgery.rules.table import RULES, Rule, by_name

# Type checkers know the rules by the two imports of everything.
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "RULES",
    "GradVac",
    "Rule",
    "StatefulRule",
    "by_name",
    "elementwise",
    "of_gram",
    *RULES,
]
