"""4-bit weights that bitsandbytes would pack for inference on a CPU, through which no gradient flows."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers that gradients have to pass from being packed; any other model is left alone.

    Since 0.49 bitsandbytes packs the weights of a `Linear4bit` on a CPU with AVX512-BF16 for good when it is first
    called in evaluation mode. Gradients of what comes before the layer are then lost without an error, and whoever
    scores a model while it is trained calls it in evaluation mode.

    Args:
        model: That is going to be trained.

    Raises:
        ValueError: If a layer is packed already.
    """
    for name, module in model.named_modules():
        layer: Any = module
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{name}: expected 4-bit weights that gradients can pass, found them packed for inference on this CPU, which bitsandbytes "
                "does when a model is first called in evaluation mode; load the model again, and make the module before it is called"
            )
        layer.support_avx512bf16_for_cpu = False
