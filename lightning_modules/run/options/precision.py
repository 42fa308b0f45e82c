"""The precision of a run whose user named none."""

from __future__ import annotations

EXACT_SCORES = "32-true"
"""Scores without autocast."""
AUTOCAST = "bf16-mixed"
"""Products in bfloat16, of float32 weights."""


def default_precision(*, scratch: bool = False) -> str:
    """Returns "bf16-mixed" where this machine computes it natively, by Lightning's name, and "32-true" elsewhere.

    On a CPU with instructions for bfloat16 a step of SmolLM2-135M takes 2.6 s instead of 4.2 s; a CPU without them
    imitates it, which is slower than float32. The weights, their gradients and the optimizer's state are float32 either
    way, and so are all scores, but for those before and after where --evaluation-precision says otherwise.

    Args:
        scratch: Whether the model is the small Llama from scratch, which is too small to gain by it.
    """
    if scratch:
        return "32-true"
    import torch  # only here: the parser needs these options before torch is there

    fast = torch.cuda.is_available() or (computes_bfloat16() and not torch.backends.mps.is_available())
    return "bf16-mixed" if fast else "32-true"


def computes_bfloat16() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 by instructions of its own."""
    import torch

    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one: ARM
