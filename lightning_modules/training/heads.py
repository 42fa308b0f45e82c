"""Losses at a batch's answer tokens, through the fused head where the model allows it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradsurgery as gs
from lightning_modules.evaluation.heads import EXACT, agree, backbone_and_head, beside_the_parts, gives_logits
from lightning_modules.evaluation.likelihood import evaluation_mode, exactly
from lightning_modules.training.padding_free import Rows, has_dropout, rows_without_padding, two_texts

Batch = Mapping[str, Tensor]

_TRIED = 32
"""Last tokens of a text whose logits are compared."""


class States(NamedTuple):
    """What a loss is computed from: hidden states ``[B, T, H]`` and their head, or logits ``[B, T, V]`` and None."""

    values: Tensor
    head: gs.losses.Head | None


class AnswerHead:
    """The model in two parts, backbone and head, so that only answer tokens go through the head.

    The logits of all tokens, ``[B, T, V]``, are then never held. A Hugging Face model whose head is a plain `nn.Linear`
    is split; how its logits are scaled and capped (Gemma 2, Cohere, Granite) is read from its configuration. On the
    first batch both ways are compared on a few tokens. Any other model computes its own logits, and a warning says so
    once: FSDP's shards, adapters in the head, or a family that computes its logits in another way.

    Args:
        model: Maps `input_ids` and `attention_mask` to an output with `logits [B, T, V]`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._backbone: nn.Module | None = None
        self._tried = False
        self._compiles = False
        self._run: Any = None
        self._packs = False
        self._packable = 0, 0  # so long a text, and so long a row, has been read without padding, with the same logits
        self._unpackable = math.inf  # and so long a text with others

    def compile(self) -> None:
        """Have `torch.compile` make one program of the backbone, or of a model that is not split, for any shapes.

        The first step then takes long, half a minute for the small Llama. Only what runs through this head is compiled:
        `model` itself, its `state_dict`, its scores and its generated answers stay as they were. Losses differ in the
        last digits. A graph that is kept for several backward passes (`retain_inside`) cannot be compiled.

        Raises:
            RuntimeError: In the first step, by PyTorch, where the compiler is missing: a C++ compiler on a CPU, Triton
                on a GPU.
        """
        self._compiles = True

    def pack(self) -> None:
        """Read the texts of a batch without padding, and what they begin with in common once (`padding_free`).

        States and gradients are the same up to rounding. That is tried out on three texts of a batch whose texts or
        rows are longer than those before: attention may have a window that only these leave. A model that cannot read
        texts in that way goes on with padding, and so do one that is not split, one with dropout, one that is compiled,
        a batch whose texts are all the same, and one with hardly any padding.
        """
        self._packs = True

    @property
    def packs(self) -> bool:
        """Whether `pack` was called."""
        return self._packs

    def states(self, batch: Batch, *, split: bool = True) -> States:
        """Run the model: hidden states and head, or logits where that is not possible or not wanted."""
        inputs = _inputs(batch)
        if not self._tried:
            self._tried = True
            self._backbone = self._try(inputs)
            self._run = self.model if self._backbone is None else self._backbone
            if self._compiles:
                self._run = torch.compile(self._run, dynamic=True)
        if self._backbone is None:
            return States(self._run(**inputs).logits, None)
        if not split:
            return States(self.model(**inputs).logits, None)
        packed = self._packed(batch)
        if packed is not None:
            return States(packed, self._head())
        return States(self._run(**inputs, use_cache=False).last_hidden_state, self._head())

    def _packed(self, batch: Batch) -> Tensor | None:
        """Hidden states of the batch, `[B, T, H]`, read without padding; None where it is to be read with padding."""
        if not self._packs or self._compiles:
            return None
        longest = int(batch["attention_mask"].sum(1).max())
        if longest >= self._unpackable:
            return None
        if self.model.training and has_dropout(self.model):
            return None
        chosen = two_texts(batch)
        if chosen is None:
            return None
        rows = self._rows(batch)
        if rows is None:
            return None
        width = rows.inputs["input_ids"].shape[1]
        if longest > self._packable[0] or width > self._packable[1]:
            if not self._same_in_a_row(batch, chosen, rows):
                self._unpackable = longest
                return None
            self._packable = max(longest, self._packable[0]), max(width, self._packable[1])
        return self._read(rows)

    def _rows(self, batch: Batch, *, together: bool = False) -> Rows | None:
        kinds = (weight.dtype for weight in self.model.parameters() if weight.is_floating_point())
        return rows_without_padding(batch, next(kinds, torch.float32), together=together)

    def _read(self, rows: Rows) -> Tensor:
        hidden = self._run(**rows.inputs, use_cache=False).last_hidden_state
        # Not by indexing: its backward pass adds up tokens that several texts share in an order that may change.
        return nn.functional.embedding(rows.places, hidden.flatten(0, 1))

    def _same_in_a_row(self, batch: Batch, chosen: Tensor, rows: Rows) -> bool:
        """Whether two texts have the same logits in one row, and the text that ends farthest in a row of the batch.

        It is tried without autocast, whose rounding hides differences.
        """
        pair = self._rows({name: tensor[chosen] for name, tensor in _inputs(batch).items()}, together=True)
        tried = torch.cat([chosen, rows.farthest(batch["attention_mask"].bool())])
        trial = {name: tensor[tried] for name, tensor in _inputs(batch).items()}
        real = trial["attention_mask"].bool()
        last = real & (real.flip(1).cumsum(1).flip(1) <= _TRIED)  # of many tokens the logits would be too many
        with evaluation_mode(self.model), exactly(self.model):
            expected = logits_of(self._run(**trial, use_cache=False).last_hidden_state[last], self._head())
            try:
                if pair is None:
                    return False
                states = torch.cat([self._read(pair), self._read(rows)[tried[2:]]])
                found = logits_of(states[last], self._head())
            except torch.OutOfMemoryError:
                raise
            except Exception:  # code of the model's own may raise anything where it takes no positions, or no such mask
                return False
        return agree(found, expected, exact=expected.dtype in EXACT)

    def hidden(self, batch: Batch, layer: int) -> Tensor:
        """Hidden states ``[B, T, H]`` after a layer, counted as in `output_hidden_states`.

        A model that has a backbone computes no logits for them.
        """
        parts = backbone_and_head(self.model)
        if parts is None:
            return self.model(**_inputs(batch), output_hidden_states=True).hidden_states[layer]
        return parts[0](**_inputs(batch), use_cache=False, output_hidden_states=True).hidden_states[layer]

    def splits(self) -> bool:
        """Whether the model has turned out to be split; known after the first batch."""
        return self._backbone is not None

    def _head(self) -> gs.losses.Head:
        """The head as it is now: training changes its tensors, and a strategy may have replaced them."""
        parts = backbone_and_head(self.model)
        if parts is None:
            raise RuntimeError("the model lost its output embeddings while training; make a new UnlearningModule of it")
        head: Any = parts[1]
        config: Any = getattr(self.model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return gs.losses.Head(head.weight, head.bias, scale, getattr(config, "final_logit_softcapping", None))

    def _try(self, inputs: Batch) -> nn.Module | None:
        """The backbone, if backbone and head give the model's logits."""
        parts = backbone_and_head(self.model)
        reason = "it has no backbone and output embeddings to tell apart, or its weights are sharded"
        if hasattr(self.model, "_orig_mod"):
            reason = "it is compiled as a whole; compile its backbone instead, by head.compile()"
        elif parts is not None and type(parts[1]) is not nn.Linear:
            reason = f"its head is a {type(parts[1]).__name__} and not a plain Linear"
        elif parts is not None and (beside := beside_the_parts(self.model, *parts, inputs)):
            reason = beside
        elif parts is not None:
            with evaluation_mode(self.model), exactly(self.model):
                if gives_logits(self.model, parts[0], lambda hidden: logits_of(hidden, self._head()), inputs):
                    return parts[0]
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
        loss: A loss of a token or a row, see `gradsurgery.losses.Loss.of`.
        states: Of the model.
        labels: `[B, T]`.
        skip_first: Answer tokens left out at the start of each answer.
        reference: States of the reference model, with a head if `states` has one; only for a loss that compares with
            them.
        again: Whether the values will be weighted token by token, so that the gradients are made in the backward pass.
    """
    values, tokens = gs.losses.answer_tokens(states.values, labels, skip_first=skip_first)
    others = None
    if reference is not None:
        others, _ = gs.losses.answer_tokens(reference.values.detach(), labels, skip_first=skip_first)
    if states.head is None:
        return gs.losses.Loss.of(loss)(values, tokens, *(() if others is None else (others,))), tokens
    bound = gs.losses.Loss.of(
        loss,
        reference=None if others is None or reference is None else gs.losses.Reference(others, reference.head),
        recompute=again and states.head.weight.requires_grad,
    )
    return gs.losses.linear(values, states.head, tokens, bound), tokens


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def logits_of(hidden: Tensor, head: gs.losses.Head | None) -> Tensor:
    """The logits of hidden states; without a head they are logits already (`States`)."""
    if head is None:
        return hidden
    logits = head.scale * nn.functional.linear(hidden, head.weight.to(hidden.dtype), head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
