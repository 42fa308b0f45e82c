"""From rows to an update: the arithmetic on K x K matrices between the Gram pass and the combination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurgery import rules
from gradsurgery._ema import Mixing
from gradsurgery.gram import Metric, block_gram, combine_blocks_, numbers_on
from gradsurgery.scope import Blocks


@dataclass(frozen=True)
class Rows:
    """The rows of one step and how to measure them.

    Attributes:
        mixing: K rows as combinations of B tensor lists.
        scale: Loss scale of the captured lists.
        blocks: What shares one Gram matrix.
        parameters: The parameters, in the rows' order.
        metric: Of the inner product; Euclidean when None.
    """

    mixing: Mixing
    scale: float | Tensor
    blocks: Blocks
    parameters: Sequence[Tensor]
    metric: Metric | None = None

    def products(self, metric: Metric | None) -> Tensor:
        """Inner products of the B lists in unscaled units, ``[S, B, B]``."""
        blocks = self.blocks
        products = block_gram(
            self.mixing.rows, blocks=blocks.of_parameter, num_blocks=blocks.number, metric=metric, like=self.parameters
        )
        units = self.mixing.units(self.scale, products.device)
        return products * units[:, None] * units


@dataclass(frozen=True)
class Update:
    """What the rule made of the rows: ``sum_b amounts[s, b] * list_b`` in block s, in unscaled units.

    Attributes:
        gram: ``[S, K, K]``.
        coefficients: ``[S, K]``, the added multiples of current rows included where they are rows of the Gram matrix.
        amounts: ``[S, B]``.
        change: ``[K]``, inner product of each row with the update.
        norm: 0-dim, in the metric of the Gram matrix.
        healthy: ``[K]`` bool, whether each captured row is finite.
    """

    gram: Tensor
    coefficients: Tensor
    amounts: Tensor
    change: Tensor
    norm: Tensor
    healthy: Tensor


def measure(rows: Rows) -> tuple[Tensor, Tensor]:
    """Products ``[S, B, B]`` of the lists at hand, and the Gram matrices ``[S, K, K]`` of the rows that they make."""
    products = rows.products(rows.metric)
    weights = numbers_on(products.device, rows.mixing.weights)
    gram = weights @ products @ weights.mT
    return products, (gram + gram.mT) / 2


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
    if max_norm is not None:
        euclidean = products if rows.metric is None else rows.products(None)
        factor = (max_norm / (_norm(euclidean, amounts) + 1e-6)).clamp_max(1.0)  # as torch.nn.utils.clip_grad_norm_
        coefficients, extra, amounts = coefficients * factor, extra * factor, amounts * factor
    finite = products.diagonal(dim1=-2, dim2=-1).isfinite().all(0)
    owners = numbers_on(finite.device, rows.mixing.owners)
    healthy = torch.stack([(finite | (owners != k)).all() for k in range(number)])
    # A rule of the user's may answer an ill Gram matrix by finite numbers; the step must still be seen to be ill.
    amounts = torch.where(healthy.all(), amounts, torch.nan)
    return Update(
        gram=gram,
        coefficients=coefficients + torch.where(numbers_on(gram.device, averaged), 0.0, extra),
        amounts=amounts,
        change=torch.einsum("kb,sbc,sc->k", weights, products, amounts),
        norm=_norm(products, amounts),
        healthy=healthy,
    )


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
