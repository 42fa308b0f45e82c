"""Low-rank adapters on the linear weights of a model, initialised at random or by LoKU's FILA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery import lora
from gradsurgery.lora.fisher import is_linear
from gradsurgery.lora.targets import without_adapters
from lightning_modules.training.adapter_settings import ALL_LINEAR, AdapterSettings


def adapt(
    model: nn.Module,
    settings: AdapterSettings,
    *,
    forget_batches: Iterable[Mapping[str, Tensor]] | None = None,
    retain_batches: Iterable[Mapping[str, Tensor]] | None = None,
    parts: int = 1,
) -> nn.Module:
    """A `PeftModel` around a causal language model.

    Args:
        model: A Hugging Face model. Its modules are adapted in place, and with "fila" its weights change.
        settings: Of the adapters; a rank of 0 returns the model as it is.
        forget_batches: Only for "fila": the batches on which importance is measured, with `input_ids`, `attention_mask`
            and `labels` as `collate` makes them.
        retain_batches: The same for the retain set. The authors use as many batches as of the forget set.
        parts: Each of these batches is read in so many parts, with the memory of one.

    Raises:
        ValueError: If a setting is outside its domain, a target is no module that can be adapted, or "fila" lacks
            batches or a rank. The model then stays unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
        >>> model = adapt(model, AdapterSettings(rank=2, targets=["q_proj", "v_proj"], kind="dora"))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad][-1]
        'base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector.default.weight'
    """
    settings.check()
    if settings.init == "fila" and (forget_batches is None or retain_batches is None):
        raise ValueError("init: FILA measures importance on forget_batches and retain_batches, and one is None")
    if not settings.rank:
        return model
    from peft import LoraConfig, get_peft_model

    targets = checked_targets(model, settings.targets)
    # Importance comes first, so that batches that raise leave the model without adapters.
    importance = (
        lora.fisher_importance(model, forget_batches, retain_batches, parts=parts, modules=_measured(targets))
        if forget_batches is not None and retain_batches is not None and settings.init == "fila"
        else None
    )
    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # pyright: ignore[reportArgumentType] (any number will do)
        target_modules=targets,
        exclude_modules=without_adapters(model) if targets == ALL_LINEAR else None,
        lora_dropout=settings.dropout,
        use_dora=settings.kind == "dora",
        use_rslora=settings.kind == "rslora",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)  # not torch.manual_seed, which reseeds every GPU as well
        adapted = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    if importance is None:
        return adapted
    try:
        return lora.fila_(adapted, importance, seed=settings.seed)
    except ValueError:
        adapted.unload()
        raise


def checked_targets(model: nn.Module, targets: str | Sequence[str]) -> str | list[str]:
    """The modules to adapt, as peft takes them: "all-linear", or names of which each is found.

    peft itself adapts the names that it finds and says nothing about the others.

    Args:
        model: Without adapters.
        targets: As in `AdapterSettings`; one string may hold several names with commas between them.

    Raises:
        ValueError: If a name is of no module, or of one that is neither linear nor an embedding.
    """
    names = [name.strip() for name in targets.split(",")] if isinstance(targets, str) else list(targets)
    if names == [ALL_LINEAR]:
        return ALL_LINEAR
    modules = dict(model.named_modules())
    fitting = {name for name, module in modules.items() if is_linear(module) or isinstance(module, nn.Embedding)}
    for target in names:
        found = {name for name in modules if target and _is_named(name, target)}
        if found and found <= fitting:
            continue
        short = sorted({name.rpartition(".")[2] for name in fitting})
        near = get_close_matches(target.rpartition(".")[2], short)
        what = f"{target!r}, a {type(modules[min(found - fitting)]).__name__}" if found else repr(target)
        raise ValueError(
            f"adapters' targets: expected {ALL_LINEAR} or names of linear modules or embeddings, here {', '.join(short)}, found {what}"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    if not names:
        raise ValueError(f"adapters' targets: expected {ALL_LINEAR} or at least one name, found an empty list")
    return names


def has_adapter(model: nn.Module, target: str) -> bool:
    """Whether a `PeftModel` has an adapter on a module of this name, or one that ends in it."""
    return any(hasattr(module, "lora_A") and _is_named(name, target) for name, module in model.named_modules())


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")  # as peft compares them


def _measured(targets: str | list[str]) -> Any:
    """Which modules FILA needs the importance of; None for all but the head."""
    return None if isinstance(targets, str) else lambda name: any(_is_named(name, target) for target in targets)
