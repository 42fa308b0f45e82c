"""Splits a language model into backbone and head, and tries out whether the two together give the model's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_TRIAL_TOKENS = 32

EXACT = (torch.float32, torch.float64)
"""Types whose rounding is too small to hide a difference that matters."""


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The part of a Hugging Face model that gives hidden states, and its output embeddings.

    Adapters stay in place in both parts.

    Returns:
        None if the model does not say which parts these are, or if the parts only work when called by the whole model:
        with sharded weights, or with a learned prompt.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None  # FSDP gathers its shards in the outermost forward, which a call of a part alone would bypass
    core: Any = model
    if hasattr(core, "peft_config") and hasattr(core, "get_base_model"):
        if any(config.is_prompt_learning for config in core.peft_config.values()):
            return None  # the outermost forward puts the learned prompt in front
        core = core.get_base_model()
    backbone = getattr(core, getattr(core, "base_model_prefix", "") or "-", None)
    head = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None
    return (backbone, head) if isinstance(backbone, nn.Module) and isinstance(head, nn.Module) else None


def gives_logits(
    model: nn.Module, backbone: nn.Module, head: Callable[[Tensor], Tensor], inputs: Mapping[str, Tensor]
) -> bool:
    """Whether a head of the backbone's last hidden states gives the model's logits, tried on a few tokens.

    Some families scale or cap their logits after the head (Gemma 2, Cohere, Granite), some rule out tokens, and a
    wrapper may mix two models. The trial finds out, so that no list of such models has to be kept.

    Args:
        model: The model, in evaluation mode and without gradients, so that dropout does not tell the two apart.
        backbone: Its backbone, see `backbone_and_head`.
        head: From hidden states ``[T, H]`` to logits ``[T, V]``.
        inputs: ``input_ids`` and, if there is padding, ``attention_mask``, ``[B, T]``.
    """
    trial = _trial(inputs)
    expected = model(**trial).logits[0]
    hidden = backbone(**trial, use_cache=False).last_hidden_state[0]
    found = head(hidden)
    return agree(found, expected, exact=expected.dtype in EXACT and hidden.dtype == expected.dtype)


def beside_the_parts(
    model: nn.Module, backbone: nn.Module, head: nn.Module, inputs: Mapping[str, Tensor]
) -> str | None:
    """What a model does besides its backbone and its head, though a trial may not show it yet; None if nothing.

    What starts at zero changes no logit before it is trained, and dropout none in evaluation mode.

    Args:
        model: The model.
        backbone: Its backbone, see `backbone_and_head`.
        head: Its output embeddings.
        inputs: As `gives_logits` takes them.
    """
    core: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore[reportCallIssue]
    parts: tuple[Any, ...] = (core, head)
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return "it or its head has forward hooks"
    inside = {*backbone.modules(), *head.modules()}
    drops = (nn.Dropout, nn.Dropout1d, nn.AlphaDropout)
    for name, part in core.named_modules():
        if part not in inside and isinstance(part, drops) and part.p > 0.0:
            return f"{name} drops numbers outside of backbone and head"
    reached = {id(weight) for part in inside for weight in part.parameters(recurse=False)}
    others = {name: each for name, each in core.named_parameters() if each.requires_grad and id(each) not in reached}
    if not others:
        return None
    with torch.enable_grad():
        logits = model(**_trial(inputs)).logits
    if not logits.requires_grad:
        return None
    found: Any = torch.autograd.grad(logits.float().sum(), list(others.values()), allow_unused=True)
    used = [name for name, gradient in zip(others, found, strict=True) if gradient is not None]
    return f"its weight {used[0]} is in neither backbone nor head" if used else None


def _trial(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:1, :_TRIAL_TOKENS] for name, tensor in inputs.items()}


def agree(found: Tensor, expected: Tensor, *, exact: bool) -> bool:
    """Whether two ways to a model's logits give the same up to rounding; `exact` for float32 all the way."""
    # The logits are compared and not a loss of them, because a token that a family rules out may change no loss. The
    # tolerance is relative to their spread, which the size of a model's logits does not change: 1e-4 is far above
    # float32 rounding and far below a cap or a scale that matters, and 2e-2 leaves room for half-precision rounding.
    # Ruled-out tokens with a logit of minus infinity do not count: with an infinite tolerance everything would agree.
    finite = expected.float()[expected.isfinite()]
    spread = float(finite.amax() - finite.amin()) if len(finite) else 0.0
    tolerance = (1e-4 if exact else 2e-2) * spread
    return torch.allclose(found.float(), expected.float(), rtol=0.0, atol=tolerance, equal_nan=True)
