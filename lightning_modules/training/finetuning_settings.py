"""How a model is taught, without torch: the command line shows these settings before it is there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FinetuningSettings:
    """How a model is taught.

    Attributes:
        epochs: Passes over the examples. TOFU's authors: 5.
        batch_size: Examples a batch of one process.
        accumulate: Batches an optimizer step. TOFU's authors train with 32 examples a step.
        lr: AdamW's highest learning rate. TOFU's authors: 1e-5 for Llama-2-7B, 2e-5 for Phi-1.5; a smaller model needs
            more to memorise.
        weight_decay: AdamW's. TOFU's authors: 0.01.
        max_norm: Gradients are clipped to this norm; None for no clipping.
        seed: Of the order of the batches.
    """

    epochs: int = 5
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    weight_decay: float = 0.01
    max_norm: float | None = 1.0
    seed: int = 0


USUAL = FinetuningSettings()
"""The defaults."""
