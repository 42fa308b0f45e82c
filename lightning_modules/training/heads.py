"""Losses at a batch's answer tokens, through the fused head where the model allows it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradsurgery as gs
from lightning_modules.evaluation.likelihood import _backbone_and_head, evaluation_mode

Batch = Mapping[str, Tensor]
_TRIAL_TOKENS = 32


class States(NamedTuple):
    """What a loss is computed from: hidden states ``[B, T, H]`` with their head, or logits ``[B, T, V]`` without one."""

    values: Tensor
    head: Head | None


class Head(NamedTuple):
    """A language-model head: `gradsurgery.losses.linear` takes its parts."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


class AnswerHead:
    """The model in two parts, backbone and head, so that only answer tokens go through the head and no logits of all tokens are held.

    A Hugging Face model whose head is a plain `nn.Linear` is split; scaled and capped logits (Gemma 2, Cohere, Granite) are known from its
    configuration. On the first batch, both ways are compared on a few tokens. Any other model (FSDP's shards, adapters in the head, a
    family whose logits are made otherwise) computes its own logits, and a warning says so once.

    Args:
        model: Maps `input_ids` and `attention_mask` to an output with `logits [B, T, V]`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._backbone: nn.Module | None = None
        self._tried = False

    def states(self, batch: Batch, *, split: bool = True) -> States:
        """Run the model: hidden states and head, or logits where that is not possible or not wanted."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if not self._tried:
            self._tried = True
            self._backbone = self._found(inputs)
        if self._backbone is None or not split:
            return States(self.model(**inputs).logits, None)
        return States(self._backbone(**inputs, use_cache=False).last_hidden_state, self._head())

    def hidden(self, batch: Batch, layer: int) -> Tensor:
        """Hidden states ``[B, T, H]`` after a layer, as `output_hidden_states` counts them; no logits are made where the model splits."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        parts = _backbone_and_head(self.model)
        if parts is None:
            return self.model(**inputs, output_hidden_states=True).hidden_states[layer]
        return parts[0](**inputs, use_cache=False, output_hidden_states=True).hidden_states[layer]

    def splits(self) -> bool:
        """Whether the model was found to allow it; known after the first batch."""
        return self._backbone is not None

    def _head(self) -> Head:
        parts = _backbone_and_head(self.model)
        if parts is None:
            raise RuntimeError("the model lost its output embeddings while training; make a new UnlearningModule of it")
        head: Any = parts[1]
        config: Any = getattr(self.model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return Head(head.weight, head.bias, scale, getattr(config, "final_logit_softcapping", None))

    def _found(self, inputs: Batch) -> nn.Module | None:
        """The backbone, if backbone and head give the model's logits."""
        parts = _backbone_and_head(self.model)
        reason = "it has no backbone and output embeddings to tell apart, or its weights are sharded"
        if hasattr(self.model, "_orig_mod"):
            reason = "it is compiled as a whole; compile its backbone instead"
        elif parts is not None and type(parts[1]) is not nn.Linear:
            reason = f"its head is a {type(parts[1]).__name__} and not a plain Linear"
        elif parts is not None:
            backbone, _ = parts
            trial = {name: tensor[:1, :_TRIAL_TOKENS] for name, tensor in inputs.items()}
            with evaluation_mode(self.model):
                expected = self.model(**trial).logits[0]
                hidden, head = backbone(**trial, use_cache=False).last_hidden_state[0], self._head()
                found = head.scale * nn.functional.linear(hidden, head.weight.to(hidden.dtype), head.bias)
                if head.softcap is not None:
                    found = head.softcap * torch.tanh(found / head.softcap)
            # The logits themselves, and not a loss of them: a token that a family rules out may change none.
            spread = float(expected.float().amax() - expected.float().amin())
            exact = expected.dtype in (torch.float32, torch.float64) and hidden.dtype == expected.dtype
            if torch.allclose(
                found.float(), expected.float(), rtol=0.0, atol=(1e-4 if exact else 2e-2) * spread, equal_nan=True
            ):
                return backbone
            reason = "its logits are not its head of its last hidden states"
        warnings.warn(
            f"{type(self.model).__name__} computes all its logits, [tokens, vocabulary]: {reason}. Losses are the same, memory is not.",
            stacklevel=2,
        )
        return None


def answer_values(
    loss: Any,
    states: States,
    labels: Tensor,
    *,
    skip_first: int = 0,
    reference: States | None = None,
    again: bool = False,
) -> tuple[Tensor, Tensor]:
    """A loss's values at the answer tokens, and those tokens, both `[N]`.

    Args:
        loss: Of logits and labels, and of reference logits if there is a reference.
        states: Of the model.
        labels: `[B, T]`.
        skip_first: Answer tokens left out at the start of each answer.
        reference: States of the reference model, with a head if `states` has one.
        again: The values will be weighted token by token: make the gradients in the backward pass.
    """
    values, tokens = gs.losses.answer_tokens(states.values, labels, skip_first=skip_first)
    others = None
    if reference is not None:
        others, _ = gs.losses.answer_tokens(reference.values.detach(), labels, skip_first=skip_first)
    if states.head is None:
        return (loss(values, tokens) if others is None else loss(values, tokens, others)), tokens
    head, other = states.head, None if reference is None else reference.head
    return gs.losses.linear(
        values,
        head.weight,
        tokens,
        loss,
        head.bias,
        scale=head.scale,
        softcap=head.softcap,
        reference_hidden=others,
        reference_weight=None if other is None else other.weight,
        reference_bias=None if other is None else other.bias,
        recompute=again and head.weight.requires_grad,
    ), tokens
