"""Elementwise rules: what they see of the rows, and their answer as one more row of the Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from gradsurgery.gram import Row, combine_, local_tensor, numbers_on
from gradsurgery.optimizer.rows import Parts, Rows


def with_answer(rows: Rows, rule: Callable[[Sequence[Row]], Any]) -> Rows:
    """Ask an elementwise rule, and put its answer before the rows, as one more row of the Gram matrix.

    The answer's norm and its inner products with the rows then come from the same pass as those of the rows.

    Args:
        rows: The rows.
        rule: Rows -> row.

    Returns:
        1 + K rows over 1 + B lists. The first is the answer: unscaled, and in memory of its own.

    Raises:
        ValueError: If the rule's answer is no row over these parameters.

    Cost: one row. Where a row is not one captured list as it stands (an average, a loss scale), also one parameter's
    tensor at a time.
    """
    parameters = rows.parameters
    scale = rows.loss_scale()
    unscaled = scale.device.type == "cpu" and float(scale) == 1.0
    device = local_tensor(parameters[0]).device
    units = rows.units(device)
    shown: list[Row] = []
    by_part = rows.weights if rows.weights.dim() == 3 else rows.weights[None]  # [N, K, B]
    for weights in by_part.unbind(1):
        used = [b for b in range(weights.shape[1]) if bool((weights[:, b] != 0.0).any())]
        alone = len(used) == 1 and bool((weights[:, used[0]] == 1.0).all())
        as_it_stands = alone and (unscaled or not rows.scaled[used[0]])
        factors = None if as_it_stands else (numbers_on(device, weights) * units)[:, numbers_on(device, used)]
        shown.append(_LazyRow([rows.lists[b] for b in used], factors, rows.parts))
    answer = list(rule(shown))
    shapes = [None if tensor is None else tensor.shape for tensor in answer]
    if len(shapes) != len(parameters) or any(
        shape not in (None, parameter.shape) for shape, parameter in zip(shapes, parameters, strict=True)
    ):
        raise ValueError(
            f"rule: expected an elementwise rule to return a tensor shaped like each of {len(parameters)} parameters, or None, found "
            f"shapes {[None if shape is None else list(shape) for shape in shapes]}"
        )
    # The answer is changed in place when it is clipped, and a rule may have returned one of the rows.
    taken = {_memory(tensor) for part in rows.lists for tensor in part if tensor is not None}
    for index, (tensor, parameter) in enumerate(zip(answer, parameters, strict=True)):
        if tensor is not None:
            dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
            answer[index] = tensor.to(dtype, copy=_memory(tensor) in taken)
    weights = torch.nn.functional.pad(rows.weights, (1, 0, 1, 0))
    weights[..., 0, 0] = 1.0
    return replace(
        rows,
        lists=[answer, *rows.lists],
        weights=weights,
        owners=(by_part.shape[1], *rows.owners),  # of no captured row
        scaled=(False, *rows.scaled),
        averaged=(False, *rows.averaged),
    )


class _LazyRow(Sequence[Tensor | None]):
    """A row as an elementwise rule sees it, unscaled: a parameter's tensor is computed when the rule asks for it."""

    def __init__(self, lists: Sequence[Sequence[Tensor | None]], factors: Tensor | None, parts: Parts | None) -> None:
        self._lists, self._factors, self._parts = lists, factors, parts

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
        factors = self._factors[0 if self._parts is None else self._parts.of_parameter[index]]
        return combine_([[start], *([part] for part in parts)], torch.nn.functional.pad(factors, (1, 0)))[0]


def _memory(tensor: Tensor) -> int:
    return local_tensor(tensor).untyped_storage().data_ptr()
