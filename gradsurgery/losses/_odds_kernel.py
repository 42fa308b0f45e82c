"""Log-odds of rows on a CPU by odds.cpp, with the arguments of the Triton kernels (`_triton`).

The kernel reads a row from memory once for its log-odds and once for its gradient. Unlike Triton's it takes labels of
-100.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

from gradsurgery.losses._in_memory import address_of, rows_of
from gradsurgery.losses._row_kernel import RowKernel, built_or_why
from gradsurgery.native import Unavailable

Pair = tuple[Tensor, Tensor]

_SOURCE = Path(__file__).with_name("odds.cpp")
_NUMBERS = (
    "labels",
    "largest",
    "rest",
    "label",
    "runner_up",
    "factors",
    "others",
    "shifts",
    "at_label",
    "at_runner_up",
)


class _Work(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary")),
        *(("logits", ctypes.c_void_p), ("logits_stride", ctypes.c_int64), ("low", ctypes.c_int64)),
        *((name, ctypes.c_double) for name in ("scale", "cap")),
        *((name, ctypes.c_void_p) for name in _NUMBERS),
        *(("gradient", ctypes.c_void_p), ("gradient_stride", ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("first", "last")),
    )


class Kernel(RowKernel):
    """Log-odds and their gradients, by odds.cpp."""

    FUNCTION, WORK = "gradsurgery_log_odds", _Work

    def reduce(
        self, logits: Tensor, labels: Tensor, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_triton.reduce`."""
        # Beside the logits, not on the default device, which may be another.
        largest, rest, label = logits.new_empty(3, len(logits), dtype=torch.float32)
        runner_up = torch.empty_like(labels)
        numbers = {"labels": labels, "largest": largest, "rest": rest, "label": label, "runner_up": runner_up}
        self._call(logits, scale, softcap, numbers, None)
        return largest, rest, label, runner_up

    def gradient_(
        self,
        logits: Tensor,
        largest: Tensor,
        own: Pair,
        other: Pair | None,
        at: tuple[Pair, Pair],
        scaling: tuple[float, float | None],
        to: Tensor | None = None,
    ) -> None:
        """As `_triton.gradient_`; it writes `to`, or over the logits."""
        (labels, at_label), (runner_up, at_runner_up) = at
        numbers = {"labels": labels, "largest": largest, "runner_up": runner_up, "at_label": at_label}
        numbers["factors"] = -own[1] * (-own[0]).exp()
        if other is not None:
            numbers |= {"others": -other[1], "shifts": other[0], "at_runner_up": at_runner_up}
        self._call(logits, *scaling, numbers, logits if to is None else to)

    def _call(
        self, logits: Tensor, scale: float, softcap: float | None, numbers: dict[str, Tensor], to: Tensor | None
    ) -> None:
        if not logits.numel():
            return
        given = {name: tensor.contiguous() for name, tensor in numbers.items()}  # alive while the kernel runs
        work = _Work(
            *(len(logits), logits.shape[1], *rows_of(logits), scale, softcap or 0.0),
            *(address_of(given.get(name)) for name in _NUMBERS),
            *(address_of(to), 0 if to is None else rows_of(to)[1], 0, 0),
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
    numbers = torch.arange(3 * 1100, dtype=torch.float32).view(3, -1) * 7 % 1103 / 200
    labels = torch.tensor([1, 1023, 1099])
    one, two, shift = torch.tensor([[1.0, 0.5, -2.0], [0.3, -1.0, 0.2], [0.5, 0.5, 0.5]], dtype=torch.float32)
    for dtype, scale, cap, both in itertools.product(
        (torch.float32, torch.bfloat16), (1.0, 0.5), (None, 2.0), (True, False)
    ):
        logits = numbers.to(dtype)
        plain = logits.double() * scale
        plain = plain if cap is None else cap * torch.tanh(plain / cap)
        label = plain.gather(1, labels[:, None]).squeeze(1)
        largest, place = (others := plain.scatter(1, labels[:, None], -torch.inf)).max(1)
        rest = (others - largest[:, None]).exp().sum(1) - 1.0
        found = kernel.reduce(logits, labels, scale, cap)
        close = torch.equal(found[3], place)
        for number, expected in zip(found, (largest, rest, label), strict=False):
            close = close and torch.allclose(number.double(), expected, rtol=1e-5, atol=1e-6)
        factors = one.double() * math.exp(-0.5) + both * two.double() * math.exp(0.25)
        gradient = (-(plain - largest[:, None]).exp() * factors[:, None]).scatter(1, labels[:, None], 3.0)
        gradient = gradient.scatter(1, place[:, None], 4.0) if both else gradient
        gradient = gradient * scale * (1.0 if cap is None else 1.0 - (plain / cap) ** 2)
        other = (-0.5 * shift, two) if both else None
        at = (labels, 6.0 * shift), (place, 8.0 * shift)
        rows = torch.empty_like(logits)
        kernel.gradient_(logits, found[0], (shift, one), other, at, (scale, cap), to=rows)
        kernel.gradient_(logits, found[0], (shift, one), other, at, (scale, cap))
        relative = 1e-5 if dtype is torch.float32 else 1e-2  # a bfloat16 gradient is rounded to 4e-3
        close = close and torch.allclose(rows.double(), gradient, rtol=relative, atol=1e-6)
        if not (close and torch.equal(rows, logits)):
            raise Unavailable("the built library computes wrong numbers")
