"""LoKU's adapters: low-rank adapters that start where the forget set lives (FILA), and saving them so that a plain load is right.

Needs ``peft`` (``pip install 'gradsurgery[lightning]'``), imported when it is first used.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.lora.fisher import is_linear, is_plain
from gradsurgery.lora.low_rank import leading

__all__ = ["fila_", "save_pretrained"]


def fila_(
    peft_model: Any,
    importance: Mapping[str, Tensor],
    adapter_name: str = "default",
    eps: float = 1e-5,
    seed: int = 0,
) -> Any:
    r"""Start LoRA adapters from the part of each weight that matters most to the forget set; in place.

    For every adapted weight W ``[out, in]`` with importance I, rank r and LoRA's scaling :math:`\sigma` (alpha / r, or
    alpha / sqrt r with rslora):

    .. math::
        s_i = \sqrt{\textstyle\sum_j I_{ij}}, \quad U S V^T \approx \mathrm{diag}(s) W \text{ of rank } r, \quad
        A = \sqrt{S / \sigma}\, V^T, \quad B = \mathrm{diag}(1 / (s + \epsilon))\, U \sqrt{S / \sigma}, \quad
        W \leftarrow W - \sigma B A

    so that the model's output does not change, while :math:`\| \mathrm{diag}(s)(W - \sigma B A) \|_F` is within 0.2 % of the least
    possible (where s is far above :math:`\epsilon`). Rows are weighted as wholes, because only then does the weighted problem have a
    closed solution.

    Source: LoKU (2408.06621), FILA. Differences from the authors' code: their ``svd_lowrank(q=r)`` is unseeded and several per
    cent off the optimum; here it is exact up to 512 rows or columns, and a seeded block Krylov iteration above. B is computed as
    :math:`\mathrm{diag}(s / (s + \epsilon))\, W V / \sqrt{S \sigma}`, the same matrix, which for rows of s near 0 is small as it
    should be, where the formula divides rounding errors by :math:`\epsilon`. Directions with S = 0 (importance 0 everywhere, rank
    beyond the weight's) keep PEFT's own start, A random and B = 0: the formula makes both 0, and then neither ever gets a gradient.

    Args:
        peft_model: A ``PeftModel`` whose adapter is LoRA on linear weights and untrained (B = 0).
        importance: ``{"<module>.weight": I}`` as from `fisher_importance`, in the weight's own shape (``[in, out]`` for GPT-2's
            ``Conv1D``), >= 0; further entries are ignored.
        adapter_name: Which adapter. Others are left alone; the output is unchanged while this one is active.
        eps: Added to s, >= 0.
        seed: Of the iteration. The global random state is not touched.

    Returns:
        ``peft_model``.

    Raises:
        ValueError: If an importance is missing, of another shape, negative or not finite, or the adapter is unknown, trained, merged,
            not plain LoRA, or on anything but plain floating-point linear weights that belong to one module (quantised, sharded,
            embedding, tied). Nothing has changed then.
        TypeError: If ``peft_model`` is not a ``PeftModel``.

    Computed in float32 (float64 for float64 weights), residual of the rounded A and B, then cast: in bfloat16 the output is unchanged
    up to one rounding of each weight. Cost: `gradsurgery.lora.low_rank.leading` a weight; memory: three copies of one weight in float32.

    The base weights are **changed**: without the adapter the model is wrong. So ``merge_and_unload()`` is right, and
    ``disable_adapter()`` and ``unload()`` do not give the original model: take reference outputs from a model of its own. A copy of
    the initial A and B stays with each layer (frozen, in ``state_dict``) and ``peft_model.save_pretrained`` is replaced by
    `save_pretrained`, so that ``PeftModel.from_pretrained(original model, folder)`` is right.

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
    # Nothing has been changed so far, and nothing below can fail.
    for layer, (a, b, base) in zip(layers.values(), factors, strict=True):
        with torch.no_grad():
            layer.lora_A[adapter_name].weight.copy_(a)
            layer.lora_B[adapter_name].weight.copy_(b)
            residual = base.matrix() - layer.scaling[adapter_name] * _wide(b) @ _wide(a)
            # A new tensor: what else reads the old storage (another model, a snapshot) keeps the original weight.
            base.weight.data = (residual.T if base.transposed else residual).to(base.weight.dtype).contiguous()
        for name, value in zip(_initial_names(adapter_name), (a, b), strict=True):
            # A frozen parameter, because DDP would send a buffer around in every forward pass.
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


def save_pretrained(peft_model: Any, save_directory: Any, **options: Any) -> None:
    r"""Save adapters so that a plain ``PeftModel.from_pretrained(original model, folder)`` gives this model.

    `fila_` moved :math:`\sigma B_0 A_0` out of the base weights, and the original ones do not know. So an adapter of rank 2 r is saved,
    whose factors are [A; A_0] and [B, -B_0]:

    .. math:: W + \sigma (B A - B_0 A_0) = (W - \sigma B_0 A_0) + \sigma B A

    Exact up to rounding: of float32, or, where the base is bfloat16, of the base weights once (the live model has them rounded after the
    subtraction). What is loaded is an ordinary LoRA adapter of rank 2 r; to go on training at rank r, load a full checkpoint
    (``state_dict``) into a model prepared by `fila_`. Other adapters are saved as PEFT does. `fila_` puts this function in the place of
    ``peft_model.save_pretrained``; PEFT's own, ``peft.get_peft_model_state_dict``, knows nothing of the base.

    Args:
        peft_model: A ``PeftModel``, after `fila_` or not.
        save_directory: Folder.
        **options: As of ``PeftModel.save_pretrained``; a ``state_dict`` may be given, with the initial factors in it.

    Raises:
        ValueError: If ``path_initial_model_for_weight_conversion`` is given: the conversion is done here.
        TypeError: If ``peft_model`` is not a ``PeftModel``.

    Example:
        >>> import tempfile
        >>> from peft import LoraConfig, PeftModel, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> original, tokens = LlamaForCausalLM(config), torch.tensor([[1, 2, 3]])
        >>> model = get_peft_model(copy.deepcopy(original), LoraConfig(r=2, target_modules=["up_proj"]))
        >>> model = fila_(model, {"model.layers.0.mlp.up_proj.weight": torch.rand(8, 8)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     loaded = PeftModel.from_pretrained(original, folder)
        >>> torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-6)
        True
    """
    original = _peft_model_class(peft_model).save_pretrained
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
            if not hasattr(layer, _initial_names(adapter_name)[0]):
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
    """A copy with the same scaling, alpha / r or alpha / sqrt r, of every layer."""
    config = copy.deepcopy(config)
    factor = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True
    return config


class _Base(NamedTuple):
    weight: torch.nn.Parameter
    transposed: bool

    def matrix(self) -> Tensor:
        """[out, in], float32 or float64."""
        weight = _wide(self.weight.detach())
        return weight.T if self.transposed else weight


def _factors(layer: Any, importance: Tensor, adapter_name: str, eps: float, seed: int) -> tuple[Tensor, Tensor, _Base]:
    """A and B, in the adapter's type, and the weight they are to be taken from."""
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
    """The layers of an adapter by the plain name of their weight, if FILA can be done to all of them."""
    _peft_model_class(peft_model)
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
    if adapter_name in getattr(layer, "lora_variant", ()) or layer.use_dora.get(adapter_name):
        raise ValueError(f"{key}: expected plain LoRA, found a variant of it (DoRA and the like)")
    if layer.merged:
        raise ValueError(
            f"{key}: expected separate adapters, found {layer.merged_adapters} merged; call unmerge_adapter()"
        )
    if bool(layer.lora_B[adapter_name].weight.any()):
        raise ValueError(
            f"{key}: expected an adapter that does nothing yet (B = 0), found one that was trained or started by something else, such as "
            "PiSSA or an earlier fila_; use init_lora_weights=True and call fila_ once"
        )


def _initial_names(adapter_name: str) -> tuple[str, str]:
    return f"fila_A_{adapter_name}", f"fila_B_{adapter_name}"


def _entries(adapter_name: str) -> tuple[str, str, str, str]:
    return f"lora_A.{adapter_name}.weight", f"lora_B.{adapter_name}.weight", *_initial_names(adapter_name)


def _entry(state: Mapping[str, Any], name: str) -> Tensor:
    if name not in state:
        raise ValueError(
            f"state_dict: expected an entry {name}, found none; give the state of the whole model, or no state_dict"
        )
    return state[name]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _peft_model_class(peft_model: Any) -> Any:
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "gradsurgery.lora needs peft: pip install 'gradsurgery[lightning]'", name=error.name
        ) from error
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"expected a PeftModel (peft.get_peft_model makes one), found {type(peft_model).__name__}")
    return type(peft_model)
