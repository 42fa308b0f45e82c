"""Low-rank adapters on every linear weight but the head, initialised at random or by LoKU's FILA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from gradsurgery import lora


def with_adapters(
    model: nn.Module,
    *,
    rank: int,
    init: Literal["default", "fila"] = "default",
    forget_batches: Iterable[Mapping[str, Tensor]] | None = None,
    retain_batches: Iterable[Mapping[str, Tensor]] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A `PeftModel` around a causal language model: LoRA with alpha twice the rank and no dropout, as in LoKU.

    Args:
        model: A Hugging Face model. Its modules are adapted in place, and with "fila" its weights change.
        rank: Of the adapters; 0 returns the model as it is.
        init: "default" starts with A random and B = 0, "fila" with what matters most to the forget set, see
            `gradsurgery.lora.fila_`.
        forget_batches: Only for "fila": the batches on which importance is measured, with `input_ids`, `attention_mask`
            and `labels` as `collate` makes them.
        retain_batches: The same for the retain set. The authors use as many batches as of the forget set.
        seed: Of the adapters. The global random state is left as it was.

    Raises:
        ValueError: If an argument is outside its domain, or "fila" lacks batches or a rank. The model then stays
            unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = with_adapters(LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)), rank=2)
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        224
    """
    if rank < 0:
        raise ValueError(f"rank: expected a number >= 0, found {rank}")
    if init not in ("default", "fila"):
        raise ValueError(f"init: expected 'default' or 'fila', found {init!r}")
    if init == "fila" and not rank:
        raise ValueError("init: FILA starts adapters, and a rank of 0 means none; choose a rank such as 8")
    if init == "fila" and (forget_batches is None or retain_batches is None):
        raise ValueError("init: FILA measures importance on forget_batches and retain_batches, and one is None")
    if not rank:
        return model
    from peft import LoraConfig, get_peft_model

    # Importance comes first, so that batches that raise leave the model without adapters.
    importance = (
        lora.fisher_importance(model, forget_batches, retain_batches)
        if forget_batches is not None and retain_batches is not None and init == "fila"
        else None
    )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which reseeds every GPU as well
        adapted = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    if importance is None:
        return adapted
    try:
        return lora.fila_(adapted, importance, seed=seed)
    except ValueError:
        adapted.unload()
        raise
