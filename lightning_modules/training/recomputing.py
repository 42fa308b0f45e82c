"""Gradient checkpointing: activations that the backward pass computes again instead of keeping them."""

from __future__ import annotations

from typing import Any

from torch import nn


def recompute_activations(model: nn.Module) -> None:
    """Keep only the input of every layer for the backward pass, which runs the layer's forward pass again.

    It is Transformers' own gradient checkpointing, without re-entrance, so that it also works where only adapters are
    trained. Dropout draws the same numbers again. Gradients are the same bit for bit; memory for activations falls to
    the layers' inputs and one layer's activations, and a step takes about a third more time. Evaluation keeps nothing
    anyway.

    A forget gradient at moved weights (`GradientSurgery.perturbed`) is exact as well: its forward and backward pass
    both run while the weights are moved, and any other objective's both while they are not.

    Args:
        model: A Hugging Face model, or a `PeftModel` around one.

    Raises:
        ValueError: If the model does not support it.
    """
    core: Any = model
    if hasattr(core, "peft_config") and hasattr(core, "get_base_model"):
        core = core.get_base_model()
    if not getattr(core, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"gradient checkpointing: expected a model of Transformers that supports it, found {type(core).__name__}, which does not; "
            "leave it out, and use smaller batches, more of them a step, to save memory"
        )
    without = {"use_reentrant": False}
    if hasattr(core, "activation_checkpointing_enable"):  # its name in Transformers 5.x, whose older one warns
        core.activation_checkpointing_enable(activation_checkpointing_kwargs=without)
    else:
        core.gradient_checkpointing_enable(gradient_checkpointing_kwargs=without)
