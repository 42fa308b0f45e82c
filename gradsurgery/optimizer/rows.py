"""Rows: the rows of one step as their Gram matrix sees them, and the one pass that measures them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradsurgery.gram import Metric, Write, block_gram, numbers_on
from gradsurgery.optimizer.scope import Blocks


class Parts(NamedTuple):
    """A partition of the parameters, finer than the blocks: the part of each parameter, the block of each part."""

    of_parameter: Sequence[int]
    in_block: Sequence[int]


@dataclass(frozen=True)
class Rows:
    """The K rows of one step, as linear combinations of B tensor lists, and how their inner products are taken.

    Row k is ``sum_b weights[k, b] * lists[b]``. Without averages the lists are the captured rows, and the weights the
    identity. With one, a protected row is d m + (1 - d) r, and its average m and captured row r may stay two lists
    (`gradsurgery.optimizer.average` decides). The inner products of the lists determine the Gram matrix of the rows, so
    that no temporary of the model's size is made.

    Attributes:
        lists: B lists with a tensor or None per parameter; the first K are what is left of the captured rows.
        weights: ``[K, B]``, or with ``parts`` one such matrix for each, ``[N, K, B]``; float64 on the CPU.
        owners: For each list, the number of the row that it is part of.
        scaled: For each list, whether it carries the loss scale: captured rows do, averages do not.
        averaged: For each row, whether a moving average stands in for it.
        parameters: The parameters, in the rows' order.
        scale: Loss scale of the captured rows.
        blocks: What shares one Gram matrix.
        record_blocks: Blocks whose Gram matrices are recorded beside those that the rule sees; none when None.
        metric: Of the inner product; Euclidean when None.
        parts: Where parameters of one block have averages of different numbers of steps, and so different weights; each
            block is one part when None.
        reached: For each parameter, whether any objective reached it, so that it takes part in the step.
        writes: Overwrites of the lists' tensors that the first pass over them does.
    """

    lists: list[list[Tensor | None]]
    weights: Tensor
    owners: tuple[int, ...]
    scaled: tuple[bool, ...]
    averaged: tuple[bool, ...]
    parameters: Sequence[Tensor]
    scale: float | Tensor
    blocks: Blocks
    record_blocks: Blocks | None
    metric: Metric | None
    parts: Parts | None = None
    reached: Sequence[bool] = ()
    writes: tuple[Write, ...] = ()

    @classmethod
    def captured(
        cls,
        lists: list[list[Tensor | None]],
        parameters: Sequence[Tensor],
        scale: float | Tensor,
        *,
        blocks: tuple[Blocks, Blocks | None],
        metric: Metric | None,
    ) -> Rows:
        """The captured rows as they are, without averages; ``blocks`` and ``record_blocks`` come as a pair."""
        number = len(lists)
        weights = torch.eye(number, dtype=torch.float64, device="cpu")
        owners, scaled, averaged = tuple(range(number)), (True,) * number, (False,) * number
        return cls(lists, weights, owners, scaled, averaged, parameters, scale, *blocks, metric)

    @property
    def part_of_parameter(self) -> Sequence[int] | None:
        """The part of each parameter, which is its block where there are no parts; None where all are in one."""
        return self.blocks.of_parameter if self.parts is None else self.parts.of_parameter

    def measure(self) -> tuple[Tensor, Tensor | None]:
        """Inner products of lists by part, ``[N, B, B]``, and recorded blocks' Gram matrices, ``[R, K, K]`` or None.

        Everything is in unscaled units. Cost: one pass over the lists, with or without recorded blocks.
        """
        if self.record_blocks is None:
            return self.products(self.metric), None
        # The pass takes the products of each tensor, and they are added up once for the rule and once for the record:
        # in the parameters' order, as `block_gram` does, so that recording changes no bit of what the rule sees (unless
        # ranks hold shards, whose sums are then taken in another order).
        number = len(self.parameters)
        by_tensor = block_gram(
            self.lists,
            blocks=range(number),
            num_blocks=number,
            metric=self.metric,
            like=self.parameters,
            writes=self.writes,
        )
        products = self._unscaled(sum_over(by_tensor, self.part_of_parameter, self._num_parts()))
        recorded, number = self.record_blocks.of_parameter, self.record_blocks.number
        if self.parts is None:
            return products, self._rows_of(self._unscaled(sum_over(by_tensor, recorded, number)), self.weights)
        grams = self._rows_of(self._unscaled(by_tensor), self.weights[list(self.parts.of_parameter)])
        return products, sum_over(grams, recorded, number)

    def products(self, metric: Metric | None) -> Tensor:
        """Inner products of the lists in unscaled units and in any metric, ``[N, B, B]``, by a pass over the lists."""
        return self._unscaled(
            block_gram(
                self.lists,
                blocks=self.part_of_parameter,
                num_blocks=self._num_parts(),
                metric=metric,
                like=self.parameters,
                writes=self.writes,
            )
        )

    def finish_writes(self) -> None:
        """Overwrite what no pass has overwritten: before the lists are read in another way, or where a pass failed."""
        for write in self.writes:
            write.finish(self.lists[write.row])

    def gram(self, products: Tensor) -> Tensor:
        """Gram matrices of the rows by block, ``[S, K, K]``, from inner products of lists by part, ``[N, B, B]``."""
        gram = self._rows_of(products, self.weights)
        return gram if self.parts is None else sum_over(gram, self.parts.in_block, self.blocks.number)

    def amounts(self, coefficients: Tensor) -> Tensor:
        """What coefficients of the rows, ``[S, K]``, are of the lists, ``[N, B]``."""
        weights = numbers_on(coefficients.device, self.weights)
        if self.parts is None:
            return coefficients @ weights
        of_block = numbers_on(coefficients.device, list(self.parts.in_block))
        return (coefficients[of_block, None] @ weights).squeeze(1)

    def units(self, device: torch.device) -> Tensor:
        """The factor that makes each list unscaled, ``[B]``: 1 / scale for captured rows, 1 for averages."""
        inverse = 1.0 / numbers_on(device, self.scale, torch.float64)
        return torch.where(numbers_on(device, self.scaled), inverse, torch.ones_like(inverse))

    def loss_scale(self) -> Tensor:
        """The loss scale as a 0-dim float64 tensor where it is: a tensor's device, or the CPU for a number."""
        if isinstance(self.scale, Tensor):
            return self.scale.double()
        return torch.tensor(self.scale, dtype=torch.float64, device="cpu")  # not on the default device

    def in_loss_scale(self, amounts: Tensor) -> Tensor:
        """Amounts of unscaled lists, ``[S, B]``, as amounts of the lists as they are, for a sum in the loss scale."""
        factor = numbers_on(amounts.device, self.scale, torch.float64)
        return torch.where(numbers_on(amounts.device, self.scaled), amounts, amounts * factor)

    def _num_parts(self) -> int:
        return self.blocks.number if self.parts is None else len(self.parts.in_block)

    def _unscaled(self, products: Tensor) -> Tensor:
        units = self.units(products.device)
        return products * units[:, None] * units

    def _rows_of(self, products: Tensor, weights: Tensor) -> Tensor:
        weights = numbers_on(products.device, weights)
        gram = weights @ products @ weights.mT
        return (gram + gram.mT) / 2


def sum_over(matrices: Tensor, group_of: Sequence[int] | None, number: int) -> Tensor:
    """Sums over the members of each group, ``[P, B, B]`` to ``[number, B, B]``, in the order of the members."""
    groups = [0] * len(matrices) if group_of is None else list(group_of)
    total = matrices.new_zeros(number, *matrices.shape[1:])
    return total.index_add_(0, numbers_on(total.device, groups), matrices)


def check_protected(option: str, names: Iterable[str], objectives: Sequence[str]) -> None:
    """Refuse an option that names what is not a protected objective, that is, any but the first.

    Raises:
        ValueError: If it does.
    """
    protected = objectives[1:]
    if unknown := set(names) - set(protected):
        raise ValueError(f"{option}: expected protected objectives, {list(protected)}, found {sorted(unknown)}")
