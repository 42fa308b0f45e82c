"""Rows: the rows of one step as their Gram matrix sees them, and the one pass that measures them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurgery.gram import Metric, block_gram, numbers_on
from gradsurgery.optimizer.scope import Blocks


@dataclass(frozen=True)
class Rows:
    """The K rows of one step, as linear combinations of B tensor lists, and how their inner products are taken.

    Row k is ``sum_b weights[k, b] * lists[b]``. Without averages the lists are the captured rows, and the weights the
    identity. With one, a protected row is d m + (1 - d) r, and its average m and captured row r may stay two lists
    (`gradsurgery.optimizer.average` decides). The inner products of the lists determine the Gram matrix of the rows, so
    that no temporary of the model's size is made.

    Attributes:
        lists: B lists with a tensor or None per parameter; the first K are what is left of the captured rows.
        weights: ``[K, B]``, float64 on the CPU.
        owners: For each list, the number of the row that it is part of.
        scaled: For each list, whether it carries the loss scale: captured rows do, averages do not.
        averaged: For each row, whether a moving average stands in for it.
        parameters: The parameters, in the rows' order.
        scale: Loss scale of the captured rows.
        blocks: What shares one Gram matrix.
        record_blocks: Blocks whose Gram matrices are recorded beside those that the rule sees; none when None.
        metric: Of the inner product; Euclidean when None.
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
        weights = torch.eye(number, dtype=torch.float64)
        owners, scaled, averaged = tuple(range(number)), (True,) * number, (False,) * number
        return cls(lists, weights, owners, scaled, averaged, parameters, scale, *blocks, metric)

    def measure(self) -> tuple[Tensor, Tensor | None]:
        """Inner products of the lists in unscaled units, ``[S, B, B]``, and by recorded block, ``[R, B, B]`` or None.

        Cost: one pass over the lists, with or without recorded blocks.
        """
        if self.record_blocks is None:
            return self.products(self.metric), None
        # The pass takes the products of each tensor, and they are added up once for the rule and once for the record:
        # in the parameters' order, as `block_gram` does, so that recording changes no bit of what the rule sees (unless
        # ranks hold shards, whose sums are then taken in another order).
        number = len(self.parameters)
        by_tensor = block_gram(
            self.lists, blocks=range(number), num_blocks=number, metric=self.metric, like=self.parameters
        )
        return (
            self._unscaled(_sum_over_blocks(by_tensor, self.blocks)),
            self._unscaled(_sum_over_blocks(by_tensor, self.record_blocks)),
        )

    def products(self, metric: Metric | None) -> Tensor:
        """Inner products of the lists in unscaled units and in any metric, ``[S, B, B]``, by a pass over the lists."""
        blocks = self.blocks
        return self._unscaled(
            block_gram(
                self.lists, blocks=blocks.of_parameter, num_blocks=blocks.number, metric=metric, like=self.parameters
            )
        )

    def gram(self, products: Tensor) -> Tensor:
        """Gram matrices of the rows, ``[S, K, K]``, from inner products of the lists, ``[S, B, B]``."""
        weights = numbers_on(products.device, self.weights)
        gram = weights @ products @ weights.mT
        return (gram + gram.mT) / 2

    def units(self, device: torch.device) -> Tensor:
        """The factor that makes each list unscaled, ``[B]``: 1 / scale for captured rows, 1 for averages."""
        inverse = 1.0 / numbers_on(device, self.scale, torch.float64)
        return torch.where(numbers_on(device, self.scaled), inverse, torch.ones_like(inverse))

    def in_loss_scale(self, amounts: Tensor) -> Tensor:
        """Amounts of unscaled lists, ``[S, B]``, as amounts of the lists as they are, for a sum in the loss scale."""
        factor = numbers_on(amounts.device, self.scale, torch.float64)
        return torch.where(numbers_on(amounts.device, self.scaled), amounts, amounts * factor)

    def _unscaled(self, products: Tensor) -> Tensor:
        units = self.units(products.device)
        return products * units[:, None] * units


def _sum_over_blocks(by_tensor: Tensor, blocks: Blocks) -> Tensor:
    """Sums over the tensors of each block, ``[P, B, B]`` to ``[S, B, B]``."""
    of_parameter = [0] * len(by_tensor) if blocks.of_parameter is None else blocks.of_parameter
    total = by_tensor.new_zeros(blocks.number, *by_tensor.shape[1:])
    return total.index_add_(0, numbers_on(total.device, of_parameter), by_tensor)


def check_protected(option: str, names: Iterable[str], objectives: Sequence[str]) -> None:
    """Refuse an option that names what is not a protected objective, that is, any but the first.

    Raises:
        ValueError: If it does.
    """
    protected = objectives[1:]
    if unknown := set(names) - set(protected):
        raise ValueError(f"{option}: expected protected objectives, {list(protected)}, found {sorted(unknown)}")
