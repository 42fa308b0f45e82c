"""Defaults that depend on the machine."""

from __future__ import annotations

from typing import Any

from lightning_modules.run.options.precision import default_precision
from lightning_modules.run.options.shared import SharedOptions


def by_machine(training: SharedOptions, *, scratch: bool = False) -> dict[str, Any]:
    """Returns the precision, and whether batches are read without padding, where the user says neither.

    Without padding a step of SmolLM2-135M on TOFU reads three fifths of the tokens on a CPU. What it gives on a GPU
    nobody has measured, where a step is so short that making the rows on the CPU may cost as much.

    Args:
        training: Of which --compile and shards know batches with padding only.
        scratch: Whether the model is the small Llama from scratch, whose published figures were made with padding.
    """
    import torch  # only here: the parser needs these options before torch is there

    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return {
        "precision": default_precision(scratch=scratch),
        "padding_free": not (scratch or gpu or training.compile or training.sharded),
    }
