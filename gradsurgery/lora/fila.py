"""FILA: the start of LoRA adapters from the part of each weight that matters most to the forget set."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.lora.fisher import is_linear, is_plain
from gradsurgery.lora.low_rank import leading
from gradsurgery.lora.saving import initial_names, peft_model_class, save_pretrained

__all__ = ["fila_"]


def fila_(
    peft_model: Any,
    importance: Mapping[str, Tensor],
    adapter_name: str = "default",
    eps: float = 1e-5,
    seed: int = 0,
) -> Any:
    r"""Start LoRA adapters from the part of each weight that matters most to the forget set; in place.

    For every adapted weight W ``[out, in]`` with importance I, rank r and LoRA's scaling $\sigma$ (alpha / r, or
    alpha / sqrt r with rslora):

    $$s_i = \sqrt{\textstyle\sum_j I_{ij}}, \quad U S V^T \approx \mathrm{diag}(s) W \text{ of rank } r,$$

    $$A = \sqrt{S / \sigma}\, V^T, \quad B = \mathrm{diag}(1 / (s + \epsilon))\, U \sqrt{S / \sigma},
    \quad W \leftarrow W - \sigma B A$$

    The model's output does not change, and $\| \mathrm{diag}(s)(W - \sigma B A) \|_F$ is within 0.2 % of the
    least possible (where s is far above $\epsilon$). One weight s_i per row, because only then does the
    weighted problem have a closed solution.

    The base weights are **changed**: without the adapter the model is wrong. So ``merge_and_unload()`` is right,
    while ``disable_adapter()`` and ``unload()`` do not give the original model: take reference outputs from a model
    of its own. A copy of the initial A and B stays with each layer (frozen, in ``state_dict``), and `save_pretrained`
    replaces ``peft_model.save_pretrained``, so that ``PeftModel.from_pretrained(original model, folder)`` is right.

    Source: LoKU (2408.06621), FILA. Differences from the authors' code:

    - Their ``svd_lowrank(q=r)`` is unseeded and several per cent off the optimum. Here the decomposition is exact up
      to 512 rows or columns, and a seeded block Krylov iteration above.
    - B is computed as $\mathrm{diag}(s / (s + \epsilon))\, W V / \sqrt{S \sigma}$. That is the same matrix, but
      rows with s near 0 become small, as they should, where the formula divides rounding errors by $\epsilon$.
    - Directions with S = 0 (importance 0 everywhere, or a rank beyond the weight's) keep PEFT's own start, A random and
      B = 0. The formula sets both to 0, and then neither ever gets a gradient.

    Args:
        peft_model: A ``PeftModel`` whose adapter is LoRA on linear weights and untrained (B = 0).
        importance: ``{"<module>.weight": I}`` as from `fisher_importance`, in the weight's own shape (``[in, out]`` for
            GPT-2's ``Conv1D``), >= 0. Further entries are ignored.
        adapter_name: Which adapter. Others are left alone. The output is unchanged while this one is active.
        eps: Added to s, >= 0.
        seed: Of the iteration. The global random state is not touched.

    Returns:
        ``peft_model``.

    Raises:
        ValueError: If an importance is missing, of another shape, negative or not finite; if the adapter is unknown,
            trained, merged or not plain LoRA, or another one on the same weight is not; or if it is on anything but
            plain floating-point linear weights that belong to one module (quantised, sharded, embedding, tied). The
            model is then unchanged.
        TypeError: If ``peft_model`` is not a ``PeftModel``.

    Precision: computed in float32 (float64 for float64 weights). A and B are rounded to the adapter's type first, and
    the rounded ones are subtracted from W; in bfloat16 the output is unchanged up to one rounding of each weight.

    Cost: `gradsurgery.lora.low_rank.leading` once per weight; memory: three copies of one weight in float32.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(6, 4)
        ...     def forward(self, inputs):
        ...         return self.layer(inputs)
        >>> model, inputs = Model(), torch.randn(2, 6)
        >>> before = model(inputs)
        >>> adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["layer"]))
        >>> adapted = fila_(adapted, {"layer.weight": torch.rand(4, 6)})
        >>> torch.allclose(adapted(inputs), before, atol=1e-5)
        True
    """
    if not eps >= 0.0:
        raise ValueError(f"eps: expected a number >= 0, found {eps}")
    layers = _checked(peft_model, importance, adapter_name)
    factors = [_factors(layer, importance[key], adapter_name, eps, seed) for key, layer in layers.items()]
    # All checks are done: the model is unchanged so far, and nothing below can fail.
    for layer, (a, b, base) in zip(layers.values(), factors, strict=True):
        with torch.no_grad():
            layer.lora_A[adapter_name].weight.copy_(a)
            layer.lora_B[adapter_name].weight.copy_(b)
            residual = base.matrix() - layer.scaling[adapter_name] * _wide(b) @ _wide(a)
            # A new tensor: whatever else reads the old storage (another model, a snapshot) keeps the original weight.
            base.weight.data = (residual.T if base.transposed else residual).to(base.weight.dtype).contiguous()
        for name, value in zip(initial_names(adapter_name), (a, b), strict=True):
            # A frozen parameter and not a buffer, because DDP broadcasts buffers in every forward pass.
            layer.register_parameter(name, torch.nn.Parameter(value.clone(), requires_grad=False))
    peft_model.save_pretrained = partial(save_pretrained, peft_model)
    inactive = [
        key for key, layer in layers.items() if layer.disable_adapters or adapter_name not in layer.active_adapters
    ]
    if inactive:
        warnings.warn(
            f"the adapter {adapter_name!r} is not active, so the model's output has changed: its base weights now lack what the adapter "
            f"holds; call set_adapter({adapter_name!r})",
            stacklevel=2,
        )
    return peft_model


class _Base(NamedTuple):
    weight: torch.nn.Parameter
    transposed: bool

    def matrix(self) -> Tensor:
        """The weight as ``[out, in]``, in float32 or float64."""
        weight = _wide(self.weight.detach())
        return weight.T if self.transposed else weight


def _factors(layer: Any, importance: Tensor, adapter_name: str, eps: float, seed: int) -> tuple[Tensor, Tensor, _Base]:
    """A and B in the adapter's type, and the weight that they are to be subtracted from."""
    old_a, old_b = (matrices[adapter_name].weight.detach() for matrices in (layer.lora_A, layer.lora_B))
    base = _Base(layer.get_base_layer().weight, layer.fan_in_fan_out)
    weight = base.matrix()
    importance = importance.detach().to(weight)
    s = (importance.T if base.transposed else importance).sum(1, keepdim=True).sqrt()
    values, vectors = leading(s * weight, len(old_a), torch.Generator().manual_seed(seed))
    kept = int((values > torch.finfo(weight.dtype).eps * values[0]).sum())
    values, vectors = values[:kept], vectors[:, :kept]
    scaling = layer.scaling[adapter_name]
    a, b = old_a.clone(), torch.zeros_like(old_b)
    a[:kept] = (vectors * (values / scaling).sqrt()).T.to(a)
    b[:, :kept] = (torch.where(s > 0.0, s / (s + eps), 0.0) * (weight @ vectors) / (values * scaling).sqrt()).to(b)
    return a, b, base


def _checked(peft_model: Any, importance: Mapping[str, Tensor], adapter_name: str) -> dict[str, Any]:
    """The layers of an adapter by the plain name of their weight, checked: FILA can start all of them."""
    peft_model_class(peft_model)
    config = peft_model.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(f"adapter_name: expected one of {', '.join(peft_model.peft_config)}, found {adapter_name!r}")
    if config.peft_type != "LORA":
        raise ValueError(f"expected an adapter of type LORA, found {config.peft_type}")
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {
        f"{name.removeprefix('base_model.model.')}.weight": layer
        for name, layer in peft_model.named_modules()
        if isinstance(layer, LoraLayer) and (adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A)
    }
    owners: dict[int, list[str]] = {}
    for name, parameter in peft_model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    for key, layer in layers.items():
        _check_layer(key, layer, adapter_name)
        base = layer.get_base_layer()
        shared = owners[base.weight.data_ptr()]
        if len(shared) > 1:
            raise ValueError(
                f"{key}: expected a weight of one module, found it tied as {' and '.join(shared)}; changing it would change the other, "
                "leave the module out of target_modules"
            )
        if key not in importance:
            raise ValueError(
                f"importance: expected an entry {key}, found {len(importance)} others such as {next(iter(importance), None)}; "
                "measure it with fisher_importance on this model"
            )
        values = importance[key]
        if values.shape != base.weight.shape:
            raise ValueError(
                f"importance of {key}: expected shape {list(base.weight.shape)}, found {list(values.shape)}"
            )
        if not bool((values.isfinite() & (values >= 0.0)).all()):
            raise ValueError(f"importance of {key}: expected finite numbers >= 0, found others")
    return layers


def _check_layer(key: str, layer: Any, adapter_name: str) -> None:
    base = layer.get_base_layer()
    if adapter_name not in layer.lora_A or not is_linear(base) or not hasattr(layer, "fan_in_fan_out"):
        raise ValueError(f"{key}: expected an adapter on a linear layer, found one on {type(base).__name__}")
    if not is_plain(base.weight):
        raise ValueError(
            f"{key}: expected a plain floating-point weight, found {type(base.weight).__name__} of {base.weight.dtype}; FILA writes to "
            "the base, so do it before the model is quantised or sharded"
        )
    scaling = layer.scaling[adapter_name]
    if not 0.0 < scaling < math.inf:
        raise ValueError(
            f"{key}: expected a scaling (lora_alpha / r) above 0, of which FILA takes the root, found {scaling}; give LoraConfig "
            "a lora_alpha above 0"
        )
    variants = {*getattr(layer, "lora_variant", ()), *(name for name, used in layer.use_dora.items() if used)}
    if adapter_name in variants:
        raise ValueError(f"{key}: expected plain LoRA, found a variant of it (DoRA and the like)")
    if variants:
        raise ValueError(
            f"{key}: expected plain LoRA only, but {min(variants)!r} on the same weight is a variant of it (DoRA and the like), "
            "which would compute something else on the changed base; merge that adapter first"
        )
    if layer.merged:
        raise ValueError(
            f"{key}: expected separate adapters, found {layer.merged_adapters} merged; call unmerge_adapter()"
        )
    if bool(layer.lora_B[adapter_name].weight.any()):
        raise ValueError(
            f"{key}: expected an adapter that does nothing yet (B = 0), found one that was trained or started by something else, such as "
            "PiSSA or an earlier fila_; use init_lora_weights=True and call fila_ once"
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
