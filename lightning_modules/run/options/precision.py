"""The precision of a run whose user named none."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EXACT_SCORES = "32-true"
"""Scores without autocast."""
AUTOCAST = "bf16-mixed"
"""Products in bfloat16, of float32 weights."""


def default_precision(*, scratch: bool = False) -> str:
    """Returns Lightning's name: "bf16-mixed" with a CUDA GPU and on a CPU that is faster in it, "32-true" elsewhere.

    The weights, their gradients and the optimizer's state are float32 either way, and so are all scores, but for those
    before and after where --evaluation-precision says otherwise.

    Args:
        scratch: Whether the model is the small Llama from scratch, which is too small to gain by it.
    """
    if scratch:
        return EXACT_SCORES
    import torch  # only here: the parser needs these options before torch is there

    fast = torch.cuda.is_available() or (not torch.backends.mps.is_available() and faster_in_bfloat16())
    return AUTOCAST if fast else EXACT_SCORES


@cache
def faster_in_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, and multiplies matrices by them in less time than in float32.

    The instructions alone do not say it: a step of SmolLM2-135M took 2.6 s instead of 4.2 s on one CPU that has them,
    and 10.7 s instead of 5.8 s on an Intel Xeon with avx512_bf16 and without AMX. So both are measured, in turn, for
    about a tenth of a second. Autocast also rounds every weight: a gain of less than a fifth is none.
    """
    import torch

    known = torch.cpu.get_capabilities()
    if not any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16")):  # the last one: ARM
        return False
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(_ROUNDS):
        for dtype, found in seconds.items():
            found.append(product_seconds(dtype))
    exact, half = (min(found[1:]) for found in seconds.values())  # the first one sets up
    return half < _WORTH * exact


_ROUNDS = 6
_WORTH = 0.8


def product_seconds(dtype: torch.dtype) -> float:
    """Seconds of one product of a batch's states with a layer's weight, of a small model's size."""
    import torch

    states, weight = torch.ones(512, 512, dtype=dtype), torch.ones(1536, 512, dtype=dtype)
    start = time.perf_counter()
    torch.nn.functional.linear(states, weight)
    return time.perf_counter() - start
