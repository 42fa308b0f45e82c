"""The choice between kernels in C++ and plain PyTorch for losses of logits on a CPU."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from gradsurgery.losses import _divergence_kernel, _odds_kernel
from gradsurgery.losses._in_memory import taken
from gradsurgery.native import Backend, Chosen, Needs

Choice = Literal["auto", "compiled", "eager"]
# Below this many logits plain PyTorch takes a few milliseconds at most; building a kernel takes seconds, once.
SMALLEST = 1 << 18
_chosen = Chosen(
    {"auto": None, "compiled": Needs("the kernels to be built", lambda: _built(), "eager"), "eager": None},
)


def backend(choice: Choice | None = None) -> Backend:
    """Say what computes losses of logits on a CPU, and why; or choose it, for the whole process.

    ``"eager"`` is plain PyTorch. ``"compiled"`` are C++ kernels for float32 and bfloat16 logits whose rows are
    contiguous, on logits and in `linear`: for all losses per token, and for `kl_divergence`, `uniform` and `undial`.
    They read a row from memory once for its value and once for its gradient, and make no temporaries. What they do not
    take (other types and devices, `logit_margin`, `jensen_shannon`) stays eager. ``"auto"``, from the start on, takes
    the kernels for 262 144 logits or more (in `linear` of a chunk), if there is a C++ compiler. They are built at their
    first use, in a few seconds, and kept in `~/.cache/gradsurgery/kernel`.

    The kernels keep no copy of the logits for the backward pass, but read them again: where they run, logits or labels
    that were changed in place in between raise an error.

    Each gives the same bits on every call, with any number of threads; with "auto" the number of logits decides which
    one it is. The two agree up to rounding, and keep as many correct digits where a token is nearly certain or
    forgotten, and where two distributions hardly differ or hardly overlap.

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
    found = _built()
    if isinstance(found, str):
        return Backend("eager", found, restore)
    smallest = f" {SMALLEST} or more" if _chosen.name == "auto" else ""
    return Backend("compiled", f"for{smallest} float32 and bfloat16 logits on a CPU, {found.about}", restore)


def worth_a_kernel(logits: Tensor, *others: Tensor) -> bool:
    """Whether kernels are chosen, take these rows ``[n, V]``, and are worth calling."""
    if _chosen.name == "eager":
        return False
    smallest = SMALLEST if _chosen.name == "auto" else 1
    return logits.numel() >= smallest and all(map(taken, (logits, *others))) and not isinstance(_built(), str)


def _built() -> Any:
    """One of the kernels, or why one is lacking, in words."""
    kernels = [_divergence_kernel.built(), _odds_kernel.built()]
    return next((found for found in kernels if isinstance(found, str)), kernels[0])
