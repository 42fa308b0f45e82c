"""Losses of hidden states: representation misdirection for unlearning."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rmu(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    r"""Mean squared distance of a layer's hidden states to a target, averaged over each sequence's own tokens.

    $$\frac{1}{T_s} \sum_{t \in s} \frac{1}{d} \lVert h_t - \mathrm{target}_t \rVert^2$$

    That is one value per sequence $s$, and every sequence has the same weight, however long it is. On the forget set
    the target is a random direction of fixed length (`rmu_direction`), on the retain set it is the hidden states of the
    model before unlearning.

    Args:
        hidden: ``[B, T, d]``, a layer's output (open-unlearning: layer 7), any floating-point type, computed in at
            least float32.
        target: ``[d]`` for one direction everywhere, or ``[B, T, d]``; a constant, whatever graph it carries.
        mask: ``[B, T]`` bool, True where a token counts. Open-unlearning's is ``labels != -100``, without a shift: the
            answer tokens' own states count, not those that predict them.

    Returns:
        ``[B]``, float32 (float64 for float64 hidden states); 0 with a zero gradient for a sequence without tokens.

    Raises:
        ValueError: If the shapes do not fit.
        TypeError: If the mask is not of bools, or the hidden states are not of a floating-point type.

    Gradient: $2 (h_t - \mathrm{target}_t) / (d\, T_s)$. Cost: copies of the tokens that count, ``[N, d]``.

    Source: RMU (2403.03218), whose norms sum over d; the mean over d is open-unlearning's. Difference from
    open-unlearning's code: it divides ``[B]`` by ``[B, 1]``, so that each sequence's sum is divided by every sequence's
    length, which is the same only if all lengths are equal; and a sequence without tokens gives NaN there.

    Example:
        >>> hidden = torch.tensor([[[1.0, 1.0], [3.0, 1.0]], [[0.0, 0.0], [2.0, 0.0]]])
        >>> rmu(hidden, torch.zeros(2), torch.tensor([[True, True], [False, True]]))
        tensor([3., 2.])
    """
    if hidden.dim() != 3 or mask.shape != hidden.shape[:2] or target.shape not in (hidden.shape, hidden.shape[2:]):
        raise ValueError(
            f"expected hidden [B, T, d], target [d] or [B, T, d], and mask [B, T], found {list(hidden.shape)}, {list(target.shape)} and "
            f"{list(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bools, found {mask.dtype}; labels != -100 makes them")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: expected a floating-point type, found {hidden.dtype}")
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    wanted = target.detach().to(dtype) if target.dim() == 1 else target.detach()[mask].to(dtype)
    # Selected and not multiplied by the mask: padding may hold anything, and 0 * NaN is NaN.
    distances = (hidden[mask].to(dtype) - wanted).square().mean(1)
    sums = distances.new_zeros(mask.shape).masked_scatter(mask, distances).sum(1)
    return sums / mask.sum(1).clamp_min(1)


def rmu_direction(dimension: int, coefficient: float = 2.0, *, generator: torch.Generator | None = None) -> Tensor:
    r"""The vector that `rmu` steers forget tokens to: ``coefficient`` times a random unit vector.

    $$c\,u / \lVert u \rVert$$

    The entries of $u$ are uniform in [0, 1). They are all positive, so that two such vectors have a cosine near 3/4.
    Draw it once and keep it, and save it with a run that may be resumed: a new direction every step is another method.

    Args:
        dimension: d, the hidden states' size, >= 1.
        coefficient: The vector's length c, to be compared with the hidden states' norms at that layer.
            Open-unlearning's configuration uses 2, its class 20.
        generator: Where the randomness comes from, and on which device; torch's default one, on the CPU, if not given.

    Returns:
        ``[d]`` float32.

    Raises:
        ValueError: If the dimension is not positive, or the coefficient not finite.

    Source: RMU (2403.03218); open-unlearning.

    Example:
        >>> rmu_direction(64, 20.0, generator=torch.Generator().manual_seed(0)).norm()
        tensor(20.)
    """
    if dimension < 1:
        raise ValueError(f"dimension: expected at least 1, found {dimension}")
    if not math.isfinite(coefficient):
        raise ValueError(f"coefficient: expected a finite number, found {coefficient}")
    direction = torch.rand(dimension, generator=generator, device=None if generator is None else generator.device)
    return direction * (coefficient / direction.norm())
