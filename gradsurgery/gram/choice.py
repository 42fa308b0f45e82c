"""Which backend computes: plain PyTorch, the compiled kernel for large rows, or Triton's where they are chosen."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gradsurgery.gram.device import DeviceKernel, device_kernel
from gradsurgery.gram.kernel import Batch, Kernel, Members, build
from gradsurgery.gram.pointers import PointerBatch
from gradsurgery.gram.rows import Write
from gradsurgery.native import Backend, Chosen, Needs, Unavailable

Choice = Literal["auto", "compiled", "eager", "triton"]
# Below this many numbers a row plain PyTorch takes a few milliseconds at most, which no training step notices; and
# building the kernel takes a second, once.
SMALLEST = 1 << 22
_chosen = Chosen(
    {
        "auto": None,
        "compiled": Needs("a kernel to be built", lambda: built(), "eager"),
        "eager": None,
        "triton": Needs("Triton's kernels to run", lambda: device_kernel(), "auto"),
    }
)


def backend(choice: Choice | None = None) -> Backend:
    """Say which backend computes Gram matrices and combinations, and why; or choose it, for the whole process.

    ``"eager"`` is plain PyTorch, on every device and type. ``"compiled"`` is a C++ kernel for float32 and bfloat16 rows
    on a CPU, which reads every number once, at the speed of the memory. What it does not take (other types and devices,
    gradients that are not contiguous, a metric) stays eager. ``"auto"``, from the start on, takes the kernel for rows
    of 4 194 304 numbers or more, if there is a C++ compiler. It is built at its first use, in about a second, and kept
    in `~/.cache/gradsurgery/kernel`.

    ``"triton"`` is for float32, bfloat16 and float16 rows on CUDA devices: one launch for the products of all tensors,
    one for their sums, one for a combination. The host never waits, and a CUDA graph can capture them once they have
    run on the same tensors. Other types, gradients that are not contiguous, more than 8 rows, and a metric stay eager;
    tensors on a CPU are refused. It is tested in Triton's interpreter and compiles, but has never run on a device. So
    ``"auto"`` does not take it, and nothing is said about its speed.

    The same choice gives the same bits on every call, with any number of threads. All choices agree up to rounding:
    entries of a Gram matrix within 1e-6 of the rows' norms (within 5e-5 of eager sums in float32 where a row's numbers
    are all the same), and combinations are the same. The kernel multiplies
    bfloat16 rows in float32, as both multiply float32 rows: numbers above 1e18 can give inf, and below 1e-18 products
    lose digits and vanish, where eager products of bfloat16 rows are taken in float64. When ranks train together and
    not all have the same kernel, `gradsurgery.GradientSurgery` makes all of them eager.

    Args:
        choice: "auto", "compiled", "eager" or "triton"; None asks and changes nothing.

    Returns:
        What runs from now on. Leaving it as a context manager restores what was chosen before.

    Raises:
        ValueError: If there is no such backend.
        RuntimeError: If "compiled" is chosen and cannot be built, or "triton" and cannot run; nothing is changed.

    Cost: where there is no kernel in the cache yet, asking builds it.

    Example:
        >>> import gradsurgery as gs
        >>> rows = [[torch.ones(4)], [torch.full((4,), 2.0)]]
        >>> with gs.gram.backend("eager") as chosen:
        ...     chosen.name, gs.gram.gram(rows).tolist()
        ('eager', [[4.0, 8.0], [8.0, 16.0]])
    """
    restore = _chosen.choose(choice)
    if _chosen.name == "eager":
        return Backend("eager", "it was chosen", restore)
    if _chosen.name == "triton":
        about = _device_kernel().about
        return Backend("triton", f"for float32, bfloat16 and float16 rows on CUDA devices, by {about}", restore)
    found = built()
    if isinstance(found, str):
        return Backend("eager", found, restore)
    smallest = f" of {SMALLEST} numbers or more" if _chosen.name == "auto" else ""
    return Backend("compiled", f"for float32 and bfloat16 rows{smallest} on a CPU, {found.about}", restore)


def kernel_for(
    found: Iterable[Members], blocks: Sequence[int] | None, writes: Sequence[Write] = (), *, device: torch.device
) -> tuple[Any, list[Batch] | list[PointerBatch]] | None:
    """The kernel and what it takes of each list of members, if it is worth calling; None where it is not.

    Args:
        found: Lists of members.
        blocks: The block of each parameter; all in block 0 when None.
        writes: Overwrites that belong to the pass.
        device: Of the sums or the coefficients. The compiled kernel has them on the CPU.

    Returns:
        A `Kernel` with batches, or a `DeviceKernel` with pointer batches.

    Raises:
        RuntimeError: If "triton" was chosen, and a tensor is on the CPU.
    """
    if (chosen := chosen_device_kernel()) is not None:
        pointers = [chosen.batch(members, blocks, writes) for members in found]
        return (chosen, pointers) if any(batch.numbers for batch in pointers) else None
    if _chosen.name not in ("auto", "compiled") or device.type != "cpu" or _traced():
        return None
    batches = [Batch(members, blocks, writes) for members in found]
    # Plain counts, the same on every rank that holds the same rows.
    if not _chosen.compiles(sum(batch.numbers for batch in batches), SMALLEST):
        return None
    kernel = built()
    return None if isinstance(kernel, str) else (kernel, batches)


def kernel_number(parameters: Sequence[Tensor]) -> int:
    """A number for the machine code that would compute with the rows of these parameters; 0 for plain PyTorch.

    Ranks compare it: the same number gives the same bits.
    """
    if _chosen.name == "triton":
        return _device_kernel().number
    numbers = sum(parameter.numel() for parameter in parameters if parameter.device.type == "cpu")
    if not _chosen.compiles(numbers, SMALLEST):
        return 0
    kernel = built()
    return 0 if isinstance(kernel, str) else kernel.number


def chosen_device_kernel() -> DeviceKernel | None:
    """Triton's kernels where they were chosen and can be called now."""
    return _device_kernel() if _chosen.name == "triton" and not _traced() else None


def _traced() -> bool:
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _device_kernel() -> DeviceKernel:
    kernel = device_kernel()
    if isinstance(kernel, str):  # `backend` asked before it changed the choice
        raise RuntimeError(f"gradsurgery.gram.backend: expected Triton's kernels to run, found that {kernel}")
    return kernel


@functools.cache
def built() -> Kernel | str:
    """This process's kernel, or why it has none, in words."""
    try:
        return build()
    except Unavailable as error:
        return str(error)
