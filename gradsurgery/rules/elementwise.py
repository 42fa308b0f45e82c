r"""Rules that need coordinates: rows -> row, decided one coordinate at a time.

A rule in `gradsurgery.rules` sees inner products only, so its update is one and the same combination of the rows everywhere. The rules
here look at the sign or size of single coordinates, and their update in general is no combination of the rows at all:
`gradsurgery.GradientSurgery` takes them as it takes the others (``rule=gs.elementwise.sago``, or its name), and leaves
``record.coefficients`` None.

Rows are as in `gradsurgery.gram`: lists with a tensor, a DTensor or None (a zero gradient) for each parameter. Inputs are never
modified. bf16 and fp16 are computed in float32 and rounded once. A coordinate that is NaN in any row is NaN in the answer. Sharded rows
are worked on where they are, with no communication (`saliency_mask`, which needs a quantile of the whole model, refuses them).

Example:
    >>> forget, retain = [torch.tensor([3.0, -2.0, 1.0])], [torch.tensor([1.0, 1.0, 0.0])]
    >>> sago([forget, retain])
    [tensor([3., 1., 1.])]
    >>> sign_agreement([forget, retain])
    [tensor([2., 0., 0.])]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradsurgery.gram import Row, check_rows, chunk_size, chunks, local_parts, local_tensor

__all__ = [
    "ELEMENTWISE",
    "by_name",
    "cglearn",
    "each",
    "graddrop",
    "is_elementwise",
    "rule",
    "sago",
    "saliency_mask",
    "sign_agreement",
]

_MARK = "gradsurgery_elementwise"
F = TypeVar("F", bound=Callable[..., Any])


def rule(function: F) -> F:
    """Mark a function ``rows -> row`` as one that wants the rows themselves, and not their Gram matrix.

    That is how `gradsurgery.GradientSurgery` tells the two kinds of rules apart; `functools.partial` keeps the mark. It calls the function
    with rows of no parameters when it is constructed, so that a wrong option fails there.

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
    """Whether a rule, or what `functools.partial` made of it, was marked by `rule`."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, _MARK, False) is True


@torch.no_grad()
def each(rows: Sequence[Row], function: Callable[..., Tensor]) -> list[Tensor | None]:
    """Apply a function of K coordinates everywhere: the loop behind every rule of this page.

    Args:
        rows: K rows over the same parameters.
        function: K tensors of one shape, float32 or float64, for a part of a parameter -> their update. Where a row holds None and
            another does not, its tensor is a 0-dim zero.

    Returns:
        A new row; None where every row is. Tensors have the type, device and sharding of the first row's (or, there None, of the next).

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
        made = torch.empty_like(placed, requires_grad=False)
        _, (target, *local) = local_parts(placed, [made, *tensors], index)
        _apply(function, target, local)
        result.append(made)
    return result


def _apply(function: Callable[..., Tensor], target: Tensor | None, tensors: list[Tensor | None]) -> None:
    assert target is not None
    there = [k for k, tensor in enumerate(tensors) if tensor is not None]
    wide = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    zero = torch.zeros((), dtype=wide, device=target.device)
    for part, *given in _parts([target, *(tensor for tensor in tensors if tensor is not None)]):
        parts = [zero] * len(tensors)
        for k, values in zip(there, given, strict=True):
            parts[k] = values.to(wide)
        # A comparison with NaN is false: without this a rule would drop the NaN and keep the coordinate.
        total = functools.reduce(torch.add, parts)
        part.copy_(torch.where(total.isnan(), total, function(*parts)))


def _parts(tensors: list[Tensor]) -> list[tuple[Tensor, ...]]:
    return chunks(tensors, chunk_size(tensors[0].device))


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts) / len(parts)


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not weight >= 0.0:
            raise ValueError(f"{name}: expected a weight >= 0, found {weight}")


def _conflicting(f: Tensor, r: Tensor) -> Tensor:
    # Not f * r < 0: the product of two small gradients is 0 in float32.
    return f.sign() * r.sign() < 0.0


@rule
def sago(rows: Sequence[Row], *, gamma: float = 1.0, alpha: float = 1.0) -> list[Tensor | None]:
    r"""SAGO: the retain gradient where the two signs are opposite, the forget gradient everywhere else.

    .. math:: u_i = \alpha r_i \;\text{ if } f_i r_i < 0, \text{ else } \gamma f_i,

    so that :math:`u_i r_i \ge 0` for every coordinate (gamma, alpha >= 0). A zero agrees with everything. r is the sum of the protected
    rows, as in `rules.hamu` and `rules.blur`: with several the promise is about their sum.

    Source: SAGO (2604.14808) and its authors' code (strategy ``sago``), one retain gradient, after accumulation and averaging over ranks;
    several protected rows are our generalisation. Agreeing coordinates do not contain the retain gradient: that is the paper's rule.

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
    r"""The mean of the rows where all K signs are equal, 0 elsewhere: the AND-mask.

    A zero's sign is 0: it agrees with zeros only, so that a parameter which one objective does not reach gets a zero update.

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

    .. math:: u_i = \mu_i\,[\,|\mu_i| > \tau s_i\,], \qquad \mu_i = \tfrac1K\sum_k g_{ki},
        \quad s_i^2 = \tfrac1{K-1}\sum_k (g_{ki} - \mu_i)^2 .

    Source: CGLearn (2411.06240), its linear form; tau is one of {0.25, 1, 4} there, chosen on validation data. Difference from the
    authors' code: no 1e-8 is added to the standard deviation, which would decide for gradients of that size (a language model's are).

    Raises:
        ValueError: If tau is negative or NaN, or there are fewer than two rows: one has no standard deviation.
    """
    if not tau >= 0.0:
        raise ValueError(f"tau: expected a number of standard deviations >= 0, found {tau}")
    if len(rows) < 2:
        raise ValueError(f"rows: cglearn compares at least two, found {len(rows)}; add an objective")

    def consistent(*parts: Tensor) -> Tensor:
        # In units of the largest, or the squares of small gradients are 0 in float32.
        size = functools.reduce(torch.maximum, [part.abs() for part in parts])
        units = [part / size for part in parts]
        mean = _mean(units)
        spread = functools.reduce(torch.add, [(unit - mean).square() for unit in units]).div(len(parts) - 1).sqrt()
        # "not <=" keeps 0/0, whose mean is 0, and what is infinite.
        return torch.where(mean.abs() <= tau * spread, 0.0, _mean(parts))

    return each(rows, consistent)


@rule
def graddrop(rows: Sequence[Row], *, generator: torch.Generator | None = None) -> list[Tensor | None]:
    r"""GradDrop: at each coordinate keep either the positive or the negative entries, by a draw in proportion to their sizes.

    .. math:: P_i = \tfrac12\Bigl(1 + \frac{\sum_k g_{ki}}{\sum_k |g_{ki}|}\Bigr), \quad U_i \sim \mathrm{U}[0, 1), \qquad
        u_i = \sum_k g_{ki}\,[g_{ki} > 0] \;\text{ if } P_i > U_i, \text{ else } \sum_k g_{ki}\,[g_{ki} < 0] .

    Where all entries have one sign it is their sum, whatever is drawn.

    Source: Just Pick a Sign (2010.06808), algorithm 1, with leak parameters 0.

    Args:
        rows: The rows.
        generator: One number drawn from it (from torch's default CPU generator when None) seeds the draws of this call on each device. Give
            every rank a generator with the same seed: under DDP all then draw alike, and `gradsurgery.GradientSurgery` refuses the first
            steps otherwise. It is not in any checkpoint: save ``generator.get_state()`` to resume exactly.
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
        share = positive / (positive - negative)  # P; 0/0 where every entry is 0, and then either answer is 0
        return torch.where(share <= uniform(positive), negative, positive)

    return each(rows, pick)


@rule
def saliency_mask(rows: Sequence[Row], *, quantile: float = 0.5) -> list[Tensor | None]:
    r"""SalUn's mask: the first row where it is large, 0 elsewhere, :math:`u_i = f_i\,[\,|f_i| \ge t\,]`.

    The threshold t is the ``quantile`` of all :math:`|f_i|` of the model (an element of it, not interpolated): at least the share
    1 - quantile of the coordinates stays. Coordinates without a gradient (None) are not counted. Protected rows are not looked at: use
    ``add``, or a guard, for retention.

    Source: SalUn (2310.12508), equation 3, where the median is the usual choice. Difference: there the mask is made once, at the original
    model; as a rule of `gradsurgery.GradientSurgery` it is made anew in every step. Ties with t all stay.

    Raises:
        ValueError: If quantile is outside [0, 1).
        RuntimeError: If the first row is sharded (FSDP2): no rank sees the whole model.

    Cost: reads the first row three times to find the exact threshold (six times in float64), by histograms of 2048 bins: no copy, no
    sort. The host waits for the device once a histogram.

    Example:
        >>> saliency_mask([[torch.tensor([0.1, -3.0]), torch.tensor([2.0, 0.0])]], quantile=0.5)
        [tensor([ 0., -3.]), tensor([2., 0.])]
    """
    if not 0.0 <= quantile < 1.0:
        raise ValueError(f"quantile: expected a number in [0, 1), found {quantile}")
    check_rows(rows)
    threshold = _order_statistic(rows[0], quantile)
    return each(rows, lambda f, *_: torch.where(f.abs() < threshold, 0.0, f))


@torch.no_grad()
def _order_statistic(row: Row, quantile: float) -> float:
    """The element of rank floor(quantile n) among the n sizes of a row: radix selection on the bits, which are ordered as the sizes are."""
    sharded = [index for index, tensor in enumerate(row) if tensor is not None and local_tensor(tensor) is not tensor]
    if sharded:
        raise RuntimeError(
            f"saliency_mask: expected whole gradients, found a sharded one (parameter {sharded[0]}); its threshold is a quantile over the "
            "whole model, so train without sharding or use sago, which decides where the shards are"
        )
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in row)
    floats, integers, top = (torch.float64, torch.int64, 55) if double else (torch.float32, torch.int32, 22)

    def sizes() -> Iterator[Tensor]:
        for tensor in row:
            for (part,) in [] if tensor is None else _parts([tensor]):
                yield part.to(floats).abs().view(integers).reshape(-1)

    prefix, rank = 0, None  # the answer's leading bits, and its rank among the sizes that share them
    for low in range(top, -1, -11):
        counts = torch.zeros(2048, dtype=torch.int64)
        for bits in sizes():
            alike = bits if rank is None else bits[bits >> (low + 11) == prefix]
            counts += torch.bincount((alike >> low & 2047).long(), minlength=2048).cpu()
        below = counts.cumsum(0)
        if rank is None:
            total = int(below[-1])
            if total == 0:
                return 0.0
            rank = min(int(quantile * total), total - 1)
        digit = int(torch.searchsorted(below, torch.tensor(rank), right=True))
        rank -= int(below[digit - 1]) if digit else 0
        prefix = prefix << 11 | digit
    return float(torch.tensor(prefix, dtype=integers).view(floats))


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (sago, sign_agreement, cglearn, graddrop, saliency_mask)
}
"""Every rule of this page by its name."""


def by_name(name: str) -> Callable[..., Any]:
    """The elementwise rule called ``name``.

    Raises:
        ValueError: If there is none.

    Example:
        >>> by_name("sago") is sago
        True
    """
    if name not in ELEMENTWISE:
        raise ValueError(f"rule: expected one of {', '.join(ELEMENTWISE)}, found {name!r}")
    return ELEMENTWISE[name]
