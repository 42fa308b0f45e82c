"""Scores groups of texts that begin alike, such as all answers to one question, reading each beginning once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lightning_modules.data.tokenization import IGNORED, Encoded
from lightning_modules.evaluation.heads import EXACT, agree
from lightning_modules.evaluation.likelihood import (
    Batch,
    LabelledLogits,
    Summary,
    device_of,
    evaluation_mode,
    exactly,
    labelled_logits,
    padded,
    summarized,
)
from lightning_modules.evaluation.trees import Tree, collate_trees, common_beginning, rows_of, tree_of

# Tokens in a forward pass on a CPU: matrix products are as fast as they get, activations stay in its cache, and rows of
# almost one length share a pass, if any do.
_CPU_TOKENS = 256

_PREFIX = 8  # tokens from which on a common prefix is worth a pass of its own

_TRIED = 64  # answer tokens of a text by which it is decided whether trees are allowed: logits of many take much memory

_WORTH = 0.9  # of the tokens of the texts by themselves: above that share trees save less than their mask costs


class Read(NamedTuple):
    """The keys and values of a batch of trees.

    Attributes:
        found: the place of each text -> what was made of it.
        paths: the place of each text -> its row, and the places of its tokens there.
        cache: of the batch.
    """

    found: dict[int, tuple[Tensor, ...]]
    paths: dict[int, tuple[int, list[int]]]
    cache: DynamicCache

    def states(self, place: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a text's first tokens in every layer, `[heads, tokens, size]` each."""
        row, path = self.paths[place]
        layers: list[Any] = self.cache.layers
        chosen = torch.tensor(path[:tokens], device=layers[0].keys.device)
        return [(layer.keys[row][:, chosen], layer.values[row][:, chosen]) for layer in layers]


class SharedTexts:
    """Texts in groups, the batches in which a model reads them, and what is computed from their answers' logits.

    Groups are read as trees (`evaluation.trees`) where that saves a tenth of the tokens and the model allows it.
    Whether it does is tried out on the longest text and on the longest row: attention that is no softmax over what a
    mask shows (a state-space model, a window shorter than the texts or the rows, positions that cannot be given) gives
    other logits there, and then every text is a row of its own. So no list of architectures has to be kept.

    Args:
        model: a causal language model, on any device and in any dtype.
        encoded: n examples; the labelled tokens are the answer.
        groups: the places of the texts of each group, every text in one group.
        pad_token_id: fills up shorter rows; it is masked.
        batch_size: the most texts in a forward pass. On a CPU a pass has 256 tokens at most, unless one row is longer.
        batch_tokens: tokens in a forward pass, padding counted, in place of both.

    Attributes:
        prefix: how many tokens all texts begin with, such as a system prompt; they are read once in all.
        rows: the places of the texts in each row: a tree, or one text.
        batches: the rows of each forward pass, longest first.
    """

    def __init__(
        self,
        model: nn.Module,
        encoded: Sequence[Encoded],
        groups: Sequence[Sequence[int]],
        *,
        pad_token_id: int,
        batch_size: int = 32,
        batch_tokens: int | None = None,
    ) -> None:
        self.model, self.encoded, self.pad_token_id = model, encoded, pad_token_id
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.prefix = _common_prefix(encoded)
        texts = [[encoded[place].input_ids[self.prefix :] for place in group] for group in groups]
        rows = [[place for group in row for place in groups[group]] for row in rows_of(texts)]
        whole = sum(len(text.input_ids) for text in encoded)
        self.trees = self.prefix + sum(len(self._tree(row).tokens) for row in rows) <= _WORTH * whole
        if not self.trees:
            self.prefix = 0
        self.rows = rows if self.trees else [[place] for group in groups for place in group]
        self.lengths = [len(self._tree(row).tokens) for row in self.rows]
        self.batches = self._batches(self.lengths, [len(row) for row in self.rows])

    def over(
        self,
        batches: Sequence[Sequence[int]],
        summarize: Summary,
        advance: Callable[[int], object],
        read: Callable[[Read], object] | None = None,
    ) -> list[dict[int, tuple[Tensor, ...]]]:
        """Runs the model on some of the batches.

        Args:
            batches: some of `self.batches`.
            summarize: as in `likelihood.over_answer_tokens`.
            advance: called with the number of texts done, after every batch.
            read: called after every batch that was read as trees with a cache, with what is in it.

        Returns:
            For every row, in the order of the batches: the place of each of its texts -> what `summarize` made of it.
        """
        found: list[dict[int, tuple[Tensor, ...]]] = []
        with evaluation_mode(self.model):
            for batch in batches:
                places = [place for row in batch for place in self.rows[row]]
                if self._as_trees:
                    parts = [(places, self._tree_batch([self.rows[row] for row in batch], self._caches))]
                else:
                    parts = [(part, self._texts(part)) for part in self._parts(places)]
                summaries: dict[int, tuple[Tensor, ...]] = {}
                for part, prepared in parts:
                    summaries |= zip(part, summarized(self.logits, prepared, part, summarize), strict=True)
                found += [{place: summaries[place] for place in self.rows[row]} for row in batch]
                advance(len(places))
                if read is not None and self._as_trees and self._caches:
                    read(Read(summaries, self._paths(batch), parts[0][1].cache))
        return found

    @cached_property
    def logits(self) -> LabelledLogits:
        """The model's logits, see `likelihood.labelled_logits`."""
        return labelled_logits(self.model, self.encoded, self.pad_token_id)

    @property
    def _as_trees(self) -> bool:
        return self._allowed[0]

    @property
    def _caches(self) -> bool:
        return self._allowed[1]

    @cached_property
    def _allowed(self) -> tuple[bool, bool]:
        """Whether trees give the logits that the texts by themselves give, and whether they do so with a cache.

        It is tried on the longest text and a second one, and on the last text of the longest row, without autocast.
        """
        if not self.trees:
            return False, False
        with exactly(self.model):
            found = self._tried()
        if torch.is_autocast_enabled(device_of(self.model).type):
            vars(self).pop("_prefix_states", None)  # those of the trial are float32
        return found

    def _tried(self) -> tuple[bool, bool]:
        longest = max(self.encoded, key=lambda text: len(text.input_ids))
        # One that parts early, whether or not they share a row: the more tokens must not be seen, the better the trial.
        other = min(
            self.encoded, key=lambda text: (common_beginning(text.input_ids, longest.input_ids), len(text.input_ids))
        )
        # The last text of a row is the farthest from the question that it shares: a local window sees less of it.
        rows = [[self.encoded.index(longest), self.encoded.index(other)], self.rows[self.batches[0][0]]]
        expected = [self._at_last_labels(self._texts(row[-2:])) for row in rows]
        for cached in (True, False):
            try:
                batch = self._tree_batch(rows[:1], cached)
                found = [self._at_last_labels(batch), self._at_last_labels(self._tree_batch(rows[1:], cached))]
                layers = [] if batch.cache is None else batch.cache.layers
                # A model may take a cache and leave it empty, or have layers that keep something else.
                whole = not cached or (
                    bool(layers) and all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)
                )
            except Exception:  # code of the model's own may raise anything where it takes no positions, or no such mask
                continue
            if whole and all(
                agree(one, other, exact=one.dtype in EXACT) for one, other in zip(found, expected, strict=True)
            ):
                return True, cached
        return False, False

    def _at_last_labels(self, batch: Batch) -> Tensor:
        """The logits of the last answer tokens of each of a batch's last two texts."""
        ends = [*accumulate(batch.counts)][-2:]
        counts = batch.counts[-2:]
        chosen = [
            place for end, count in zip(ends, counts, strict=True) for place in range(end - min(count, _TRIED), end)
        ]
        return self.logits(batch)(batch.places[chosen])

    def _parts(self, places: Sequence[int]) -> list[list[int]]:
        """Texts of a batch of trees, as batches of texts."""
        lengths = [len(self.encoded[place].input_ids) for place in places]
        batches = self._batches(lengths, [1] * len(places))
        return [[places[index] for index in batch] for batch in batches]

    def _batches(self, lengths: Sequence[int], texts: Sequence[int]) -> list[list[int]]:
        if self.batch_tokens is not None:
            return batches_of(lengths, texts, sum(texts), self.batch_tokens)
        return batches_of(lengths, texts, self.batch_size, _CPU_TOKENS if device_of(self.model).type == "cpu" else None)

    def _tree(self, row: Sequence[int], prefix: int | None = None) -> Tree:
        start = self.prefix if prefix is None else prefix
        return tree_of([self.encoded[place].input_ids[start:] for place in row])

    def _paths(self, batch: Sequence[int]) -> dict[int, tuple[int, list[int]]]:
        """Where the tokens of each text are in the cache of a batch."""
        return {
            place: (number, [*range(self.prefix), *(self.prefix + step for step in path)])
            for number, row in enumerate(batch)
            for place, path in zip(self.rows[row], self._tree(self.rows[row]).paths, strict=True)
        }

    def _texts(self, places: Sequence[int]) -> Batch:
        return padded(self.model, [self.encoded[place] for place in places], self.pad_token_id)

    @cached_property
    def _prefix_states(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the tokens that all texts begin with, `[1, heads, tokens, size]` each."""
        tokens = torch.tensor([self.encoded[0].input_ids[: self.prefix]], device=device_of(self.model))
        cache, none = DynamicCache(), tokens.new_zeros(0)
        self.logits(Batch({"input_ids": tokens}, none, none, [], cache))
        layers: list[Any] = cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    def _cache(self, rows: int) -> DynamicCache:
        cache = DynamicCache()
        if self.prefix:
            for number, (keys, values) in enumerate(self._prefix_states):
                cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
        return cache

    def _tree_batch(self, rows: Sequence[Sequence[int]], cached: bool) -> Batch:
        """Trees as a batch: with a cache, which holds the common prefix, or with the prefix in every tree."""
        prefix = self.prefix if cached else 0
        trees = [self._tree(row, prefix) for row in rows]
        weights = (weight.dtype for weight in self.model.parameters() if weight.is_floating_point())
        dtype = next(weights, torch.float32)
        device = device_of(self.model)
        made = collate_trees(trees, self.pad_token_id, dtype, before=prefix)
        inputs = {name: tensor.to(device) for name, tensor in made.items()}
        width = inputs["input_ids"].shape[1]
        labels: list[int] = []
        places: list[int] = []
        counts: list[int] = []
        for number, (row, tree) in enumerate(zip(rows, trees, strict=True)):
            for place, path in zip(row, tree.paths, strict=True):
                said = [step for step, label in enumerate(self.encoded[place].labels) if step and label != IGNORED]
                labels += [self.encoded[place].labels[step] for step in said]
                places += [number * width + path[step - 1 - prefix] for step in said]
                counts.append(len(said))
        cache = self._cache(len(rows)) if cached else None
        return Batch(inputs, torch.tensor(labels, device=device), torch.tensor(places, device=device), counts, cache)


def batches_of(
    lengths: Sequence[int], texts: Sequence[int], batch_size: int, batch_tokens: int | None = None
) -> list[list[int]]:
    """Divides rows into batches, longest first.

    Args:
        lengths: of the rows, in tokens.
        texts: how many texts each row has.
        batch_size: texts in a batch; a row of more is a batch by itself.
        batch_tokens: tokens in a batch too, padding counted; a longer row is a batch by itself.

    Example:
        >>> batches_of([3, 9, 4], [1, 1, 1], batch_size=2)
        [[1, 2], [0]]
        >>> batches_of([3, 9, 4], [1, 1, 1], batch_size=2, batch_tokens=12)
        [[1], [2, 0]]
    """
    batches: list[list[int]] = []
    held = width = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        rows = len(batches[-1]) + 1 if batches else 0
        fits = held + texts[row] <= batch_size and (batch_tokens is None or rows * width <= batch_tokens)
        if batches and fits:
            batches[-1].append(row)
            held += texts[row]
        else:
            batches.append([row])
            held, width = texts[row], lengths[row]
    return batches


def _common_prefix(encoded: Sequence[Encoded]) -> int:
    """How many tokens all texts begin with, none of which predicts a label; 0 if they are too few to be worth it."""
    if not encoded:
        return 0
    first = [next((step for step, label in enumerate(text.labels) if step and label != IGNORED), 0) for text in encoded]
    common = min(common_beginning(encoded[0].input_ids, text.input_ids) for text in encoded)
    prefix = min(common, *(step - 1 for step in first))
    return prefix if prefix >= _PREFIX else 0
