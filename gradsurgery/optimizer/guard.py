"""The guard: after the base's step, measure the parameter change against the protected rows, and project it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery import rules
from gradsurgery.gram import Write, block_gram, combine_blocks_, local_tensor, numbers_on
from gradsurgery.optimizer.rows import Rows, sum_over


def check_guard(guard: str | None, parameters: Sequence[Tensor], objectives: Sequence[str]) -> None:
    """Check the option, and warn where the parameters' type is too coarse for the guard's correction.

    Raises:
        ValueError: If there is no such guard, or nothing that it could protect.
    """
    if guard not in (None, "update", "measure"):
        raise ValueError(f"guard: expected None, 'update' or 'measure', found {guard!r}")
    if guard is not None and len(objectives) == 1:
        raise ValueError(f"guard: expected None with one objective, which leaves nothing to protect, found {guard!r}")
    low = {p.dtype for p in parameters if p.requires_grad} & {torch.bfloat16, torch.float16}
    if guard == "update" and low:
        warnings.warn(
            f"guard='update': expected float32 parameters, found {', '.join(map(str, low))}, whose rounding swallows the correction of "
            "a small step; keep float32 weights and use autocast (bf16-mixed). record.actual_change says what was achieved",
            stacklevel=3,
        )


def copy_before_step(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Copies of the parameters that the base is about to step (those with a gradient); None for the others."""
    return [None if parameter.grad is None else parameter.detach().clone() for parameter in parameters]


def guard(
    rows: Rows, before: Sequence[Tensor | None], param_groups: Sequence[dict[str, Any]], *, project: bool
) -> tuple[Tensor, Tensor]:
    r"""Measure the parameter change against every protected row, and project it onto the cone where none gets worse.

    Let $\Delta$ be the change that the base made, $r_k$ the protected rows and $\eta_i$ the learning rate of coordinate
    i. The change becomes the solution of $\min_d \sum_i (d_i - \Delta_i)^2 / \eta_i$ subject to
    $\langle d, r_k\rangle \le 0$. With one learning rate for all this is the nearest change, the problem that
    `gradsurgery.rules.gru` solves for -d. With several it is the nearest in the base's own units: the correction of a
    coordinate is proportional to its learning rate, and one whose rate is 0 is never moved.

    Args:
        rows: As the rule saw them. The first list is not read: the change takes its place.
        before: From `copy_before_step`.
        param_groups: The base's, with their learning rates.
        project: Whether to change the parameters, or only to measure.

    Returns:
        Twice ``[K - 1]``, the inner products of the change with each protected row: as the base made it, and as it is
        now. A change that is not finite is measured and left as the base wrote it.

    Cost: reads the parameters, their copies and the rows once. Where something is projected it reads them twice more
    and writes the parameters; on accelerators always, because the host does not wait to know.
    """
    device = local_tensor(rows.parameters[0]).device
    units = rows.units(device).clone()
    units[0] = -1.0  # gru rectifies a gradient, which is minus a change; and the change carries no loss scale
    shares = _shares(param_groups, len(rows.parameters), device)
    # A parameter that the base does not step cannot take a part of the correction, and must not count as if it could.
    protected: list[list[Tensor | None]] = [
        [None if old is None else tensor for old, tensor in zip(before, row, strict=True)] for row in rows.lists[1:]
    ]
    measured = _Change([list(before), *protected], rows, units, shares)
    gram = measured.gram()
    unguarded = -gram[:, 0, 1:].sum(0)
    if not project:
        return unguarded, unguarded
    coefficients = rules.gru(gram)
    if device.type == "cpu" and not coefficients[:, 1:].any():
        return unguarded, unguarded
    # A NaN that the base wrote must not spread to what it left whole.
    amounts, of_parameter = measured.amounts(torch.where(coefficients.isfinite().all(), coefficients, 0.0))
    moved: list[Tensor | None] = [
        None if old is None else tensor for old, tensor in zip(before, rows.parameters, strict=True)
    ]
    combine_blocks_([moved, *protected], amounts, blocks=of_parameter)
    # Measured and not predicted, so that what the parameters' type rounds away shows.
    return unguarded, -measured.products_with_change()


def _shares(param_groups: Sequence[dict[str, Any]], number: int, device: torch.device) -> Tensor | None:
    """The first parameters' learning rates as shares of the largest, ``[P]`` float64; None where all have the same."""
    rates = [group.get("lr", 1.0) for group in param_groups]
    if all(rate is rates[0] or (isinstance(rate, float) and rate == rates[0]) for rate in rates):
        return None
    groups = [index for index, group in enumerate(param_groups) for _ in group["params"]][:number]
    each = torch.stack([numbers_on(device, rate, torch.float64).reshape(()) for rate in rates])
    largest = each.amax()
    return torch.where(largest > 0.0, each / largest, 0.0)[numbers_on(device, groups)]


class _Change(NamedTuple):
    """The parameter change in the first row's place, and the metric that the learning rates make.

    Attributes:
        lists: The parameters before the base's step, and the lists of the protected rows.
        rows: As the rule saw them.
        units: What turns each list into an unscaled row, ``[B]``; -1 for the change.
        shares: From `_shares`.
    """

    lists: list[list[Tensor | None]]
    rows: Rows
    units: Tensor
    shares: Tensor | None

    def gram(self) -> Tensor:
        """What `gru` must see so that its answer is nearest in the metric of the learning rates, ``[S, K, K]``.

        Protected rows meet each other in the dual metric, weighted by the rate; the change meets them unweighted.
        """
        blocks = self.rows.blocks
        if self.shares is None and self.rows.parts is None:
            return self._of_rows(self._products(blocks.of_parameter, blocks.number), self.rows.weights)
        number = len(self.rows.parameters)
        by_tensor = self._of_rows(self._products(range(number), number), self._weights())
        if self.shares is not None:
            share = self.shares[:, None, None]
            by_tensor[:, 1:, 1:] *= share
            by_tensor[:, :1, :1] *= torch.where(share > 0.0, 1.0 / share, 0.0)
        return sum_over(by_tensor, blocks.of_parameter, blocks.number)

    def amounts(self, coefficients: Tensor) -> tuple[Tensor, Sequence[int] | None]:
        """Coefficients of the rows ``[S, K]`` as amounts of the lists, and which of them each parameter has."""
        blocks = self.rows.blocks.of_parameter
        if self.shares is None and self.rows.parts is None:
            amounts = -(coefficients @ numbers_on(coefficients.device, self.rows.weights)) * self.units
        else:
            number = len(self.rows.parameters)
            of_block = numbers_on(coefficients.device, [0] * number if blocks is None else list(blocks))
            each = coefficients[of_block]
            each = each if self.shares is None else each * self.shares[:, None]
            weights = numbers_on(coefficients.device, self._weights())
            amounts, blocks = -(each[:, None] @ weights).squeeze(1) * self.units, range(number)
        amounts[:, 0] = 1.0
        return amounts, blocks

    def products_with_change(self) -> Tensor:
        """Inner products of minus the change with every protected row, ``[K - 1]``."""
        plain = self._replace(shares=None)
        return plain.gram()[:, 0, 1:].sum(0)

    def _weights(self) -> Tensor:
        """The weights of the lists for each parameter, ``[P, K, B]``."""
        weights, number = self.rows.weights, len(self.rows.parameters)
        return (
            weights.expand(number, -1, -1) if self.rows.parts is None else weights[list(self.rows.parts.of_parameter)]
        )

    def _products(self, of_parameter: Sequence[int] | None, number: int) -> Tensor:
        like = self.rows.parameters
        # The pass that measures the change makes it, of the parameters as they are now, and stores it nowhere.
        new = {i: local_tensor(p).detach() for i, p in enumerate(like) if self.lists[0][i] is not None}
        change = Write(0, new, None, stored=False)
        products = block_gram(self.lists, blocks=of_parameter, num_blocks=number, like=like, writes=[change])
        return products * self.units[:, None] * self.units

    def _of_rows(self, products: Tensor, weights: Tensor) -> Tensor:
        weights = numbers_on(products.device, weights)
        return weights @ products @ weights.mT
