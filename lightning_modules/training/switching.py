"""Adapters switched off for a while, so that the model is the one that they were put on."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.lora.saving import initial_names

# Ways to start LoRA that leave the base weights alone (peft 0.21). Any other may subtract from them what A and B hold.
_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


@contextmanager
def switched_off(model: Any, kept: Sequence[str] = ()) -> Generator[None]:
    """Run a `PeftModel` without its adapters, and leave active adapters and `requires_grad` as they were.

    Args:
        model: A `PeftModel`.
        kept: Names of active adapters that stay on.
    """
    # peft freezes what it switches off, and afterwards makes all of it trainable: also what was frozen before.
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if kept:
            tuner = model.base_model
            active = list(tuner.active_adapters)
            try:
                tuner.set_adapter(list(kept))
                yield
            finally:
                tuner.set_adapter(active)
        else:
            with model.disable_adapter():
                yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def check_switchable(model: Any) -> list[str]:
    """The active adapters that are frozen and so belong to the start model.

    Raises:
        ValueError: If the model without the others is not the start model, see `references.AdapterOff.prepare`.
    """
    advice = "use SecondModel(), a copy, or Precomputed(path)"
    if model.active_peft_config.is_prompt_learning:
        return []
    active = list(model.base_model.active_adapters)
    trained = [name for name in active if any(weight.requires_grad for weight in _weights(model, name))]
    kept = [name for name in active if name not in trained]
    if not trained:
        raise ValueError(
            f"AdapterOff: expected an active adapter that is trained, found {', '.join(active)}, all frozen; load adapters with "
            "is_trainable=True, and build the module before anything is frozen"
        )
    for name in trained:
        config = model.peft_config[name]
        start = getattr(config, "init_lora_weights", True)
        if start not in _LEAVE_THE_BASE or any(hasattr(layer, initial_names(name)[0]) for layer in model.modules()):
            how = "FILA" if start in _LEAVE_THE_BASE else f"init_lora_weights={start!r}"
            raise ValueError(
                f"AdapterOff: expected adapters that left the base weights as they were, found {name!r} started by {how}; {advice} made "
                "before the adapters"
            )
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"AdapterOff: expected bias='none', found {config.bias!r}, which trains the base; {advice}"
            )
    if merged := [name for name, module in model.named_modules() if getattr(module, "merged", False) is True]:
        raise ValueError(f"AdapterOff: expected separate adapters, found {merged[0]} merged; call unmerge_adapter()")
    inside = {id(weight) for name in trained for weight in _weights(model, name)}
    outside = [name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in inside]
    if outside:
        raise ValueError(
            f"AdapterOff: expected nothing but adapters to be trained, found {len(outside)} other parameters, {outside[0]} the first, "
            f"which stay changed when the adapters are off; freeze them, name their modules in modules_to_save, or {advice}"
        )
    if any(bool(weight.any()) for name in trained for weight in _outputs(model, name)):
        warnings.warn(
            f"AdapterOff: the start model is the one without {', '.join(trained)}, whose effect is not nothing already: right for going on "
            "with a run, and otherwise use SecondModel(), a copy of the model as it is",
            stacklevel=3,
        )
    return kept


def _weights(model: nn.Module, adapter: str) -> Iterator[Tensor]:
    """The weights of an adapter, those of `modules_to_save` among them."""
    for module in model.modules():
        for group in dict.fromkeys(getattr(module, "adapter_layer_names", ())):
            entries: Any = getattr(module, group, None)
            if entries is not None and adapter in entries:
                entry = entries[adapter]
                yield from entry.parameters() if isinstance(entry, nn.Module) else [entry]


def _outputs(model: nn.Module, adapter: str) -> Iterator[Tensor]:
    """The factors of LoRA that are 0 in an adapter without effect."""
    for module in model.modules():
        linear, embedding = getattr(module, "lora_B", {}), getattr(module, "lora_embedding_A", {})
        if adapter in linear and not hasattr(linear[adapter], "sample"):
            yield linear[adapter].weight.detach()
        if adapter in embedding:
            yield torch.as_tensor(embedding[adapter]).detach()
