"""Turns what a user has, tensors or nested lists, into float64 tensors and checks their shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Numbers = Tensor | Sequence[float]

Ragged = Tensor | Sequence[float] | Sequence[Tensor] | Sequence[Sequence[float]]
"""One example `[T]`, or n examples of different lengths `[T_i]`; a tensor `[n, T]` where all have one length. An array
of NumPy does in the place of a tensor."""


def as_numbers(values: object, name: str, shape: str, dimensions: int) -> tuple[Tensor, torch.dtype]:
    """Returns `values` as a float64 tensor of so many dimensions, and the dtype that the result should have."""
    single = isinstance(values, Tensor) and values.dtype in (torch.float32, torch.bfloat16, torch.float16)
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        found = type(values).__name__
        raise ValueError(f"expected {name} as numbers of shape {shape}, found {found}: {error}") from error
    if tensor.ndim != dimensions or not tensor.numel():
        raise ValueError(f"expected {name} of shape {shape} and not empty, found {list(tensor.shape)}")
    return tensor, torch.float32 if single else torch.float64


def answers_and_options(
    name: str, answers: object, options_name: str, options: object
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Returns `[n]` and `[n, m]` as float64 with the same n, and the dtype that the result should have."""
    one, dtype = as_numbers(answers, name, "[n]", dimensions=1)
    many, _ = as_numbers(options, options_name, "[n, m]", dimensions=2)
    if len(one) != len(many):
        raise ValueError(
            f"expected {name} [n] and {options_name} [n, m] with the same n, "
            f"found {list(one.shape)} and {list(many.shape)}"
        )
    return one, many, dtype


def as_examples(values: Ragged, name: str, dtype: torch.dtype) -> tuple[list[Tensor], bool]:
    """Returns one tensor `[T_i]` for each example, none of them empty, and whether a single example was given."""
    values = torch.as_tensor(values) if _is_array(values) else values
    parts: Any = values.cpu() if isinstance(values, Tensor) else values if _is_sequence(values) else ()
    first = None if isinstance(parts, Tensor) and parts.ndim == 0 else next(iter(parts), None)
    if first is None:
        raise ValueError(f"expected {name} of one example [T] or of n examples [T_i], and not empty, found {values!r}")
    alone = first.ndim == 0 if isinstance(first, Tensor) else not _is_sequence(first)
    return [_example(part, name, dtype) for part in ([parts] if alone else parts)], alone


def per_example(scores: Sequence[float], alone: bool) -> float | Tensor:
    """Returns a float for a single example and a float64 tensor `[n]` for n of them."""
    return scores[0] if alone else torch.tensor(scores, dtype=torch.float64)


def _example(values: object, name: str, dtype: torch.dtype) -> Tensor:
    try:
        # Without a dtype, torch would turn a list of Python floats into float32.
        tensor = torch.as_tensor(values, dtype=dtype if dtype.is_floating_point else None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected {name} of an example as numbers [T], found {values!r}: {error}") from error
    if tensor.ndim != 1 or not tensor.numel():
        raise ValueError(f"expected {name} of an example of shape [T] and not empty, found {list(tensor.shape)}")
    if tensor.is_floating_point() and not dtype.is_floating_point:
        raise ValueError(f"expected {name} as whole numbers, found {tensor.dtype}")
    return tensor.to("cpu", dtype)


def _is_sequence(values: object) -> bool:
    return _is_array(values) or (isinstance(values, Sequence) and not isinstance(values, str | bytes))


def _is_array(values: object) -> bool:
    return hasattr(values, "__array__") and not isinstance(values, Tensor) and getattr(values, "ndim", 0) > 0
