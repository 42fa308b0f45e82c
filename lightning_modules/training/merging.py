"""Adapters merged into the weights that they adapt, where the merged model computes what the adapted one did."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gradsurgery.lora.fisher import is_plain

_HALF = (torch.bfloat16, torch.float16)


def merged(model: nn.Module) -> Any:
    r"""The model with its active adapters merged into its weights; without any, the model itself.

    In float32 the merged model computes what the adapted one did, up to rounding. A half-precision weight is rounded
    to its own type once more, and a change far below its last place is lost. A warning says how much of all changes
    $\Delta W$ that is, $\| \mathrm{merged} - (W + \Delta W) \|_F / \| \Delta W \|_F$ over all weights.

    Args:
        model: A `PeftModel`, whose base is changed in place, or any other model.

    Raises:
        ValueError: As `check_mergeable`; the model is then unchanged.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    check_mergeable(model)
    lost = _lost(model)
    adapted: Any = model
    whole = adapted.merge_and_unload()
    if lost is not None:
        warnings.warn(
            f"merging rounded the weights to half precision: {lost:.2g} of the adapters' change is lost (Frobenius norms); the adapter "
            "kept by itself loses nothing, and neither does a float32 base",
            stacklevel=2,
        )
    return whole


def check_mergeable(model: Any) -> None:
    """Refuse adapters that cannot be merged without another result; a model without adapters passes.

    Raises:
        ValueError: If an adapter is on a quantised weight, which merging would round to a few bits again, or on one
            that another module has too (tied embeddings), which merging would change as well.
    """
    if not hasattr(model, "merge_and_unload"):
        return
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in _layers(model):
        weight: Any = getattr(layer.get_base_layer(), "weight", None)
        if weight is None:
            continue
        plain = name.removeprefix("base_model.model.")
        if not is_plain(weight) and not isinstance(weight.data, DTensor):
            raise ValueError(
                f"{plain}: expected a plain floating-point weight to merge into, found {type(weight).__name__} of {weight.dtype}, "
                "which would be rounded again; keep the adapter, or put it on the model loaded without quantisation"
            )
        if len(shared := owners.get(id(weight), [])) > 1:
            both = " and ".join(other.removeprefix("base_model.model.") for other in shared)
            raise ValueError(
                f"{plain}: expected a weight of one module to merge into, found it tied as {both}, and merging would change both; "
                "leave the module out of the adapters' targets, or keep the adapter"
            )


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every adapted module by its name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


@torch.no_grad()
def _lost(model: Any) -> float | None:
    """The share of the change that rounding to half precision loses; None where no adapted weight is in it."""
    rounded, change, found = 0.0, 0.0, False
    for _, layer in _layers(model):
        weight: Any = getattr(layer.get_base_layer(), "weight", None)
        if weight is None or weight.dtype not in _HALF or layer.merged or isinstance(weight.data, DTensor):
            continue
        found = True
        exact, here = copy.deepcopy(layer).float(), copy.deepcopy(layer)
        exact.merge()
        here.merge()
        wanted = exact.get_base_layer().weight.double()
        rounded += float((here.get_base_layer().weight.double() - wanted).square().sum())
        change += float((wanted - weight.double()).square().sum())
    return (rounded / change) ** 0.5 if found and change else None
