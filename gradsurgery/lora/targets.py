"""Linear modules that no adapter fits, so that "all linear modules" can leave them out."""

from __future__ import annotations

from torch import nn

_MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Model types in which PEFT refuses an adapter on ``out_proj`` (peft.tuners.tuners_utils)."""


def without_adapters(model: nn.Module) -> list[str] | None:
    """The linear modules of a model on which an adapter fails, as ``exclude_modules`` of PEFT's configurations.

    They are what a model family makes of a linear layer by another ``forward``, such as Llama 4's router, and Mamba's
    ``out_proj``, whose matrix a kernel multiplies by itself.

    Args:
        model: A Transformers model, of this library or with code of its own.

    Returns:
        Names of modules, or their last parts; None if every linear module can have an adapter.

    Example:
        >>> without_adapters(nn.Sequential(nn.Linear(2, 2))) is None
        True
    """
    made = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
        and type(module).forward is not nn.Linear.forward
    ]
    refused = ["out_proj"] if getattr(getattr(model, "config", None), "model_type", None) in _MAMBA else []
    return made + refused or None
