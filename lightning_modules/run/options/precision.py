"""The precision of a run whose user named none."""

from __future__ import annotations

EXACT = "32-true"
"""No autocast."""
AUTOCAST = "bf16-mixed"
"""Products in bfloat16, of float32 weights."""


def default_precision(*, scratch: bool = False) -> str:
    """Returns Lightning's name: "bf16-mixed" with a CUDA GPU or a CPU that is made for it, and "32-true" elsewhere.

    The weights, their gradients and the optimizer's state are float32 either way, and so are all scores, but for those
    before and after where --evaluation-precision says otherwise.

    Args:
        scratch: Whether the model is the small Llama from scratch, which is too small to gain by it.
    """
    if scratch:
        return EXACT
    import torch  # only here: the parser needs these options before torch is there

    fast = torch.cuda.is_available() or (made_for_bfloat16() and not torch.backends.mps.is_available())
    return AUTOCAST if fast else EXACT


def made_for_bfloat16() -> bool:
    """Whether the CPU has units for products of bfloat16 matrices: AMX, or ARM's.

    avx512_bf16 alone is not enough: on an Intel Xeon with it and without AMX a step of SmolLM2-135M takes 1.5 times as
    long as in float32. What it gives is not measured when a run starts, because processes that train together, or a run
    that goes on, could then differ; who has a CPU that gains says --precision bf16-mixed.
    """
    import torch

    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("amx_bf16", "bf16"))  # the last one: ARM
