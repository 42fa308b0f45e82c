"""The guard: after the base's step, measure the parameter change against the protected rows, and project it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery import rules
from gradsurgery.gram import block_gram, combine_blocks_, local_tensor, numbers_on
from gradsurgery.optimizer.rows import Rows


def check_guard(guard: str | None, parameters: Sequence[Tensor]) -> None:
    """Check the option, and warn where the parameters' type is too coarse for the guard's correction.

    Raises:
        ValueError: If there is no such guard.
    """
    if guard not in (None, "update", "measure"):
        raise ValueError(f"guard: expected None, 'update' or 'measure', found {guard!r}")
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


def guard(rows: Rows, before: Sequence[Tensor | None], *, project: bool) -> tuple[Tensor, Tensor]:
    r"""Measure the parameter change against every protected row, and project it onto the cone where none gets worse.

    Let :math:`\Delta` be the change that the base made and :math:`r_k` the protected rows. The change becomes the
    solution of :math:`\min_d \lVert d - \Delta\rVert^2` subject to :math:`\langle d, r_k\rangle \le 0`, which is the
    problem that `gradsurgery.rules.gru` solves for -d.

    Args:
        rows: As the rule saw them. The first list is not read: the change takes its place.
        before: From `copy_before_step`; overwritten by the change.
        project: Whether to change the parameters, or only to measure.

    Returns:
        Twice ``[K - 1]``, the inner products of the change with each protected row: as the base made it, and as it is
        now.
    """
    changes = list(before)
    for change, parameter in zip(changes, rows.parameters, strict=True):
        if change is not None:
            change.neg_().add_(parameter)
    lists = [changes, *rows.lists[1:]]
    device = local_tensor(rows.parameters[0]).device
    weights = numbers_on(device, rows.weights)
    units = rows.units(device).clone()
    units[0] = -1.0  # gru rectifies a gradient, which is minus a change; and the change carries no loss scale
    blocks = rows.blocks

    def measure() -> Tensor:
        products = block_gram(lists, blocks=blocks.of_parameter, num_blocks=blocks.number, like=rows.parameters)
        return weights @ (products * units[:, None] * units) @ weights.mT

    gram = measure()
    unguarded = -gram[:, 0, 1:].sum(0)
    if not project:
        return unguarded, unguarded
    amounts = -(rules.gru(gram) @ weights) * units
    amounts[:, 0] = 1.0
    moved = [[None if change is None else t for change, t in zip(changes, row, strict=True)] for row in lists]
    moved[0] = [None if change is None else p for change, p in zip(changes, rows.parameters, strict=True)]
    for change, parameter in zip(changes, rows.parameters, strict=True):
        if change is not None:
            change.sub_(parameter)  # minus the old parameter: adding the new one gives the new change, without a copy
    combine_blocks_(moved, amounts, blocks=blocks.of_parameter)
    for change, parameter in zip(changes, rows.parameters, strict=True):
        if change is not None:
            change.add_(parameter)
    # Measured and not predicted, so that what the parameters' type rounds away shows.
    return unguarded, -measure()[:, 0, 1:].sum(0)
