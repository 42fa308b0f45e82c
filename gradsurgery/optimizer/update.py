"""From rows to an update: the arithmetic on K x K matrices between the Gram pass and the combination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from gradsurgery import rules
from gradsurgery.gram import Metric, Row, block_gram, combine_, combine_blocks_, local_tensor, numbers_on
from gradsurgery.optimizer.average import Mixing
from gradsurgery.optimizer.scope import Blocks


@dataclass(frozen=True)
class Rows:
    """The rows of one step and how to measure them.

    Attributes:
        mixing: K rows as combinations of B tensor lists.
        scale: Loss scale of the captured lists.
        blocks: What shares one Gram matrix.
        parameters: The parameters, in the rows' order.
        metric: Of the inner product; Euclidean when None.
        recorded: Blocks whose Gram matrices are recorded beside those that the rule sees.
    """

    mixing: Mixing
    scale: float | Tensor
    blocks: Blocks
    parameters: Sequence[Tensor]
    metric: Metric | None = None
    recorded: Blocks | None = None

    def products(self, metric: Metric | None) -> Tensor:
        """Inner products of the B lists in unscaled units, ``[S, B, B]``."""
        blocks = self.blocks
        return self.unscaled(
            block_gram(
                self.mixing.rows,
                blocks=blocks.of_parameter,
                num_blocks=blocks.number,
                metric=metric,
                like=self.parameters,
            )
        )

    def unscaled(self, products: Tensor) -> Tensor:
        """Products of the lists as they are, in unscaled units."""
        units = self.mixing.units(self.scale, products.device)
        return products * units[:, None] * units


@dataclass(frozen=True)
class Update:
    """What the rule made of the rows: ``sum_b amounts[s, b] * list_b`` in block s, in unscaled units.

    Attributes:
        gram: ``[S, K, K]``.
        coefficients: ``[S, K]``, the added multiples of current rows included where they are rows of the Gram matrix; None where the
            rule is elementwise.
        amounts: ``[S, B]``.
        change: ``[K]``, inner product of each row with the update.
        norm: 0-dim, in the metric of the Gram matrix.
        healthy: ``[K]`` bool, whether each captured row is finite.
    """

    gram: Tensor
    coefficients: Tensor | None
    amounts: Tensor
    change: Tensor
    norm: Tensor
    healthy: Tensor


class Measured(NamedTuple):
    """Products ``[S, B, B]`` of the lists at hand, and Gram matrices of the rows that they make: ``[S, K, K]``, ``[R, K, K]`` recorded."""

    products: Tensor
    gram: Tensor
    recorded: Tensor | None


def measure(rows: Rows) -> Measured:
    """Everything that one pass over the rows tells."""
    if rows.recorded is None:
        products = rows.products(rows.metric)
        return Measured(products, _of_rows(rows, products), None)
    # Every product is of one tensor, and is added up twice: in the parameters' order, as `block_gram` does, so that recording changes
    # no bit of what the rule sees (unless ranks hold shards, whose sums then are in another order).
    number = len(rows.parameters)
    by_tensor = block_gram(
        rows.mixing.rows, blocks=range(number), num_blocks=number, metric=rows.metric, like=rows.parameters
    )
    products, recorded = (rows.unscaled(_added(by_tensor, blocks)) for blocks in (rows.blocks, rows.recorded))
    return Measured(products, _of_rows(rows, products), _of_rows(rows, recorded))


def _added(by_tensor: Tensor, blocks: Blocks) -> Tensor:
    """Sums over the tensors of each block, ``[P, B, B]`` to ``[S, B, B]``."""
    of_parameter = [0] * len(by_tensor) if blocks.of_parameter is None else blocks.of_parameter
    total = by_tensor.new_zeros(blocks.number, *by_tensor.shape[1:])
    return total.index_add_(0, numbers_on(total.device, of_parameter), by_tensor)


def _of_rows(rows: Rows, products: Tensor) -> Tensor:
    weights = numbers_on(products.device, rows.mixing.weights)
    gram = weights @ products @ weights.mT
    return (gram + gram.mT) / 2


def decide(
    rows: Rows,
    products: Tensor,
    gram: Tensor,
    rule: Callable[[Tensor], Tensor],
    *,
    add: Sequence[float],
    averaged: Sequence[bool],
    max_norm: float | None,
) -> Update:
    """Ask the rule, add the current rows, clip.

    Args:
        rows: The rows.
        products: From `measure`.
        gram: From `measure`.
        rule: Gram matrix -> coefficients; it sees ``[K, K]`` in the global scope.
        add: Multiple of each current row, K numbers.
        averaged: Whether an average stands in for each row, K times.
        max_norm: Euclidean norm to clip to; c^T G c gives it without another pass.

    Raises:
        ValueError: If the rule's answer has the wrong shape.
    """
    number = gram.shape[-1]
    weights = numbers_on(gram.device, rows.mixing.weights)
    asked = gram[0] if rows.blocks.names is None else gram
    coefficients = rule(asked)
    if coefficients.shape != asked.shape[:-1]:
        raise ValueError(
            f"rule: expected coefficients {list(asked.shape[:-1])} for a Gram matrix {list(asked.shape)}, found "
            f"{list(coefficients.shape)}"
        )
    coefficients = coefficients.to(gram).view(-1, number)
    extra = numbers_on(gram.device, add, torch.float64)
    amounts = coefficients @ weights
    amounts[:, :number] += extra
    factor = _clipping(rows, products, amounts, max_norm)
    shown = coefficients + torch.where(numbers_on(gram.device, averaged), 0.0, extra)
    return _finished(rows, products, gram, weights, amounts * factor, shown * factor)


def decide_by_coordinates(
    rows: Rows, products: Tensor, gram: Tensor, *, add: Sequence[float], max_norm: float | None
) -> Update:
    """Add the current rows to what an elementwise rule made, and clip by its true norm.

    Args:
        rows: From `with_update`.
        products: From `measure`, ``[1, 1 + B, 1 + B]``.
        gram: From `measure`, ``[1, 1 + K, 1 + K]``: the update's own products come first.
        add: As `decide`.
        max_norm: As `decide`.
    """
    amounts = torch.zeros_like(products[..., 0])
    amounts[:, 0] = 1.0
    amounts[:, 1 : 1 + len(add)] += numbers_on(amounts.device, add, torch.float64)
    amounts = amounts * _clipping(rows, products, amounts, max_norm)
    weights = numbers_on(gram.device, rows.mixing.weights)[1:]
    return _finished(rows, products, gram[:, 1:, 1:], weights, amounts, None)


def _clipping(rows: Rows, products: Tensor, amounts: Tensor, max_norm: float | None) -> Tensor:
    """What scales the update to the norm allowed, 0-dim."""
    if max_norm is None:
        return torch.ones_like(products[0, 0, 0])
    euclidean = products if rows.metric is None else rows.products(None)
    return (max_norm / (_norm(euclidean, amounts) + 1e-6)).clamp_max(1.0)  # as torch.nn.utils.clip_grad_norm_


def _finished(
    rows: Rows, products: Tensor, gram: Tensor, weights: Tensor, amounts: Tensor, coefficients: Tensor | None
) -> Update:
    finite = products.diagonal(dim1=-2, dim2=-1).isfinite().all(0)
    owners = numbers_on(finite.device, rows.mixing.owners)
    healthy = torch.stack([(finite | (owners != k)).all() for k in range(gram.shape[-1])])
    # A rule of the user's may answer ill rows by finite numbers; the step must still be seen to be ill.
    amounts = torch.where(finite.all(), amounts, torch.nan)
    return Update(
        gram=gram,
        coefficients=coefficients,
        amounts=amounts,
        change=torch.einsum("kb,sbc,sc->k", weights, products, amounts),
        norm=_norm(products, amounts),
        healthy=healthy,
    )


class _Seen(Sequence[Tensor | None]):
    """A row as an elementwise rule sees it, in unscaled units: each parameter's tensor is made when it is asked for."""

    def __init__(self, lists: Sequence[Sequence[Tensor | None]], factors: Tensor | None) -> None:
        self._lists, self._factors = lists, factors

    def __len__(self) -> int:
        return len(self._lists[0])

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor | None]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        parts = [part[index] for part in self._lists]
        placed = next((part for part in parts if part is not None), None)
        if placed is None or self._factors is None:
            return placed
        wide = torch.float32 if placed.dtype.itemsize < 4 else placed.dtype
        start = torch.zeros_like(placed, dtype=wide)
        return combine_([[start], *([part] for part in parts)], torch.nn.functional.pad(self._factors, (1, 0)))[0]


def with_update(rows: Rows, rule: Callable[[Sequence[Row]], Any]) -> Rows:
    """Ask an elementwise rule, and put its answer before the lists at hand, as one more row of the Gram matrix.

    Args:
        rows: The rows.
        rule: Rows -> row.

    Returns:
        Rows over 1 + B lists. The first is the update: unscaled, and nobody else's memory.

    Raises:
        ValueError: If the rule's answer is no row over these parameters.

    Cost: one row; where a row is no captured list as it stands (an average, a loss scale) one parameter's tensor at a time.
    """
    mixing, parameters = rows.mixing, rows.parameters
    scale = torch.as_tensor(rows.scale)
    plain = scale.device.type == "cpu" and float(scale) == 1.0
    device = local_tensor(parameters[0]).device
    units = mixing.units(rows.scale, device)
    seen: list[Row] = []
    for weights in mixing.weights:
        used = [b for b, weight in enumerate(weights.tolist()) if weight != 0.0]
        alone = len(used) == 1 and weights[used[0]] == 1.0 and (plain or mixing.averaged[used[0]])
        factors = None if alone else torch.stack([(numbers_on(device, weights) * units)[b] for b in used])
        seen.append(_Seen([mixing.rows[b] for b in used], factors))
    update = list(rule(seen))
    shapes = [None if tensor is None else tensor.shape for tensor in update]
    if len(shapes) != len(parameters) or any(
        shape not in (None, parameter.shape) for shape, parameter in zip(shapes, parameters, strict=True)
    ):
        raise ValueError(
            f"rule: expected an elementwise rule to return a tensor shaped like each of {len(parameters)} parameters, or None, found "
            f"shapes {[None if shape is None else list(shape) for shape in shapes]}"
        )
    # The update is changed in place by whoever clips it; a rule may have handed back a row.
    taken = {_memory(tensor) for part in mixing.rows for tensor in part if tensor is not None}
    for index, (tensor, parameter) in enumerate(zip(update, parameters, strict=True)):
        if tensor is not None:
            update[index] = tensor.to(parameter.dtype, copy=_memory(tensor) in taken)
    return replace(
        rows,
        mixing=replace(
            mixing,
            rows=[update, *mixing.rows],
            weights=torch.block_diag(torch.ones(1, 1, dtype=mixing.weights.dtype), mixing.weights),
            averaged=(True, *mixing.averaged),
            owners=(len(mixing.weights), *mixing.owners),
        ),
    )


def _memory(tensor: Tensor) -> int:
    return local_tensor(tensor).untyped_storage().data_ptr()


def guard(rows: Rows, before: Sequence[Tensor | None], *, project: bool) -> tuple[Tensor, Tensor]:
    r"""Measure the parameter change against every protected row, and project it onto the cone where none gets worse.

    With the change :math:`\Delta` and protected rows :math:`r_k`, the parameters move on by the solution of
    :math:`\min_d \lVert d - \Delta\rVert^2` subject to :math:`\langle d, r_k\rangle \le 0`, the problem of `rules.gru` for minus d.

    Args:
        rows: As the rule saw them. The first list is not read.
        before: The parameters before the base's step, where they had a gradient; overwritten by the change.
        project: Whether to change the parameters.

    Returns:
        ``[K - 1]`` twice: the inner products of the change with each protected row as the base made it, and as it is now.
    """
    changes = list(before)
    for change, parameter in zip(changes, rows.parameters, strict=True):
        if change is not None:
            change.neg_().add_(parameter)
    mixing, blocks = rows.mixing, rows.blocks
    lists = [changes, *mixing.rows[1:]]
    products = block_gram(lists, blocks=blocks.of_parameter, num_blocks=blocks.number, like=rows.parameters)
    units = mixing.units(rows.scale, products.device).clone()
    units[0] = -1.0  # what descends is minus the change, and it has no loss scale
    weights = numbers_on(products.device, mixing.weights)
    gram = weights @ (products * units[:, None] * units) @ weights.mT
    made = -gram[:, 0, 1:].sum(0)
    if not project:
        return made, made
    coefficients = rules.gru(gram)
    moved = [[None if change is None else t for change, t in zip(changes, row, strict=True)] for row in lists]
    moved[0] = [None if change is None else p for change, p in zip(changes, rows.parameters, strict=True)]
    amounts = -(coefficients @ weights) * units
    amounts[:, 0] = 1.0
    for change, parameter in zip(changes, rows.parameters, strict=True):
        if change is not None:
            change.sub_(parameter)  # minus the parameters before the step, again
    combine_blocks_(moved, amounts, blocks=blocks.of_parameter)
    for change, parameter in zip(changes, rows.parameters, strict=True):
        if change is not None:
            change.add_(parameter)
    # Measured and not predicted: what the parameters' type rounds away must show.
    products = block_gram(lists, blocks=blocks.of_parameter, num_blocks=blocks.number, like=rows.parameters)
    gram = weights @ (products * units[:, None] * units) @ weights.mT
    return made, -gram[:, 0, 1:].sum(0)


def _norm(products: Tensor, amounts: Tensor) -> Tensor:
    """Norm over all blocks: products ``[S, B, B]``, amounts ``[S, B]``."""
    return torch.einsum("sb,sbc,sc->", amounts, products, amounts).clamp_min(0.0).sqrt()
