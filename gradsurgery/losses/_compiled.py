"""Divergences and cross-entropies of rows on a CPU by divergence.cpp, and the choice between it and plain PyTorch.

The kernel reads a row from memory once for its value and once for its gradient, and keeps nothing but six numbers of
it in between. `_divergence` does the same in plain PyTorch. Both pass the same tests.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gradsurgery.losses._checks import IGNORED
from gradsurgery.native import PLAIN, Backend, Chosen, Library, Needs, Unavailable, build

Choice = Literal["auto", "compiled", "eager"]
# Below this many logits plain PyTorch takes a few milliseconds at most; building the kernel takes seconds, once.
SMALLEST = 1 << 18
_A_THREAD = 1 << 16
"""Logits that are worth a thread."""
TOTALS = 6
"""Numbers that are kept of a row, as in divergence.cpp."""

_SOURCE = Path(__file__).with_name("divergence.cpp")
_chosen = Chosen(
    {"auto": None, "compiled": Needs("a kernel to be built", lambda: built(), "eager"), "eager": None},
)


def backend(choice: Choice | None = None) -> Backend:
    """Say what computes `kl_divergence`, `uniform` and `undial` on a CPU, and why; or choose it, for the whole process.

    ``"eager"`` is plain PyTorch. ``"compiled"`` is a C++ kernel for float32 and bfloat16 logits and reference logits
    whose rows are contiguous, on logits and in `linear`. It reads a row from memory once for its value and once for its
    gradient, and makes no temporaries. What it does not take (other types and devices) stays eager. ``"auto"``, from
    the start on, takes the kernel for 262 144 logits or more, if there is a C++ compiler. It is built at its first use,
    in a few seconds, and kept in `~/.cache/gradsurgery/kernel`.

    Each gives the same bits on every call, with any number of threads; with "auto" the number of logits decides which
    one it is. The two agree up to rounding, and keep as many correct digits where two distributions hardly differ, or
    hardly overlap.

    Args:
        choice: "auto", "compiled" or "eager"; None asks and changes nothing.

    Returns:
        What runs from now on. Leaving it as a context manager restores what was chosen before.

    Raises:
        ValueError: If there is no such backend.
        RuntimeError: If "compiled" is chosen and cannot be built; nothing is changed.

    Cost: where there is no kernel in the cache yet, asking builds it.

    Example:
        >>> with backend("eager") as chosen:
        ...     chosen.name
        'eager'
    """
    restore = _chosen.choose(choice)
    if _chosen.name == "eager":
        return Backend("eager", "it was chosen", restore)
    found = built()
    if isinstance(found, str):
        return Backend("eager", found, restore)
    smallest = f" {SMALLEST} or more" if _chosen.name == "auto" else ""
    return Backend("compiled", f"for{smallest} float32 and bfloat16 logits on a CPU, {found.about}", restore)


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


class Kernel:
    """The function of the library.

    Args:
        library: As `native.build` gives it.

    Raises:
        Unavailable: If it cannot be loaded or computes what is wrong.
    """

    def __init__(self, library: Library) -> None:
        try:
            self._compare = ctypes.CDLL(str(library.path)).gradsurgery_compare_rows
        except (OSError, AttributeError) as error:
            raise Unavailable(f"the built library cannot be loaded ({error})") from error
        self._compare.argtypes, self._compare.restype = [ctypes.POINTER(_Work), ctypes.c_int64], None
        self.about = library.about
        with torch.device("cpu"):  # not on the default device, which may be another
            _check(self)

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
        logits, reference, labels = (None if part is None else _readable(part) for part in compared[:3])
        labels = None if compared.beta is None else labels
        if logits is None or not logits.numel():
            return
        work = _Work(
            *(len(logits), logits.shape[1], *_rows(logits)),
            *((0, 0, 0) if reference is None else _rows(reference)),
            *(_address(labels), compared.beta or 0.0),
            *(_address(values), _address(totals), _address(weights), _address(to)),
            *(0 if to is None else _rows(to)[1], 0, 0),
        )
        self._compare(work, min(torch.get_num_threads(), -(-logits.numel() // _A_THREAD)))


def kernel_for(compared: Compared) -> Kernel | None:
    """The kernel, if it takes these rows and is worth calling."""
    logits, reference, labels, beta = compared
    if _chosen.name == "eager" or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return None
    if logits.numel() < (SMALLEST if _chosen.name == "auto" else 1):
        return None
    if not _taken(logits) or not (reference is None or _taken(reference)):
        return None
    if labels is not None and beta is not None:
        if not labels.is_cpu:
            return None  # plain PyTorch says what is wrong
        least, most = torch.where(labels == IGNORED, 0, labels).aminmax()
        if least < 0 or most >= logits.shape[1]:
            return None  # plain PyTorch says what is wrong
    kernel = built()
    return None if isinstance(kernel, str) else kernel


@functools.cache
def built() -> Kernel | str:
    """This process's kernel, or why it has none, in words."""
    try:
        return build(_SOURCE, Kernel)
    except Unavailable as error:
        return str(error)


def _taken(rows: Tensor) -> bool:
    return (
        (rows.dtype is torch.float32 or rows.dtype is torch.bfloat16)
        and rows.is_cpu
        and type(rows) in PLAIN
        and rows.layout is torch.strided
        and rows.stride(1) == 1
        and not rows.is_neg()
    )


def _readable(tensor: Tensor) -> Tensor:
    """As it is, unless a hook for saved tensors has given it other strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(rows: Tensor) -> tuple[int, int, int]:
    return rows.data_ptr(), rows.stride(0) * rows.element_size(), int(rows.dtype is torch.bfloat16)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(kernel: Kernel) -> None:
    """Compare with plain PyTorch in float64, so that a compiler's fault shows at once."""
    numbers = torch.arange(3 * 1100.0).view(3, -1)
    labels, weights = torch.tensor([1, IGNORED, 1099]), torch.tensor([1.0, 1.0, -2.0])
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
