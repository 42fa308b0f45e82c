"""Two models on one storage: the first layers of a model as a model, with weights that stay shared."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import nn

Pairs = list[tuple[nn.Parameter, nn.Parameter]]
"""Parameters of the base, and those of the assistant that have the same names."""


def first_layers(model: nn.Module, num_layers: int) -> nn.Module:
    """A frozen model of the same class with the first layers only, whose weights are the same storage."""
    name, layers = _decoder_layers(model)
    if not 1 <= num_layers <= len(layers):
        raise ValueError(
            f"num_layers: expected between 1 and {len(layers)}, the layers of this {type(model).__name__}, found {num_layers}"
        )
    kinds = [*(getattr(model.config, "layer_types", None) or ("full_attention",) * len(layers))]
    attentive = next((place for place, kind in enumerate(kinds, start=1) if kind != "linear_attention"), None)
    if attentive is None:
        raise TypeError(
            f"expected a model with layers of attention, found {type(model).__name__}, whose states no cache can pair with another model's"
        )
    if num_layers < attentive:
        raise ValueError(
            f"num_layers: expected at least {attentive}, the first layer with attention of this {type(model).__name__}, found {num_layers}"
        )
    strange = {type(parameter).__name__ for parameter in model.parameters()} - {"Parameter"}
    if strange:
        raise TypeError(
            f"expected a model with plain parameters, found {', '.join(sorted(strange))}: build the assistant before quantizing or "
            "sharding the model"
        )
    # deepcopy copies nothing that the memo contains. So weights become new parameters on the same storage, buffers stay
    # the same objects, and later layers are left out.
    memo: dict[int, Any] = {id(layer): None for layer in layers[num_layers:]}
    memo |= {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    result: Any = copy.deepcopy(model, memo)
    setattr(result.base_model, name, getattr(result.base_model, name)[:num_layers])
    config = result.config
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(config.layer_types[:num_layers])
    return result


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    backbone: Any = getattr(model, "base_model", None)
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name in ("layers", "h"):
        layers = getattr(backbone, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers) == depth and not hasattr(model, "peft_config"):
            return name, layers
    found = "one with an adapter: merge it first" if hasattr(model, "peft_config") else type(model).__name__
    raise TypeError(
        "expected a Transformers causal language model with its decoder layers in model.layers (Llama and its like) or transformer.h "
        f"(GPT-2), found {found}"
    )


def refuse_to_merge(adapted: Any) -> None:
    """Let peft refuse to merge an adapter whose frozen weights belong to another model as well."""
    for name in ("merge_adapter", "merge_and_unload"):
        setattr(adapted.base_model, name, _refuse)


def _refuse(*_: object, **__: object) -> NoReturn:
    raise RuntimeError(
        "the assistant's frozen weights are the base model's own storage, and merging the adapter would write into it: keep the adapter "
        "apart (LogitDifferenceModel.save_pretrained does)"
    )


def share_equal_weights(base: nn.Module, assistant: nn.Module) -> None:
    """Put the frozen weights of an adapted assistant on the base's storage wherever they are equal.

    A model of `logit_difference.assistant` that was moved to a GPU and back contains copies; here they are shared
    again.
    """
    if not hasattr(assistant, "peft_config"):
        return
    equal = [
        (theirs, ours)
        for theirs, ours in _pairs(base, assistant)
        if (theirs.shape, theirs.dtype, theirs.device) == (ours.shape, ours.dtype, ours.device)
        and (theirs.data_ptr() == ours.data_ptr() or torch.equal(theirs, ours))
    ]
    share(equal)
    if equal:
        refuse_to_merge(assistant)


def share(pairs: Pairs) -> None:
    """Put the assistant's parameters on the base's storage."""
    for theirs, ours in pairs:
        ours.data = theirs.data


def shared_parameters(base: nn.Module, assistant: nn.Module) -> Pairs:
    """The frozen parameters of an adapted assistant that are on the base's storage."""
    return [pair for pair in _pairs(base, assistant) if pair[0].data_ptr() == pair[1].data_ptr()]


def _pairs(base: nn.Module, assistant: nn.Module) -> Pairs:
    """Parameters of the base and the frozen ones of an adapted assistant that have the same names."""
    theirs = dict(base.named_parameters())
    inner: Any = assistant.get_base_model() if hasattr(assistant, "peft_config") else assistant  # pyright: ignore[reportCallIssue]
    plain = ((name.replace(".base_layer", ""), parameter) for name, parameter in inner.named_parameters())
    return [(theirs[name], ours) for name, ours in plain if name in theirs and not ours.requires_grad]


def common_layers(base: nn.Module, adapted: Any) -> int:
    """The number of the base's layers that an adapted assistant stands on."""
    inner = adapted.get_base_model()
    frozen = [parameter for name, parameter in inner.named_parameters() if "lora_" not in name]
    pairs = _pairs(base, adapted)
    same = all(
        theirs.data_ptr() == ours.data_ptr() or (theirs.shape == ours.shape and torch.equal(theirs.to(ours), ours))
        for theirs, ours in pairs
    )
    if not same or len(pairs) != len(frozen):
        raise ValueError(
            "expected an adapter on the base's own weights, found one on others, which could not be restored: build the assistant with "
            "gradsurgery.logit_difference.assistant, or merge_and_unload() it to save it as a model of its own"
        )
    return int(inner.config.num_hidden_layers)
