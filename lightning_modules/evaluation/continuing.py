"""Greedy answers that go on from what the scoring of their true answers has left in the model's key-value cache.

Scoring reads the prompt of an answer and as much of the answer as greedy decoding says, see `evaluation.drafts`. Their
keys and values are kept until as many answers wait as are generated together; then every step reads one token of each,
and an answer that ends leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lightning_modules.evaluation.generation import Begun
from lightning_modules.evaluation.likelihood import Batch, LabelledLogits
from lightning_modules.evaluation.texts import context_length

States = list[tuple[Tensor, Tensor]]
"""Keys and values of one text in every layer, `[heads, tokens, size]` each."""

_LEAVE = 0.875  # the share of a batch that has to be left before the others' states are moved together


def continues(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> bool:
    """Whether answers may go on from a cache: not where the model's context ends before some of them may.

    Processes with shards of one model do not either, because they have to run every step together.
    """
    context = context_length(model)
    fits = context is None or max(map(len, prompts), default=0) + max_new_tokens <= context
    return fits and not any(isinstance(parameter, DTensor) for parameter in model.parameters())


class Waiting(NamedTuple):
    """An answer to go on with.

    Attributes:
        begun: its prompt and what is said already.
        states: of all these tokens but the last.
    """

    begun: Begun
    states: States


class Continuing:
    """Collects answers, and generates them some at a time.

    Args:
        logits: of the model.
        stops: the tokens that end an answer.
        max_new_tokens: the longest answer.
        batch_size: answers that are generated together.
    """

    def __init__(
        self, logits: Callable[[], LabelledLogits], stops: Collection[int], max_new_tokens: int, batch_size: int
    ) -> None:
        self.logits, self.stops = logits, stops
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.waiting: dict[int, Waiting] = {}
        self.finished: dict[int, Begun] = {}

    def add(self, place: int, waiting: Waiting) -> None:
        """Takes an answer, and generates all that wait if there are enough."""
        self.waiting[place] = waiting
        if len(self.waiting) >= self.batch_size:
            self.flush()

    def flush(self) -> None:
        """Generates the answers that wait."""
        waiting, self.waiting = self.waiting, {}
        if waiting:
            said = self._said(list(waiting.values()))
            for (place, (begun, _)), tokens in zip(waiting.items(), said, strict=True):
                self.finished[place] = Begun(begun.prompt, [*begun.said, *tokens], ended=True)

    def _said(self, waiting: Sequence[Waiting]) -> list[list[int]]:
        """The tokens that greedy decoding adds to each answer, the one that ends it included."""
        logits, device = self.logits(), waiting[0].states[0][0].device
        answers: list[list[int]] = [[] for _ in waiting]
        left = [self.max_new_tokens - len(begun.said) for begun, _ in waiting]
        steps, rows = max(left), list(range(len(waiting)))
        cache, mask = _cache_of([states for _, states in waiting], steps)
        positions = mask.sum(dim=1, keepdim=True)
        tokens = torch.tensor([[[*begun.prompt, *begun.said][-1]] for begun, _ in waiting], device=device)
        for _ in range(steps):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
            every = torch.arange(len(rows), device=device)
            tokens = logits(Batch(inputs, every[:0], every, [], cache))(every).argmax(dim=-1, keepdim=True)
            positions = positions + 1
            going_on: list[int] = []
            for number, (row, token) in enumerate(zip(rows, tokens.squeeze(1).tolist(), strict=True)):
                if left[row] > 0:
                    answers[row].append(token)
                    left[row] = 0 if token in self.stops else left[row] - 1
                if left[row] > 0:
                    going_on.append(number)
            if not going_on:
                break
            if len(going_on) <= _LEAVE * len(rows):
                kept = torch.tensor(going_on, device=device)
                cache.batch_select_indices(kept)
                mask, positions, tokens = mask[kept], positions[kept], tokens[kept]
                rows = [rows[number] for number in going_on]
        return answers


class _Growing(DynamicLayer):
    """A layer's keys and values with room for those to come, so that a step writes its own and moves no others."""

    def __init__(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.both, self.length = (keys, values), tokens
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        found = self.both[0][:, :, : self.length], self.both[1][:, :, : self.length]
        self.keys, self.values = found
        return found

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[-2]
        for whole, states in zip(self.both, (key_states, value_states), strict=True):
            whole[:, :, start : self.length] = states
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        self.both = (self.both[0][indices], self.both[1][indices])
        self._show()


def _cache_of(texts: Sequence[States], steps: int) -> tuple[DynamicCache, Tensor]:
    """A cache with a row for each text, padded on the left, and which of its places hold a token."""
    longest = max(states[0][0].shape[1] for states in texts)
    cache = DynamicCache()
    for layer, kinds in enumerate(texts[0]):
        both: list[Tensor] = []
        for kind, like in enumerate(kinds):
            whole = like.new_zeros(len(texts), like.shape[0], longest + steps, like.shape[2])
            for row, states in enumerate(texts):
                part = states[layer][kind]
                whole[row, :, longest - part.shape[1] : longest] = part
            both.append(whole)
        cache.layers.append(_Growing(both[0], both[1], longest))
    mask = torch.zeros(len(texts), longest, dtype=torch.int64, device=texts[0][0][0].device)
    for row, states in enumerate(texts):
        mask[row, longest - states[0][0].shape[1] :] = 1
    return cache, mask
