r"""Rules in which the forget row has a standing of its own: fixed weights, and projections of the forget row.

`gradsurgery.rules` says what all rules have in common, and gives the notation: f = row 0, r = a protected row,
$F = \langle f, f\rangle$, $R = \langle r, r\rangle$, $c = \langle f, r\rangle$.
"""

import torch
from torch import Tensor

from gradsurgery.rules import _algebra, _programs
from gradsurgery.rules._algebra import of_gram


@of_gram
def sum(gram: Tensor) -> Tensor:
    """Add all rows, with coefficients (1, ..., 1): plain training on the sum of the losses.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> sum(gram)
        tensor([1., 1.], dtype=torch.float64)
    """
    return gram.new_ones(gram.shape[:-1])


@of_gram
def gradient_difference(gram: Tensor, *, gamma: float = 1.0, alpha: float = 1.0) -> Tensor:
    """GradDiff, the sum with fixed coefficients (gamma, alpha, ..., alpha). ``alpha=0`` is the forget row alone.

    Source: TOFU (2401.06121), section 4, "gradient difference"; the defaults are open-unlearning's.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> gradient_difference(gram, alpha=2.0)
        tensor([1., 2.], dtype=torch.float64)
    """
    return torch.cat(
        [gram.new_full((*gram.shape[:-2], 1), gamma), gram.new_full((*gram.shape[:-2], gram.shape[-1] - 1), alpha)], -1
    )


@of_gram
def gru(gram: Tensor) -> Tensor:
    r"""GRU: the update nearest to f that conflicts with no protected row.

    $$\min_u \lVert u - f\rVert^2 \;\text{ s.t. }\; \langle u, r_k\rangle \ge 0,
    \qquad u = f + \sum_k \lambda_k r_k, \quad \lambda \ge 0 .$$

    With one protected row the coefficients are $(1, \max(0, -c)/R)$. With several, the quadratic program is
    solved exactly, by an active-set method on the K x K matrix. Projecting off one row after another would not do: a
    later projection can bring back a conflict that an earlier one removed. Rescaling a protected row does not change
    the update.

    Source: Gradient Rectified Unlearning (2503.09117), the closed form of its problem for one retain gradient. The
    program with several constraints is our generalisation. Difference from the authors' code: sign and coefficient
    come from the same float64 matrix, while there the sign is decided by bf16 products. The EMA of the retain
    gradient is the optimizer's ``ema_decay`` and not part of the rule.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> gru(gram)
        tensor([1.0000, 0.6000], dtype=torch.float64)
    """
    return _rectified(gram, 0.0)


@of_gram
def gem(gram: Tensor, *, margin: float = 0.0) -> Tensor:
    r"""GEM: `gru` with a margin, $\langle u, r_k\rangle \ge$ ``margin``, in the units of the Gram matrix.

    A margin that cannot be met (opposite protected rows) gives non-finite coefficients.

    Source: Gradient Episodic Memory (1706.08840), equation 11. Differences from the authors' code: no 1e-3 is added to
    the matrix, and ``margin`` bounds the products, where their ``memory_strength`` bounds the multipliers from below.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> gem(gram, margin=1.0)
        tensor([1.0000, 0.8000], dtype=torch.float64)
    """
    return _rectified(gram, margin)


@of_gram
def a_gem(gram: Tensor) -> Tensor:
    r"""A-GEM: `gru` against the mean of the protected rows only.

    With r the mean of the protected rows, the update is $f + b r$ with
    $b = \max(0, -\langle f, r\rangle)/\lVert r\rVert^2$. So the coefficients are 1 for f and b/(K - 1) for every
    protected row. With one protected row it is `gru`. With several it promises only that their mean does not get worse.

    Source: Averaged GEM (1812.00420), equation 11.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> a_gem(gram)
        tensor([1.0000, 0.6000], dtype=torch.float64)
    """
    others = gram.shape[-1] - 1
    if others == 0:
        return torch.ones_like(gram[..., 0])
    product, square = gram[..., 0, 1:].mean(-1), gram[..., 1:, 1:].mean((-1, -2))
    shared = _algebra.ratio((-product).clamp_min(0.0), square) / others
    return _algebra.with_first(torch.ones_like(product), shared[..., None].expand(*shared.shape, others))


@of_gram
def cos_clip(gram: Tensor, *, floor: float = -0.5) -> Tensor:
    r"""GRU's ``cos_clip`` option: `gru` that treats each cosine of f and a protected row as at least ``floor``.

    Where the cosine is below the floor, the update still conflicts,
    $\langle u, r\rangle = \sqrt{FR}\,(\cos - \mathrm{floor})$, but it never shrinks to nothing: opposite rows
    give (1 + floor) f, where `gru` gives 0.

    Source: the GRU authors' code (floor -0.5, off by default), for one protected row; several are our generalisation.

    Args:
        gram: ``[..., K, K]``.
        floor: In [-1, 0].

    Raises:
        ValueError: If ``floor`` is outside [-1, 0].

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> cos_clip(gram, floor=-0.1)
        tensor([1.0000, 0.2236], dtype=torch.float64)
    """
    if not -1.0 <= floor <= 0.0:
        raise ValueError(f"floor: expected a cosine in [-1, 0], found {floor}")
    unit, norms = _algebra.normalised(gram)
    return _algebra.unit_forget(_programs.multipliers_of(unit[..., 1:, 1:], unit[..., 0, 1:].clamp_min(floor)), norms)


@of_gram
def gu(gram: Tensor) -> Tensor:
    """GU: remove from f its whole component in the span of the protected rows, also where it would help them.

    The coefficients are (1, b) with $b = -M^+ q$, M the Gram matrix of the protected rows and q their products
    with f; for one protected row $b = -c/R$.

    Source: Geometric-disentanglement Unlearning (2511.17100), which takes the Gram matrix in the optimizer's metric
    (``metric="optimizer"`` here).

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> gu(gram)
        tensor([1.0000, 0.6000], dtype=torch.float64)
    """
    return _across(gram)


def _across(gram: Tensor) -> Tensor:
    unit, norms = _algebra.normalised(gram)
    return _algebra.unit_forget(-(_algebra.pinv(unit[..., 1:, 1:]) @ unit[..., 1:, :1]).squeeze(-1), norms)


@of_gram
def orthograd(gram: Tensor, *, gamma: float = 1.0, alpha: float = 1.0) -> Tensor:
    r"""OrthoGrad: gamma times what `gu` leaves of f, plus alpha times the mean of the K - 1 protected rows.

    $$(\gamma,\; -\gamma M^+ q + \alpha/(K - 1)), \qquad M_{kl} = \langle r_k, r_l\rangle,
    \ q_k = \langle f, r_k\rangle .$$

    It is meant for one protected row per retain *example*, each an objective of its own
    (``objectives=("forget", "retain_0", "retain_1", ...)``): f is made orthogonal to the gradient of every example, not
    only to their mean. With ``alpha=0`` and one protected row it is `gu`.

    Source: Go Beyond Your Means (2503.02312), per-sample gradient orthogonalization, with weights ``gamma`` and
    ``alpha``. Difference: the projection uses the pseudo-inverse of the Gram matrix, where a QR decomposition of all
    rows' coordinates is usual.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> orthograd(gram)
        tensor([1.0000, 1.6000], dtype=torch.float64)
    """
    number = gram.shape[-1] - 1
    mean = torch.cat([gram.new_zeros(1), gram.new_full((number,), alpha / max(number, 1))])
    return gamma * _across(gram) + mean


@of_gram
def gradvac(gram: Tensor, *, target: float = 0.0) -> Tensor:
    r"""GradVac with a fixed target, one-sided: raise the cosine of f with each protected row to at least ``target``.

    The protected rows r are taken in index order, and each adds b r to f:

    $$b = \frac{\lVert f\rVert\,(t\sqrt{1-\cos^2} - \cos\sqrt{1-t^2})}{\lVert r\rVert\sqrt{1-t^2}}
    \;\text{ if } \cos < t, \text{ else } 0 .$$

    ``target=0`` with one protected row is `gru`. The class `GradVac` moves the target, as the paper does.

    Source: Gradient Vaccine (2010.05874), equation 3; there every task is adjusted towards every other, in random
    order.

    Args:
        gram: ``[..., K, K]``.
        target: t, a cosine in (-1, 1).

    Raises:
        ValueError: If ``target`` is outside (-1, 1).

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> gradvac(gram, target=0.1)
        tensor([1.0000, 0.8165], dtype=torch.float64)
    """
    return _algebra.vaccinated(gram, gram.new_full((gram.shape[-1] - 1,), _checked_target(target)))[0]


@of_gram
def blur(gram: Tensor, *, gamma: float = 1.0) -> Tensor:
    r"""BLUR, forgetting first: the retain step, changed along f so that $\langle u, f\rangle$ is always gamma F.

    $$u = r + (\gamma - c/F) f$$

    with r the sum of the protected rows. A zero forget row leaves u = r.

    Source: BLUR (2506.08164), the bi-level update of its authors' code.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> blur(gram)
        tensor([1.1200, 1.0000], dtype=torch.float64)
    """
    product = gram[..., 0, 1:].sum(-1)
    return _algebra.with_first(gamma - _algebra.ratio(product, gram[..., 0, 0]), torch.ones_like(gram[..., 0, 1:]))


@of_gram
def hamu(gram: Tensor, *, gain: float, radius: float) -> Tensor:
    r"""HAMU-Q: a step no longer than ``radius`` that gains ``gain`` on forgetting, at the least cost to retention.

    $$\max_u \langle r, u\rangle \;\text{ s.t. }\; \langle f, u\rangle \ge \mathrm{gain},
    \ \lVert u\rVert \le \mathrm{radius},$$

    with r the sum of the protected rows. There are three cases:

    - The pure retain step forgets enough: the coefficients are $(0, \mathrm{radius}/\sqrt R)$. They are the same
      for a zero forget row.
    - The gain is out of reach, $\mathrm{gain} > \mathrm{radius}\sqrt F$: the step goes along f, with length
      ``radius``.
    - Otherwise the coefficients are (a, b) with $a = \mathrm{gain}/F - sc/(Fn)$, $b = s/n$,
      $s^2 = \mathrm{radius}^2 - \mathrm{gain}^2/F$ and $n^2 = R - c^2/F$.

    The answer is a displacement: use it with plain SGD of learning rate 1. It is not scale-free; ``gain`` and
    ``radius`` carry units.

    Source: HAMU (2606.02119) and its authors' code. Differences from the code: it works tensor by tensor
    (``scope="tensor"`` here), with the gain divided among the tensors; it leaves the ball where the gain is out of
    reach; and it stands still at a zero forget row.

    Args:
        gram: ``[..., K, K]``.
        gain: The least $\langle f, u\rangle$, >= 0.
        radius: Greatest length of the step, > 0.

    Raises:
        ValueError: If ``gain`` or ``radius`` is out of range.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> coefficients = hamu(gram, gain=20.0, radius=5.0)
        >>> coefficients
        tensor([0.9671, 1.3927], dtype=torch.float64)
        >>> float(gram[0].double() @ coefficients), float(coefficients @ gram.double() @ coefficients)
        (20.0, 25.0)
    """
    first, second = _hamu(gram[..., 0, 0], gram[..., 0, 1:].sum(-1), gram[..., 1:, 1:].sum((-1, -2)), gain, radius)
    return _algebra.with_first(first, second[..., None].expand_as(gram[..., 0, 1:]))


@of_gram
def hamu_u(gram: Tensor, *, gain: float, radius: float) -> Tensor:
    r"""HAMU-U: `hamu` with f and r exchanged, the step that forgets most while retention gains ``gain``.

    $$\max_u \langle f, u\rangle \;\text{ s.t. }\; \langle r, u\rangle \ge \mathrm{gain},
    \ \lVert u\rVert \le \mathrm{radius} .$$

    ``gain=0`` asks that retention gets no worse. Everything else is as in `hamu`, with the roles exchanged.

    Source: HAMU (2606.02119), variant ``hamu-u`` of its authors' code; differences as in `hamu`.

    Example:
        >>> gram = torch.tensor([[25.0, -3.0], [-3.0, 5.0]])
        >>> hamu_u(gram, gain=1.0, radius=5.0)
        tensor([1.0339, 0.8203], dtype=torch.float64)
    """
    second, first = _hamu(gram[..., 1:, 1:].sum((-1, -2)), gram[..., 0, 1:].sum(-1), gram[..., 0, 0], gain, radius)
    return _algebra.with_first(first, second[..., None].expand_as(gram[..., 0, 1:]))


def _hamu(forget: Tensor, product: Tensor, retain: Tensor, gain: float, radius: float) -> tuple[Tensor, Tensor]:
    """The coefficient of the row that must gain (its square is ``forget``), and that of the other (``retain``)."""
    if not (radius > 0.0 and gain >= 0.0):
        raise ValueError(f"gain, radius: expected gain >= 0 and radius > 0, found gain={gain}, radius={radius}")
    slack = (radius**2 - _algebra.ratio(forget.new_full((), gain**2), forget)).clamp_min(0.0).sqrt()
    across = (retain - _algebra.ratio(product.square(), forget)).clamp_min(0.0)
    sideways = torch.where(across > _programs.TOLERANCE * retain, _algebra.ratio(slack, across.sqrt()), 0.0)
    first = _algebra.ratio(gain - sideways * product, forget)
    enough = (product * radius >= gain * retain.sqrt()) & (retain > 0.0)
    unreachable = gain > radius * forget.sqrt()
    only_forget, only_retain = (
        _algebra.ratio(forget.new_full((), radius), forget.sqrt()),
        _algebra.ratio(forget.new_full((), radius), retain.sqrt()),
    )
    enough = enough | (forget == 0.0)  # with a zero row nothing can be gained, and only the other row is left
    first = torch.where(enough, 0.0, torch.where(unreachable, only_forget, first))
    return first, torch.where(enough, only_retain, torch.where(unreachable, 0.0, sideways))


def _rectified(gram: Tensor, margin: float) -> Tensor:
    unit, norms = _algebra.normalised(gram)
    if margin == 0.0:
        return _algebra.unit_forget(_programs.multipliers_of(unit[..., 1:, 1:], unit[..., 0, 1:]), norms)
    # A margin has units, so the forget row keeps its length here; the protected rows are normalised.
    required = _algebra.ratio(torch.full_like(norms[..., 1:], margin), norms[..., 1:])
    wanted = unit[..., 0, 1:] * norms[..., :1] - required
    size = wanted.abs().amax(-1, keepdim=True) if wanted.shape[-1] else wanted
    multipliers = _programs.multipliers_of(unit[..., 1:, 1:], _algebra.ratio(wanted, size)) * size
    # A margin can be infeasible, and the last ridge then gives an answer that breaks it: NaN instead.
    slack = (unit[..., 1:, 1:] @ multipliers[..., None]).squeeze(-1) + wanted
    kept = (slack >= -0.01 * required.abs() - _programs.ACCURACY * size).all(-1, keepdim=True)
    return _algebra.with_first(
        torch.ones_like(norms[..., 0]), torch.where(kept, _algebra.ratio(multipliers, norms[..., 1:]), torch.nan)
    )


def _checked_target(target: float) -> float:
    if not -1.0 < target < 1.0:
        raise ValueError(f"target: expected a cosine in (-1, 1), found {target}")
    return target
