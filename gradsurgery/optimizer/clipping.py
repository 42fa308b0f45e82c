"""Clipping before `combine`: refused, because torch's functions skip a ``.grad`` of None and so would clip nothing."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import CellType
from typing import Any

import torch
from torch import Tensor

_SENTENCE = (
    "clip: expected the combined update in .grad, found rows that wait for optimizer.combine(); call it first (under a GradScaler "
    "optimizer.combine(scale=scaler.get_scale()), then scaler.unscale_(optimizer)), then clip, then step"
)
# clip_grad_norm_ calls the first of them.
_CLIPPING = (torch.nn.utils.clip_grads_with_norm_, torch.nn.utils.clip_grad_value_)

_waiting: weakref.WeakKeyDictionary[object, Sequence[Tensor]] = weakref.WeakKeyDictionary()
_replaced: list[tuple[CellType, Any]] = []


def rows_wait(owner: object, parameters: Sequence[Tensor]) -> None:
    """From now on, torch's clipping refuses these parameters where their ``.grad`` is None.

    A stand-in in ``.grad`` would notice more, but ``.grad`` is None outside the contexts: code that others wrote relies
    on it. So the functions behind ``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_`` are changed, in the cell
    in which torch's decorator keeps them: that reaches every name under which they were imported. It lasts only while
    rows wait.

    Args:
        owner: Whose rows wait.
        parameters: Those that the rows belong to.
    """
    if not _replaced:
        for function in _CLIPPING:
            if (cell := _cell(function)) is not None:
                _replaced.append((cell, cell.cell_contents))
                cell.cell_contents = _checked(cell.cell_contents)
    _waiting[owner] = parameters


def rows_are_taken(owner: object) -> None:
    """The owner's rows wait no more; when nobody's do, torch's functions are as before."""
    _waiting.pop(owner, None)
    while _replaced and not _waiting:  # also where owners have died
        cell, function = _replaced.pop()
        cell.cell_contents = function


def _cell(function: Any) -> CellType | None:
    """Where the decorator of torch's clipping functions keeps what it decorates; None for a torch that has another."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[names.index("func")] if "func" in names else None


def _checked(clip: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(clip)
    def checked(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
        clipped = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        without = {id(parameter) for parameter in clipped if parameter.grad is None}
        if any(id(parameter) in without for waiting in _waiting.values() for parameter in waiting):
            raise RuntimeError(_SENTENCE)
        return clip(clipped or parameters, *args, **kwargs)  # of an empty generator torch says that it is empty

    return checked
