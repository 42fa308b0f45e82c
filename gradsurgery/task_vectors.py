"""Arithmetic on state dicts: task vectors, unlearning by negation, and mixing with the original model.

What a model learned is the difference of its weights, and can be taken away again:

- `task_vector` and `negate`: fine-tune further on what is to be forgotten, and subtract what that added
  ([2212.04089](https://arxiv.org/abs/2212.04089)).
- `rectified`: negation that does not conflict with other knowledge, in the spirit of GRU's TRU. Unverified: the
  paper's own definition was not available.
- `mix` and `calibrate_mix`: UWC's mixing of the unlearned with the original model
  ([2406.09179](https://arxiv.org/abs/2406.09179)), and a search for the mix that restores a given share of the original
  utility, so that methods are compared at equal retention.

A state dict maps names to tensors. Nothing here changes its arguments or shares memory with them. The answer has the
types and devices of the first argument, and one entry at a time is computed.

- Half-precision entries are computed in float32 and rounded once.
- Integer and boolean entries (step counts, masks) must be equal in all arguments and are copied.
- Entries that share memory in the first argument (tied weights) share it in the answer, and must be equal in the other
  arguments.
- With LoRA, pass merged weights, or everything that training changed (FILA changes the base too).

Example:
    >>> before, after = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])}
    >>> task_vector(before, after)
    {'w': tensor([2., 0.])}
    >>> negate(before, task_vector(before, after), weight=0.5)
    {'w': tensor([0., 2.])}
    >>> mix(before, after, 0.25)
    {'w': tensor([2.5000, 2.0000])}
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from gradsurgery import rules
from gradsurgery.gram import gram, local_tensor

StateDict: TypeAlias = Mapping[str, Tensor]
"""Names to tensors, as ``model.state_dict()`` returns."""

# At most 60 calls: 2 scores, a bisection, a grid where that was not enough, and a second bisection with what is left.
_MOST_CALLS = 60
_BISECTIONS = 32
_GRID = 16


def task_vector(before: StateDict, after: StateDict) -> dict[str, Tensor]:
    r"""What training added: $\tau = \theta_{\mathrm{after}} - \theta_{\mathrm{before}}$, 0 for integer entries.

    Equal entries give 0, infinite ones (of a mask that is a buffer) too.

    Source: Editing Models with Task Arithmetic (2212.04089), section 2.

    Raises:
        ValueError: If the two do not have the same names and shapes, or integer entries differ.

    Cost: one copy of the model.
    """
    return _combined(
        lambda old, new: torch.where(old == new, torch.zeros_like(old), new - old),
        {"before": before, "after": after},
        equal=True,
        integers=torch.zeros_like,
    )


def negate(before: StateDict, vector: StateDict, weight: float = 1.0) -> dict[str, Tensor]:
    r"""Unlearning by negation: $\theta = \theta_{\mathrm{before}} - \mathrm{weight}\cdot\tau$.

    The vector is that of a model which was fine-tuned further on what is to be forgotten.

    Source: Editing Models with Task Arithmetic (2212.04089), section 3.

    Args:
        before: The model.
        vector: From `task_vector`.
        weight: Multiple of the vector to subtract.

    Raises:
        ValueError: As `task_vector`; a vector must be 0 at integer entries.

    Example:
        >>> negate({"w": torch.tensor([1.0])}, {"w": torch.tensor([0.5])}, weight=2.0)
        {'w': tensor([0.])}
    """
    _check_vectors({"vector": vector})
    return _combined(lambda old, tau: old - weight * tau, {"before": before, "vector": vector})


def mix(before: StateDict, after: StateDict, rho: float) -> dict[str, Tensor]:
    r"""UWC's model mixing: $\theta = \rho\,\theta_{\mathrm{before}} + (1 - \rho)\,\theta_{\mathrm{after}}$.

    rho is the share of the ORIGINAL model: 0 gives the unlearned one, 1 the original. Equal entries stay as they are,
    infinite ones (of a mask that is a buffer) too.

    Source: Towards Effective Evaluations and Comparisons for LLM Unlearning Methods (2406.09179), its calibration,
    and the authors' code.

    Args:
        before: The original model.
        after: The unlearned model.
        rho: In [0, 1].

    Raises:
        ValueError: If rho is outside [0, 1], or as `task_vector`.

    Cost: one copy of the model.
    """
    if not 0.0 <= rho <= 1.0:
        raise ValueError(f"rho: expected the original model's share, in [0, 1], found {rho}")

    def mixed(old: Tensor, new: Tensor) -> Tensor:
        if rho in (0.0, 1.0):
            return (old if rho else new).clone()
        return torch.where(old == new, old, rho * old + (1.0 - rho) * new)

    return _combined(mixed, {"before": before, "after": after}, equal=True)


def rectified(
    before: StateDict, vectors: Sequence[StateDict], references: Sequence[StateDict], weight: float = 1.0
) -> dict[str, Tensor]:
    r"""Negation of rectified task vectors, TRU-style (unverified).

    The forget set is split into parts s. Let $v_s = -\tau(s)$, and let the reference $\tau_{\bar s}$ be
    the task vector of the other parts; moving along it keeps other knowledge. Each $v_s$ is projected as
    `rules.gru` projects a gradient:

    $$\theta = \theta_{\mathrm{before}} + \mathrm{weight} \sum_s
    \Bigl(v_s + \frac{\max(0, -\langle v_s, \tau_{\bar s}\rangle)}{\lVert \tau_{\bar s}\rVert^2}
    \,\tau_{\bar s}\Bigr) .$$

    Source: in the spirit of TRU, the retain-free variant of GRU (2503.09117, section 4). TRU-style (unverified): the
    paper's own definition was not at hand and its code does not contain it; this form is ours.

    Args:
        before: The model.
        vectors: `task_vector` of each part.
        references: For each part, `task_vector` of all other parts together.
        weight: Multiple of the summed vectors.

    Raises:
        ValueError: If there is no part, the numbers of vectors and references differ, or as `negate`.

    Cost: two copies of the model.
    """
    if not vectors or len(vectors) != len(references):
        raise ValueError(
            f"vectors, references: expected one reference for each of at least one part, found {len(vectors)} and {len(references)}"
        )
    named = {
        f"{kind}[{s}]": part
        for kind, parts in (("vectors", vectors), ("references", references))
        for s, part in enumerate(parts)
    }
    _check_vectors(named)
    given: dict[str, StateDict] = {"before": before, **named}
    _check(given)
    names = [
        name for name, first in _first_of(before).items() if name == first and _real(before[name])
    ]  # tied weights once
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu")  # row 0 is minus the task vector
    shares: list[float] = []
    for vector, reference in zip(vectors, references, strict=True):
        products = gram(
            [[vector[name] for name in names], [reference[name].to(vector[name].device) for name in names]]
        ).cpu()
        shares.append(float(rules.gru(products * signs[:, None] * signs)[1]))
    factors = [-weight] * len(vectors) + [weight * share for share in shares]

    def move(old: Tensor, *parts: Tensor) -> Tensor:
        return functools.reduce(lambda total, pair: total + pair[0] * pair[1], zip(factors, parts, strict=True), old)

    return _combined(move, given)


def calibrate_mix(
    before: StateDict,
    after: StateDict,
    score: Callable[[dict[str, Tensor]], float],
    target: float = 0.95,
    tolerance: float = 1e-3,
) -> float:
    """The smallest share of the original model that restores retention: UWC's calibration.

    Methods that retain equally much after it can be compared on forgetting. The answer is a rho with
    ``score(mix(before, after, rho)) >= target * score(before)``:

    - It is exactly 0 if ``after`` passes.
    - Otherwise bisection ends at a rho that passes, at most ``tolerance`` above one that fails. If the scores seen on
      the way rise with rho until they reach the target, that is the answer.
    - If they do not, 16 equally spaced shares below it are scored too, and the search is repeated below the smallest
      that passes. An interval of passing shares that is narrower than the spacing may still be missed.

    The returned rho was scored, and passes.

    Source: Towards Effective Evaluations and Comparisons for LLM Unlearning Methods (2406.09179), which names the
    share to restore, 95 %. The search is ours: the authors' code sets rho by hand.

    Args:
        before: The original model.
        after: The unlearned model.
        score: State dict -> retention, larger is better and positive for the original model (model utility,
            probability of the retain answers). It must not depend on chance. Every call gets a new dict.
        target: Share of the original score to restore, in (0, 1].
        tolerance: Of rho, in (0, 1).

    Returns:
        rho, in [0, 1].

    Raises:
        ValueError: If an option is out of range, the two do not fit (see `mix`), a score is not finite, or the
            original's is not positive.

    Cost: at most 60 calls of ``score``, usually 2 + log2(1 / tolerance) (12 by default); one copy of the model.

    Example:
        >>> before, after = {"w": torch.tensor(1.0)}, {"w": torch.tensor(0.0)}
        >>> round(calibrate_mix(before, after, lambda model: float(model["w"]), target=0.5, tolerance=1e-4), 3)
        0.5
    """
    if not 0.0 < target <= 1.0:
        raise ValueError(f"target: expected a share of the original score, in (0, 1], found {target}")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance: expected a step of rho, in (0, 1), found {tolerance}")
    scores: dict[float, float] = {}

    def passes(rho: float) -> bool:
        if rho not in scores:
            scores[rho] = float(score(mix(before, after, rho)))
        if not math.isfinite(scores[rho]):
            raise ValueError(f"score: expected a finite number, found {scores[rho]} at rho = {rho}")
        return scores[rho] >= target * scores[1.0]

    def bisect(low: float, high: float, steps: int) -> float:
        for _ in range(steps):
            middle = (low + high) / 2.0
            if high - low <= tolerance or not low < middle < high:
                break
            low, high = (low, middle) if passes(middle) else (middle, high)
        return high

    if not passes(1.0) or scores[1.0] <= 0.0:
        raise ValueError(
            f"score: expected a positive number for the original model, larger is better, found {scores[1.0]}"
        )
    if passes(0.0):
        return 0.0
    passing = bisect(0.0, 1.0, _BISECTIONS)
    # Above the target a score may rise and fall: that says nothing about where the target is reached first.
    capped = [min(scores[rho], target * scores[1.0]) for rho in sorted(scores)]
    if capped == sorted(capped):
        return passing
    spacing = passing / (_GRID + 1)
    for k in range(1, _GRID + 1):
        if passes(k * spacing):
            return bisect((k - 1) * spacing, k * spacing, _MOST_CALLS - len(scores))
    return passing


def _combined(
    function: Callable[..., Tensor],
    given: Mapping[str, StateDict],
    *,
    equal: bool = False,
    integers: Callable[[Tensor], Tensor] = torch.clone,
) -> dict[str, Tensor]:
    """Apply the function entry by entry; integer entries are the first dict's, passed through ``integers``."""
    _check(given, equal=equal)
    first, *others = given.values()
    result: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, source in _first_of(first).items():
            if name != source:
                result[name] = result[source]
            elif _real(first[name]):
                tensors = [first[name], *(other[name] for other in others)]
                wide = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
                wide = torch.float32 if wide.itemsize < 4 else wide
                value = function(*(tensor.detach().to(first[name].device, wide) for tensor in tensors))
                result[name] = value.to(first[name].dtype)
            else:
                result[name] = integers(first[name])
    return result


def _check(given: Mapping[str, StateDict], *, equal: bool = False) -> None:
    """Raise where the dicts do not fit together, or where integer entries differ that must be equal."""
    (label, first), *others = given.items()
    tied = {name: source for name, source in _first_of(first).items() if name != source}
    for other_label, other in others:
        both = f"{label}, {other_label}"
        _refuse(both, "the same names", sorted(first.keys() ^ other.keys()))
        _refuse(both, "the same shapes", [name for name in first if first[name].shape != other[name].shape])
        _refuse(both, "both integer or neither", [name for name in first if _real(first[name]) != _real(other[name])])
        if equal:
            differ = [name for name in first if not _real(first[name]) and not _equal(first[name], other[name])]
            _refuse(both, "equal integer entries, which cannot be mixed (dequantize weights first)", differ)
        torn = [name for name, source in tied.items() if not _equal(other[name], other[source])]
        _refuse(both, f"entries that share memory in {label} to be equal in {other_label}", torn)


def _check_vectors(vectors: Mapping[str, StateDict]) -> None:
    for label, vector in vectors.items():
        moved = [name for name, tensor in vector.items() if not _real(tensor) and bool(tensor.any())]
        _refuse(label, "0 at integer entries, which cannot be scaled", moved)


def _refuse(where: str, expected: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{where}: expected {expected}, found otherwise: {', '.join(names[:5])}{more}")


def _equal(a: Tensor, b: Tensor) -> bool:
    b = b.to(a.device, a.dtype)
    if not _real(a):
        return torch.equal(a, b)
    # NaN counts as equal to NaN: two copies of one broken weight are no mismatch.
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _first_of(entries: StateDict) -> dict[str, str]:
    """For each name, the first name of the same memory."""
    owners: dict[object, str] = {}
    sources: dict[str, str] = {}
    for name, tensor in entries.items():
        local = local_tensor(tensor)
        # Tensors without memory (empty, or on the meta device) are at address 0.
        memory = (
            (local.device, local.data_ptr(), local.shape, local.stride(), local.dtype) if local.data_ptr() else name
        )
        sources[name] = owners.setdefault(memory, name)
    return sources
