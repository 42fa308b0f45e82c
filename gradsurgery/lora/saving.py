"""Saving adapters that FILA started, so that a plain ``PeftModel.from_pretrained`` on the original model is right."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["initial_names", "peft_model_class", "save_pretrained"]


def save_pretrained(peft_model: Any, save_directory: Any, **options: Any) -> None:
    r"""Save adapters so that a plain ``PeftModel.from_pretrained(original model, folder)`` gives this model.

    `fila_` subtracted $\sigma B_0 A_0$ from the base weights, with the initial factors $A_0$ and
    $B_0$. The original base still contains it. So the saved adapter has rank 2 r, with the factors
    $[A; A_0]$ and $[B, -B_0]$:

    $$W + \sigma (B A - B_0 A_0) = (W - \sigma B_0 A_0) + \sigma B A$$

    This is exact up to rounding in float32. Where the base is bfloat16, the two models differ by one more rounding of
    the base weights, because the live model rounded them after the subtraction. The loaded model has an ordinary LoRA
    adapter of rank 2 r. To go on training at rank r, load a full checkpoint (``state_dict``) into a model prepared by
    `fila_`.

    Adapters that `fila_` did not start are saved as PEFT saves them. `fila_` puts this function in the place of
    ``peft_model.save_pretrained``; PEFT's own ``peft.get_peft_model_state_dict`` knows nothing of the changed base.

    Args:
        peft_model: A ``PeftModel``, after `fila_` or not.
        save_directory: Folder.
        **options: As of ``PeftModel.save_pretrained``. A ``state_dict`` may be given; it must contain the initial
            factors.

    Raises:
        ValueError: If ``path_initial_model_for_weight_conversion`` is given (the conversion is done here), or if a
            given ``state_dict`` lacks an entry.
        TypeError: If ``peft_model`` is not a ``PeftModel``.

    Example:
        >>> import tempfile
        >>> from gradsurgery.lora import fila_
        >>> from peft import LoraConfig, PeftModel, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> original, tokens = LlamaForCausalLM(LlamaConfig(**sizes)), torch.tensor([[1, 2, 3]])
        >>> model = get_peft_model(copy.deepcopy(original), LoraConfig(r=2, target_modules=["up_proj"]))
        >>> model = fila_(model, {"model.layers.0.mlp.up_proj.weight": torch.rand(8, 8)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     loaded = PeftModel.from_pretrained(original, folder)
        >>> torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-6)
        True
    """
    original = peft_model_class(peft_model).save_pretrained
    if options.get("path_initial_model_for_weight_conversion") is not None:
        raise ValueError(
            "path_initial_model_for_weight_conversion: expected None, because the adapter is converted for the original base already; "
            "leave it out"
        )
    given = options.pop("state_dict", None)
    state: dict[str, Any] = dict(peft_model.state_dict() if given is None else given)
    configs = dict(peft_model.peft_config)
    for adapter_name in options.get("selected_adapters") or list(configs):
        converted = False
        for name, layer in peft_model.named_modules():
            if not hasattr(layer, initial_names(adapter_name)[0]):
                continue
            a, b, a_0, b_0 = (_entry(state, f"{name}.{entry}") for entry in _entries(adapter_name))
            state[f"{name}.lora_A.{adapter_name}.weight"] = torch.cat([a, a_0], 0)
            state[f"{name}.lora_B.{adapter_name}.weight"] = torch.cat([b, -b_0], 1)
            converted = True
        if converted:
            configs[adapter_name] = _of_twice_the_rank(configs[adapter_name])
    live = dict(peft_model.peft_config)
    peft_model.peft_config.update(configs)
    try:
        original(peft_model, save_directory, state_dict=state, **options)
    finally:
        peft_model.peft_config.update(live)


def _of_twice_the_rank(config: Any) -> Any:
    """A copy of the config with twice the rank and the same scaling (alpha / r or alpha / sqrt r) of every layer."""
    config = copy.deepcopy(config)
    factor = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True
    return config


def initial_names(adapter_name: str) -> tuple[str, str]:
    """The names under which a layer keeps its initial A and B."""
    return f"fila_A_{adapter_name}", f"fila_B_{adapter_name}"


def _entries(adapter_name: str) -> tuple[str, str, str, str]:
    return f"lora_A.{adapter_name}.weight", f"lora_B.{adapter_name}.weight", *initial_names(adapter_name)


def _entry(state: Mapping[str, Any], name: str) -> Tensor:
    if name not in state:
        raise ValueError(
            f"state_dict: expected an entry {name}, found none; give the state of the whole model, or no state_dict"
        )
    return state[name]


def peft_model_class(peft_model: Any) -> Any:
    """The class of a ``PeftModel``.

    Raises:
        TypeError: If it is anything else.
        ModuleNotFoundError: Without peft.
    """
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "gradsurgery.lora needs peft: pip install 'gradsurgery[lightning]'", name=error.name
        ) from error
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"expected a PeftModel (peft.get_peft_model makes one), found {type(peft_model).__name__}")
    return type(peft_model)
