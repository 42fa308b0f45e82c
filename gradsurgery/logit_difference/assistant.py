"""ULD's assistant: the first layers of a model, sharing its weights, with an adapter of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from gradsurgery.logit_difference.shared_layers import first_layers, refuse_to_merge
from gradsurgery.lora.targets import without_adapters

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["assistant"]


def assistant(
    model: nn.Module,
    num_layers: int = 8,
    lora_rank: int = 32,
    *,
    lora_alpha: float = 32.0,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
) -> PeftModel:
    """Build ULD's assistant: the first layers of a model, frozen, with a trainable LoRA adapter.

    It has the model's embeddings, first layers, final norm and head. These frozen weights are the model's own
    storage, not copies: only the adapter takes memory. The model is left as it was (parameters, gradients,
    `requires_grad`, mode and config), and nothing that trains the assistant can change it. Merging the adapter
    *would* write into the shared storage, and is refused.

    The adapter is on every linear layer but the head, unless others are named, and starts without effect (B = 0).
    Paper: rank 32, alpha 32; the authors' code: rank 16, alpha 32, dropout 0.05. Its first weights are drawn from
    torch's global generator.

    Args:
        model: A Transformers causal language model whose backbone (`model.base_model`) has its decoder layers in
            `layers` or `h`: Llama and the models built like it, GPT-2.
        num_layers: K, how many of them. Paper: 8 of the 32 of Llama-2-7B.
        lora_rank: Rank r of the adapter: r * (inputs + outputs) weights a linear layer.
        lora_alpha: The adapter's output is scaled by alpha / rank.
        lora_dropout: On the adapter's input.
        target_modules: Names of modules, as peft takes them; "all-linear" for every linear layer but the head, and
            those that no adapter fits.

    Returns:
        A `peft.PeftModel`, called like a causal language model.

    Raises:
        ValueError: If `num_layers` or `lora_rank` is not positive, or the model has fewer layers.
        TypeError: If the layers cannot be identified, or the model is quantized or has an adapter of its own.
        ImportError: Without peft.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> small = assistant(model, num_layers=1, lora_rank=2)
        >>> sum(p.numel() for p in small.parameters() if p.requires_grad)  # seven linear layers, rank 2, 8 in and 8 out
        224
        >>> small.get_base_model().lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
        True
    """
    if lora_rank < 1:
        raise ValueError(f"lora_rank: expected a rank of at least 1, found {lora_rank}")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            f"logit_difference.assistant needs peft ({error}): pip install 'gradsurgery[lightning]'"
        ) from error
    layers = first_layers(model, num_layers)
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=lora_alpha,  # pyright: ignore[reportArgumentType] (any number will do)
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        exclude_modules=without_adapters(layers) if target_modules == "all-linear" else None,
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(layers, config)
    # A loader that trusts the adapter's own config would put the adapter on the whole model: this name stops it, and
    # says why.
    config.base_model_name_or_path = (
        f"the first {num_layers} layers of ../base: load the parent folder with gradsurgery.logit_difference"
    )
    refuse_to_merge(adapted)
    return adapted
