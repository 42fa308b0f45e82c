"""Elementwise rules: rows -> row, decided one coordinate at a time.

A coordinate-free rule sees inner products only, so that its update is the same combination of the rows everywhere. The
rules here look at the sign or size of single coordinates, and their update is in general no combination of the rows.
`gradsurgery.GradientSurgery` takes them as it takes the others (``rule=gs.elementwise.sago``, or its name) and leaves
``record.coefficients`` None.

Rows are as in `gradsurgery.gram`: lists with a tensor, a DTensor or None (a zero gradient) for each parameter. Inputs
are never modified. bf16 and fp16 are computed in float32 and rounded once. A coordinate that is NaN in any row is NaN
in the answer. Each rank works on its own shard of a sharded row, without communication. Only `saliency_mask` refuses
sharded rows, because it needs a quantile of the whole model.

Example:
    >>> forget, retain = [torch.tensor([3.0, -2.0, 1.0])], [torch.tensor([1.0, 1.0, 0.0])]
    >>> sago([forget, retain])
    [tensor([3., 1., 1.])]
    >>> sign_agreement([forget, retain])
    [tensor([2., 0., 0.])]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradsurgery.gram import Row, check_rows, chunk_size, chunks, local_parts, local_tensor
from gradsurgery.rules._order_statistic import order_statistic

_MARK = "gradsurgery_elementwise"
F = TypeVar("F", bound=Callable[..., Any])


def rule(function: F) -> F:
    """Mark a function ``rows -> row`` as an elementwise rule: it gets the rows themselves, not their Gram matrix.

    `gradsurgery.GradientSurgery` tells the two kinds of rules apart by this mark, and `functools.partial` keeps it. The
    optimizer calls the function with rows of no parameters when it is constructed, so that a wrong option fails there.

    Example:
        >>> @rule
        ... def larger(rows: Sequence[Row]) -> list[Tensor | None]:
        ...     return each(rows, lambda f, r: torch.where(f.abs() > r.abs(), f, r))
        >>> is_elementwise(functools.partial(larger))
        True
    """
    setattr(function, _MARK, True)
    return function


def is_elementwise(function: object) -> bool:
    """Whether a rule was marked by `rule`; `functools.partial` objects count as the function they bind."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, _MARK, False) is True


@torch.no_grad()
def each(rows: Sequence[Row], function: Callable[..., Tensor]) -> list[Tensor | None]:
    """Apply a function of K coordinates to every coordinate: the loop behind the rules of this module.

    Args:
        rows: K rows over the same parameters.
        function: Takes K tensors of one shape, float32 or float64, which are a part of a parameter, and returns their
            update. Where a row holds None and another does not, the tensor of that row is a 0-dim zero.

    Returns:
        A new row. It holds None where every row does. Its tensors have the type, device and sharding of the first row's
        tensors, or of the next row's where the first holds None.

    Raises:
        ValueError: If there is no row, or the rows do not list the same parameters.
        TypeError: If a row is complex or integer: its coordinates have no sign.
        RuntimeError: If a DTensor holds a partial sum that was never reduced.

    Cost: reads every row once and writes one; temporaries of one chunk (2^17 numbers on a CPU, 2^24 on an accelerator).
    """
    result: list[Tensor | None] = []
    for index in range(check_rows(rows)[1]):
        tensors = [row[index] for row in rows]
        placed = next((tensor for tensor in tensors if tensor is not None), None)
        if placed is None:
            result.append(None)
            continue
        for tensor in tensors:
            if tensor is not None and not tensor.is_floating_point():
                raise TypeError(f"parameter {index}: expected real floating-point rows, found {tensor.dtype}")
        answer = torch.empty_like(placed, requires_grad=False)
        _, (target, *local) = local_parts(placed, [answer, *tensors], index)
        _apply(function, target, local)
        result.append(answer)
    return result


def _apply(function: Callable[..., Tensor], target: Tensor | None, tensors: list[Tensor | None]) -> None:
    assert target is not None
    present = [(k, tensor) for k, tensor in enumerate(tensors) if tensor is not None]
    wide = torch.float64 if any(tensor.dtype == torch.float64 for _, tensor in present) else torch.float32
    zero = torch.zeros((), dtype=wide, device=target.device)
    for part, *given in chunks([target, *(tensor for _, tensor in present)], chunk_size(target.device)):
        parts = [zero] * len(tensors)
        for (k, _), values in zip(present, given, strict=True):
            parts[k] = values.to(wide)
        # A comparison with NaN is false, so that a rule would treat a NaN as an ordinary number and hide it.
        total = functools.reduce(torch.add, parts)
        part.copy_(torch.where(total.isnan(), total, function(*parts)))


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts) / len(parts)


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not weight >= 0.0:
            raise ValueError(f"{name}: expected a weight >= 0, found {weight}")


def _conflicting(f: Tensor, r: Tensor) -> Tensor:
    # Not f * r < 0, because the product of two small gradients underflows to 0 in float32.
    return f.sign() * r.sign() < 0.0


@rule
def sago(rows: Sequence[Row], *, gamma: float = 1.0, alpha: float = 1.0) -> list[Tensor | None]:
    r"""SAGO: the retain gradient where the two signs are opposite, the forget gradient everywhere else.

    $$u_i = \alpha r_i \;\text{ if } f_i r_i < 0, \text{ else } \gamma f_i .$$

    So no coordinate moves against retention: $u_i r_i \ge 0$, as gamma and alpha are >= 0. A zero has no sign
    that could be opposite. r is the sum of the protected rows, as in `gradsurgery.rules.hamu` and `blur`; with
    several of them the promise is about their sum. Coordinates that agree contain no retain gradient: that is the
    paper's rule.

    Source: SAGO (2604.14808) and its authors' code (strategy ``sago``): one retain gradient, after accumulation and
    averaging over ranks. Several protected rows are our generalisation.

    Raises:
        ValueError: If ``gamma`` or ``alpha`` is negative or NaN.

    Example:
        >>> sago([[torch.tensor([1.0, 1.0])], [torch.tensor([2.0, -2.0])]], gamma=0.5, alpha=2.0)
        [tensor([ 0.5000, -4.0000])]
    """
    _check_weights(gamma=gamma, alpha=alpha)

    def gate(f: Tensor, *protected: Tensor) -> Tensor:
        r = functools.reduce(torch.add, protected, torch.zeros_like(f))
        return torch.where(_conflicting(f, r), alpha * r, gamma * f)

    return each(rows, gate)


@rule
def sign_agreement(rows: Sequence[Row]) -> list[Tensor | None]:
    """The mean of the rows where all K signs are equal, 0 elsewhere: the AND-mask.

    The sign of zero is 0 and equals only itself. So a parameter that one objective does not reach gets a zero update.

    Source: Learning explanations that are hard to vary (2009.00329), section 2.3 with threshold 1.
    """

    def agreeing(*parts: Tensor) -> Tensor:
        first, *others = [part.sign() for part in parts]
        same = functools.reduce(torch.logical_and, [first == other for other in others], torch.ones_like(first) > 0.0)
        return torch.where(same, _mean(parts), 0.0)

    return each(rows, agreeing)


@rule
def cglearn(rows: Sequence[Row], *, tau: float) -> list[Tensor | None]:
    r"""CGLearn: the mean of the rows where it exceeds ``tau`` standard deviations, 0 elsewhere.

    $$u_i = \mu_i\,[\,|\mu_i| > \tau s_i\,], \qquad \mu_i = \tfrac1K\sum_k g_{ki},
    \quad s_i^2 = \tfrac1{K-1}\sum_k (g_{ki} - \mu_i)^2 .$$

    Source: CGLearn (2411.06240), its linear form, where tau is one of {0.25, 1, 4}, chosen on validation data.
    Difference from the authors' code: they add 1e-8 to the standard deviation. A language model's gradients are of
    that size, so that the 1e-8 would decide; it is left out here.

    Raises:
        ValueError: If tau is negative or NaN, or there are fewer than two rows: one has no standard deviation.
    """
    if not tau >= 0.0:
        raise ValueError(f"tau: expected a number of standard deviations >= 0, found {tau}")
    if len(rows) < 2:
        raise ValueError(f"rows: cglearn compares at least two, found {len(rows)}; add an objective")

    def consistent(*parts: Tensor) -> Tensor:
        # In units of the largest entry, because the squares of small gradients underflow to 0 in float32.
        size = functools.reduce(torch.maximum, [part.abs() for part in parts])
        units = [part / size for part in parts]
        mean = _mean(units)
        deviation = functools.reduce(torch.add, [(unit - mean).square() for unit in units]).div(len(parts) - 1).sqrt()
        # Not mean > bound: where both are NaN (all entries 0, or one infinite) this keeps the mean of the entries.
        return torch.where(mean.abs() <= tau * deviation, 0.0, _mean(parts))

    return each(rows, consistent)


@rule
def graddrop(rows: Sequence[Row], *, generator: torch.Generator | None = None) -> list[Tensor | None]:
    r"""GradDrop: keep either the positive or the negative entries of a coordinate, drawn in proportion to their sizes.

    $$P_i = \tfrac12\Bigl(1 + \frac{\sum_k g_{ki}}{\sum_k |g_{ki}|}\Bigr), \quad U_i \sim \mathrm{U}[0, 1),$$

    $$u_i = \sum_k g_{ki}\,[g_{ki} > 0] \;\text{ if } P_i > U_i, \text{ else } \sum_k g_{ki}\,[g_{ki} < 0] .$$

    Where all entries have one sign, the update is their sum, whatever is drawn.

    Source: Just Pick a Sign (2010.06808), algorithm 1, with leak parameters 0.

    Args:
        rows: The rows.
        generator: One number drawn from it seeds the draws of this call on every device; None stands for torch's
            default CPU generator. Give every rank a generator with the same seed: under DDP all ranks then draw
            alike, and otherwise `gradsurgery.GradientSurgery` refuses the first steps. No checkpoint contains it:
            save ``generator.get_state()`` to resume exactly.
    """

    @functools.cache
    def seed() -> int:
        device = torch.device("cpu") if generator is None else generator.device
        return int(torch.randint(2**62, (), generator=generator, device=device))

    @functools.cache
    def stream(device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed())

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, dtype=torch.float32, device=like.device, generator=stream(like.device))

    def pick(*parts: Tensor) -> Tensor:
        positive = functools.reduce(torch.add, [part.clamp_min(0.0) for part in parts])
        negative = functools.reduce(torch.add, [part.clamp_max(0.0) for part in parts])
        share = positive / (positive - negative)  # P; NaN where every entry is 0, and then both answers are 0
        return torch.where(share <= uniform(positive), negative, positive)

    return each(rows, pick)


@rule
def saliency_mask(rows: Sequence[Row], *, quantile: float = 0.5) -> list[Tensor | None]:
    r"""SalUn's mask: the first row where it is large, 0 elsewhere, $u_i = f_i\,[\,|f_i| \ge t\,]$.

    The threshold t is the ``quantile`` of all $|f_i|$ of the model. It is one of these sizes, never
    interpolated, and coordinates equal to it stay, so that at least the share 1 - quantile of the coordinates stays.
    Coordinates without a gradient (None) do not count. The rule ignores the protected rows: use ``add``, or a guard,
    for retention.

    Source: SalUn (2310.12508), equation 3, where the median is the usual choice. Difference: SalUn computes the mask
    once, for the original model; as a rule of `gradsurgery.GradientSurgery` it is computed again in every step.

    Raises:
        ValueError: If quantile is outside [0, 1).
        RuntimeError: If the first row is sharded (FSDP2): no rank sees the whole model.

    Cost: reads the first row three times to find the exact threshold (six times in float64), with histograms of 2048
    bins: no copy, no sort. The host waits for the device once per chunk and histogram.

    Example:
        >>> saliency_mask([[torch.tensor([0.1, -3.0]), torch.tensor([2.0, 0.0])]], quantile=0.5)
        [tensor([ 0., -3.]), tensor([2., 0.])]
    """
    if not 0.0 <= quantile < 1.0:
        raise ValueError(f"quantile: expected a number in [0, 1), found {quantile}")
    check_rows(rows)
    sharded = [
        index for index, tensor in enumerate(rows[0]) if tensor is not None and local_tensor(tensor) is not tensor
    ]
    if sharded:
        raise RuntimeError(
            f"saliency_mask: expected whole gradients, found a sharded one (parameter {sharded[0]}); its threshold is a quantile over the "
            "whole model, so train without sharding or use sago, which decides where the shards are"
        )
    threshold = order_statistic(rows[0], quantile)
    return each(rows, lambda f, *_: torch.where(f.abs() < threshold, 0.0, f))


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (sago, sign_agreement, cglearn, graddrop, saliency_mask)
}
"""Every elementwise rule by its name."""

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "ELEMENTWISE",
    "each",
    "is_elementwise",
    "rule",
    *ELEMENTWISE,
]
