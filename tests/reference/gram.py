"""Inner products and combinations of rows in float64 numpy, tensor by tensor: no chunks, no in-place work, no devices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Row = Sequence[Tensor | None]


def exact(tensor: Tensor) -> NDArray[np.floating] | NDArray[np.complexfloating]:
    """The tensor's values, every one of them representable, as float64 or complex128."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to(wide).numpy()


def gram(rows: Sequence[Row], weights: Sequence[Tensor | None] | None = None) -> Tensor:
    """G[i, j] = sum over parameters of Re <row_i, weight * row_j>; None is a zero gradient or a weight of 1."""
    total = np.zeros((len(rows), len(rows)))
    for i, left in enumerate(rows):
        for j, right in enumerate(rows):
            for p, (a, b) in enumerate(zip(left, right, strict=True)):
                if a is None or b is None:
                    continue
                weight = 1.0 if weights is None or weights[p] is None else exact(weights[p])
                total[i, j] += float(np.sum((np.conj(exact(a)) * weight * exact(b)).real))
    return torch.from_numpy(total)


def combination(rows: Sequence[Row], coefficients: Sequence[float]) -> list[Tensor | None]:
    """sum_k coefficients_k row_k in float64, not rounded to the rows' dtype."""
    result: list[Tensor | None] = []
    for parameter in zip(*rows, strict=True):
        there = [(c, exact(tensor)) for c, tensor in zip(coefficients, parameter, strict=True) if tensor is not None]
        result.append(torch.from_numpy(np.asarray(sum(c * values for c, values in there))) if there else None)
    return result
