"""The precisions of a run, of its training and of its scores, whose user named none."""

from __future__ import annotations

EXACT_SCORES = "32-true"
"""The precision of scores that nobody named: no autocast."""
AUTOCAST = "bf16-mixed"
"""Products in bfloat16, of float32 weights."""


def default_precision(*, scratch: bool = False) -> str:
    """Returns "bf16-mixed" where this machine computes it natively, by Lightning's name, and "32-true" elsewhere.

    On a CPU with instructions for bfloat16 a step of SmolLM2-135M takes 2.6 s instead of 4.2 s; a CPU without them
    imitates it, which is slower than float32. The weights, their gradients and the optimizer's state are float32 either
    way. Scores before and after follow it (`evaluation_precision`); those of the curve and of the probes are float32.

    Args:
        scratch: Whether the model is the small Llama from scratch, which is too small to gain by it.
    """
    if scratch:
        return "32-true"
    import torch  # only here: the parser needs these options before torch is there

    fast = torch.cuda.is_available() or (computes_bfloat16() and not torch.backends.mps.is_available())
    return "bf16-mixed" if fast else "32-true"


def evaluation_precision(training: str | None, *, ledger: bool, log: bool, sharded: bool) -> str:
    """Returns the precision of a run's scores: "bf16-mixed" where it trains so, and "32-true" where it does not.

    Scores of SmolLM2-135M then take about 0.7 of the time on cores with bfloat16. The nll of an answer moves
    by about 0.01 nats a token, means over 20 answers by 1e-3 of themselves and ROUGE by up to 0.015: where two words
    are about as likely, greedy answers go on differently. There is no "16-mixed" of scores: float16 ends at 65504, and
    activations of language models may not. Some runs are scored in 32-true, whatever they train in:

    - those of a ledger: their scores have to come out again, to three digits, on other machines;
    - those with a log as the reference: `evaluate` scores in 32-true, and all models of a comparison are scored alike;
    - those with shards (--strategy fsdp2), of which autocast may keep no copies, so that it gains little.

    Args:
        training: Lightning's name of the precision of the training.
        ledger: Whether the run is entered in one.
        log: Whether the reference is a log.
        sharded: Whether the model is.
    """
    return AUTOCAST if training == AUTOCAST and not (ledger or log or sharded) else EXACT_SCORES


def computes_bfloat16() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 by instructions of its own."""
    import torch

    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one: ARM
