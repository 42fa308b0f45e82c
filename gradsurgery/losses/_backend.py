"""What computes losses of logits: plain PyTorch, kernels in C++ on a CPU, or Triton's where they are chosen."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from gradsurgery.losses import _device_kernel, _divergence_kernel, _odds_kernel
from gradsurgery.losses._in_memory import taken
from gradsurgery.native import Backend, Chosen, Needs

Choice = Literal["auto", "compiled", "eager", "triton"]
# Below this many logits plain PyTorch takes a few milliseconds at most; building a kernel takes seconds, once.
SMALLEST = 1 << 18
_chosen = Chosen(
    {
        "auto": None,
        "compiled": Needs("the kernels to be built", lambda: _built(), "eager"),
        "eager": None,
        "triton": Needs("Triton's kernels to run", _device_kernel.built, "auto"),
    }
)


def backend(choice: Choice | None = None) -> Backend:
    """Say what computes losses of logits, and why; or choose it, for the whole process.

    ``"eager"`` is plain PyTorch, on every device. ``"compiled"`` are C++ kernels for float32 and bfloat16 logits on a
    CPU whose rows are contiguous, on logits and in `linear`: for all losses per token, and for `kl_divergence`,
    `uniform` and `undial`. They read a row from memory once for its value and once for its gradient, and make no
    temporaries. What they do not take (other types and devices, `logit_margin`, `jensen_shannon`) stays eager.
    ``"auto"``, from the start on, takes the kernels for 262 144 logits or more (in `linear` of a chunk), if there is a
    C++ compiler. They are built at their first use, in a few seconds, and kept in `~/.cache/gradsurgery/kernel`.

    ``"triton"`` is for float32, bfloat16 and float16 logits on CUDA devices, in `linear`, for losses per token: one
    program a row. All else stays eager. It is tested in Triton's interpreter, and has never run on a device. So
    ``"auto"`` does not take it, and nothing is said about its speed.

    The compiled kernels keep no copy of the logits for the backward pass, but read them again: where they run, logits
    or labels that were changed in place in between raise an error.

    Each gives the same bits on every call, with any number of threads; with "auto" the number of logits decides which
    one it is. They agree up to rounding, and keep as many correct digits where a token is nearly certain or
    forgotten, and where two distributions hardly differ or hardly overlap.

    Args:
        choice: "auto", "compiled", "eager" or "triton"; None asks and changes nothing.

    Returns:
        What runs from now on. Leaving it as a context manager restores what was chosen before.

    Raises:
        ValueError: If there is no such backend.
        RuntimeError: If "compiled" is chosen and cannot be built, or "triton" and cannot run; nothing is changed.

    Cost: where there is no kernel in the cache yet, asking builds it.

    Example:
        >>> with backend("eager") as chosen:
        ...     chosen.name
        'eager'
    """
    restore = _chosen.choose(choice)
    if _chosen.name == "eager":
        return Backend("eager", "it was chosen", restore)
    if _chosen.name == "triton":
        about = _device_kernel.built().about
        return Backend("triton", f"for float32, bfloat16 and float16 logits on CUDA devices, by {about}", restore)
    found = _built()
    if isinstance(found, str):
        return Backend("eager", found, restore)
    smallest = f" {SMALLEST} or more" if _chosen.name == "auto" else ""
    return Backend("compiled", f"for{smallest} float32 and bfloat16 logits on a CPU, {found.about}", restore)


def worth_a_kernel(logits: Tensor, *others: Tensor) -> bool:
    """Whether the kernels in C++ are chosen, take these rows ``[n, V]``, and are worth calling."""
    worth = _chosen.compiles(logits.numel(), SMALLEST)
    return worth and all(map(taken, (logits, *others))) and not isinstance(_built(), str)


def by_triton(logits: Tensor) -> Any:
    """Triton's kernels, if they are chosen, and these logits are on their device; else None."""
    if _chosen.name != "triton":
        return None
    found = _device_kernel.built()
    return found.kernels if logits.device.type == found.device else None


def _built() -> Any:
    """One of the kernels, or why one is lacking, in words."""
    kernels = [_divergence_kernel.built(), _odds_kernel.built()]
    return next((found for found in kernels if isinstance(found, str)), kernels[0])
