"""ULD's assistant: the first layers of a model with an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from gradsurgery.logit_difference.shared_layers import first_layers, refuse_to_merge

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["assistant"]


def assistant(
    model: nn.Module, num_layers: int = 8, lora_rank: int = 32, *, lora_alpha: float = 32.0, lora_dropout: float = 0.0
) -> PeftModel:
    r"""Returns ULD's assistant: the model's embeddings, first layers, final norm and head, frozen, and a trainable LoRA adapter.

    The frozen weights are the model's own storage, not copies: the assistant takes no memory but its adapter's. The model is untouched
    (its parameters, gradients, `requires_grad`, mode and config), and nothing that trains the assistant can change it. What *would*
    write into the shared storage, merging the adapter, is refused.

    The adapter (B = 0 at the start, hence without effect) is on every linear layer but the head. Paper: rank 32, alpha 32; the
    authors' code: rank 16, alpha 32, dropout 0.05. Its first weights are drawn from torch's generator.

    Args:
        model: a Transformers causal language model whose backbone (`model.base_model`) has its decoder layers in `layers` or `h`:
            Llama and all that look like it, GPT-2.
        num_layers: how many of them, K. Paper: 8 of the 32 of Llama-2-7B.
        lora_rank: rank r of the adapter, r * (inputs + outputs) weights a linear layer.
        lora_alpha: the adapter's output is scaled by alpha / rank.
        lora_dropout: on the adapter's input.

    Returns:
        A `peft.PeftModel` that is called like a causal language model.

    Raises:
        ValueError: If `num_layers` or `lora_rank` is not positive, or the model has fewer layers.
        TypeError: If the layers cannot be found, or the model is quantized or has an adapter of its own.
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
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=lora_alpha,  # pyright: ignore[reportArgumentType] (any number will do)
        lora_dropout=lora_dropout,
        target_modules="all-linear",  # which in peft leaves the head out
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(first_layers(model, num_layers), config)
    # A loader that goes by the adapter's own config would put it on the whole model: this name stops it, and says why.
    config.base_model_name_or_path = (
        f"the first {num_layers} layers of ../base: load the parent folder with gradsurgery.logit_difference"
    )
    refuse_to_merge(adapted)
    return adapted
