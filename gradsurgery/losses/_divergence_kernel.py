"""Divergences and cross-entropies of rows on a CPU by divergence.cpp.

The kernel reads a row from memory once for its value and once for its gradient, and keeps nothing but six numbers of
it in between. `_divergence` does the same in plain PyTorch. Both pass the same tests.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gradsurgery.losses._checks import IGNORED
from gradsurgery.losses._in_memory import address_of, readable, rows_of
from gradsurgery.losses._row_kernel import RowKernel, built_or_why
from gradsurgery.native import Unavailable

TOTALS = 6
"""Numbers that are kept of a row, as in divergence.cpp."""

_SOURCE = Path(__file__).with_name("divergence.cpp")


class Compared(NamedTuple):
    """Rows of logits, and what they are compared with.

    Attributes:
        logits: ``[n, V]``, the model's.
        reference: ``[n, V]``, the reference's; None for the uniform distribution.
        labels: ``[n]`` int64, tokens whose reference logits are lowered by ``beta``, -100 in rows that do not count;
            they matter only with a beta.
        beta: With a beta, and labels, the loss is the cross-entropy, without one the divergence.
    """

    logits: Tensor
    reference: Tensor | None
    labels: Tensor | None
    beta: float | None


class _Work(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary")),
        *(("logits", ctypes.c_void_p), ("logits_stride", ctypes.c_int64), ("logits_low", ctypes.c_int64)),
        *(("reference", ctypes.c_void_p), ("reference_stride", ctypes.c_int64), ("reference_low", ctypes.c_int64)),
        *(("labels", ctypes.c_void_p), ("beta", ctypes.c_double)),
        *((name, ctypes.c_void_p) for name in ("values", "totals", "weights", "gradient")),
        *((name, ctypes.c_int64) for name in ("gradient_stride", "first", "last")),
    )


class Kernel(RowKernel):
    """Divergences and cross-entropies, by divergence.cpp."""

    FUNCTION, WORK = "gradsurgery_compare_rows", _Work

    def measure(self, compared: Compared, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Values ``[n]`` in float32, and totals for `gradient`; given weights, the logits become weighted gradients."""
        # Beside the logits, not on the default device, which may be another.
        values = compared.logits.new_empty(len(compared.logits), dtype=torch.float32)
        totals = compared.logits.new_empty(len(values), TOTALS, dtype=torch.float64)
        self._call(compared, values, totals, weights, None if weights is None else compared.logits)
        return values, totals

    def gradient(self, compared: Compared, totals: Tensor, weights: Tensor) -> Tensor:
        """The gradient of the weighted sum of the values, ``[n, V]``."""
        if totals.dtype is not torch.float64 or not totals.is_cpu:
            raise RuntimeError(
                f"backward: expected the float64 numbers that the forward pass saved, found {totals.dtype} on {totals.device}; a hook for "
                "saved tensors has to give back what it was given"
            )
        result = compared.logits.new_empty(compared.logits.shape)
        self._call(compared, None, totals.contiguous(), weights, result)
        return result

    def _call(
        self, compared: Compared, values: Tensor | None, totals: Tensor, weights: Tensor | None, to: Tensor | None
    ) -> None:
        logits, reference, labels = (None if part is None else readable(part) for part in compared[:3])
        labels = None if compared.beta is None else labels
        if logits is None or not logits.numel():
            return
        work = _Work(
            *(len(logits), logits.shape[1], *rows_of(logits)),
            *((0, 0, 0) if reference is None else rows_of(reference)),
            *(address_of(labels), compared.beta or 0.0),
            *(address_of(values), address_of(totals), address_of(weights), address_of(to)),
            *(0 if to is None else rows_of(to)[1], 0, 0),
        )
        self.run(work, logits)

    def check(self) -> None:
        """As the base says."""
        _check(self)


@functools.cache
def built() -> Kernel | str:
    """This process's kernel, or why it has none, in words."""
    return built_or_why(_SOURCE, Kernel)


def _check(kernel: Kernel) -> None:
    """Compare with plain PyTorch in float64, so that a compiler's fault shows at once."""
    numbers = torch.arange(3 * 1100, dtype=torch.float32).view(3, -1)
    labels, weights = torch.tensor([1, IGNORED, 1099]), torch.tensor([1.0, 1.0, -2.0], dtype=torch.float32)
    for dtype, beta, flat in itertools.product((torch.float32, torch.bfloat16), (None, 10.0), (False, True)):
        if flat and beta is not None:
            continue  # there is no such loss
        logits, other = (numbers % 7 - 3).to(dtype), None if flat else (numbers % 5 - 2).bfloat16()
        lowered = torch.zeros_like(numbers, dtype=torch.float64) if other is None else other.double()
        if beta is not None:
            lowered[[0, 2], labels[[0, 2]]] -= beta
        p, q = (torch.log_softmax(rows.double(), 1) for rows in (logits, lowered))
        expected, rows = (q.exp() * ((q if beta is None else 0.0) - p)).sum(1), (p.exp() - q.exp()) * weights[:, None]
        if beta is not None:
            expected[1], rows[1] = 0.0, 0.0
        found = logits.clone()
        values, totals = kernel.measure(Compared(found, other, labels, beta), weights)
        again = kernel.gradient(Compared(logits, other, labels, beta), totals, weights)
        relative = 1e-5 if dtype is torch.float32 else 1e-2  # a bfloat16 gradient is rounded to 4e-3
        close = torch.allclose(values.double(), expected, rtol=1e-5, atol=1e-7)
        close = close and torch.allclose(found.double(), rows, rtol=relative, atol=1e-8)
        if not (close and torch.equal(found, again)):
            raise Unavailable("the built library computes wrong numbers")
