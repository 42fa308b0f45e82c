"""Batches without padding: several texts in a row of tokens, and what they begin with in common read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.evaluation.trees import ROW_TOKENS, collate_trees, common_beginning, tree_of

_WORTH = 0.9
"""Rows with more than this share of the padded batch's tokens gain too little for the larger mask."""
_MASK = 2**24
"""Numbers of the mask, of which attention keeps 4 bytes each for the backward pass: rows that take more stay padded."""


class Rows(NamedTuple):
    """A batch of B texts of at most T tokens as R rows of W tokens.

    Attributes:
        inputs: `input_ids` and `position_ids`, `[R, W]`, and `attention_mask`, `[R, 1, W, W]`, of the backbone.
        places: where each token of the batch is in the flattened rows, `[B, T]`; 0 for padding, whose states nothing
            may read.
    """

    inputs: dict[str, Tensor]
    places: Tensor

    def farthest(self, real: Tensor) -> Tensor:
        """The place of the text whose end is farthest from the beginning of its row, `[1]`.

        Args:
            real: `[B, T]`, false where padding is.
        """
        within = (self.places % self.inputs["input_ids"].shape[1]).masked_fill(~real, 0)
        return within.amax(1).argmax()[None]


def rows_without_padding(batch: Mapping[str, Tensor], dtype: torch.dtype, *, together: bool = False) -> Rows | None:
    """The texts of a batch in as few tokens as possible.

    A batch of questions in a chat template has the system prompt once for each of them, and padding up to its longest
    answer. In a tree (`evaluation.trees`) each token sees its own text and no other, at its own position: the states
    are those of the padded batch up to rounding, and so are gradients. Rows are about as long as each other, and about
    as long as 256 tokens or the longest text, because attention's cost grows with the square of the length.

    Args:
        batch: `input_ids` and `attention_mask`, `[B, T]`.
        dtype: of the mask of attention.
        together: all texts in one row, also where that saves nothing.

    Returns:
        The rows; None if they would save less than a tenth of the tokens, or their mask take more than 64 MiB.

    Cost: the tokens travel to the CPU, where the rows are made.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 0], [5, 6, 8, 9]])
        >>> rows = rows_without_padding({"input_ids": ids, "attention_mask": (ids > 0).long()}, torch.float32)
        >>> rows.inputs["input_ids"], rows.places
        (tensor([[5, 6, 8, 9, 7]]), tensor([[0, 1, 4, 0],
                [0, 1, 2, 3]]))
    """
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    size, device = ids.numel(), ids.device
    seen = real.cpu()
    texts = [row[kept].tolist() for row, kept in zip(ids.cpu(), seen, strict=True)]
    rows = [list(range(len(texts)))] if together else _balanced(texts)
    trees = [tree_of([texts[place] for place in row]) for row in rows]
    width = max(len(tree.tokens) for tree in trees)
    if not together and (len(trees) * width > _WORTH * size or len(trees) * width**2 > _MASK):
        return None
    made = collate_trees(trees, 0, dtype)
    places = torch.zeros(ids.shape, dtype=torch.long)
    for number, (row, tree) in enumerate(zip(rows, trees, strict=True)):
        for place, path in zip(row, tree.paths, strict=True):
            places[place, seen[place]] = torch.tensor(path, dtype=torch.long) + number * width
    return Rows({name: tensor.to(device) for name, tensor in made.items()}, places.to(device))


def _balanced(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of the texts in rows of similar length: the longest text first, each into the shortest row."""
    longest = max(texts, key=len)
    common = min((common_beginning(longest, text) for text in texts if text), default=0)
    own = [max(0, len(text) - common) for text in texts]
    room = max(1, max(ROW_TOKENS, len(longest)) - common)
    count = min(len(texts), max(1, round(sum(own) / room)))
    rows: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for place in sorted(range(len(texts)), key=lambda place: own[place], reverse=True):
        shortest = sizes.index(min(sizes))
        rows[shortest].append(place)
        sizes[shortest] += own[place]
    return [row for row in rows if row]


def two_texts(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Places of the longest text and of the shortest that is another one, `[2]`; None if all texts are the same."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    lengths = real.sum(1)
    longest = int(lengths.argmax())
    others = ((ids != ids[longest]) | (real != real[longest])).any(1)
    if not bool(others.any()):
        return None
    other = int(torch.where(others, lengths, lengths.max() + 1).argmin())
    return torch.tensor([longest, other], device=ids.device)


def has_dropout(model: nn.Module) -> bool:
    """Whether training draws at random what it leaves out: texts that share tokens would share the draws."""
    if any(isinstance(part, (nn.Dropout, nn.Dropout1d, nn.AlphaDropout)) and part.p > 0.0 for part in model.modules()):
        return True
    config: Any = getattr(model, "config", None)
    # Hugging Face's attention takes its dropout from the configuration, without a module.
    settings = vars(config.get_text_config()) if hasattr(config, "get_text_config") else {}
    return any(
        isinstance(value, float) and value > 0.0 and ("dropout" in name or name.endswith("pdrop"))
        for name, value in settings.items()
    )
