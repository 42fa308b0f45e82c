"""Texts that begin alike as one row of tokens, in which every common beginning is read once.

A question with an answer, a paraphrase and five wrong answers is seven texts with one prompt, and wrong answers begin
like right ones. In a tree each token sees the tokens on its way to the root and no others, and has the position that it
has in its text, so that a model's hidden states are those of the texts one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROW_TOKENS = 256
"""Trees with a common beginning, such as a chat template's first turn, share a row up to this length: attention's cost
grows with the square of the length, and is a tenth of all there."""


class Tree(NamedTuple):
    """Some texts as one row of T tokens.

    Attributes:
        tokens: the tokens, each behind the one before it in its text, `[T]`.
        parents: the place in the row of the token before; -1 for the first one of a text, `[T]`.
        paths: for each text the places of its tokens.
    """

    tokens: list[int]
    parents: list[int]
    paths: list[list[int]]


def tree_of(texts: Sequence[Sequence[int]]) -> Tree:
    """Merges the common beginnings of texts.

    Example:
        >>> tree_of([[5, 6, 7], [5, 6, 8]])
        Tree(tokens=[5, 6, 7, 8], parents=[-1, 0, 1, 1], paths=[[0, 1, 2], [0, 1, 3]])
    """
    tree = Tree([], [], [])
    places: dict[tuple[int, int], int] = {}
    for text in texts:
        path: list[int] = []
        for token in text:
            parent = path[-1] if path else -1
            place = places.setdefault((parent, token), len(tree.tokens))
            if place == len(tree.tokens):
                tree.tokens.append(token)
                tree.parents.append(parent)
            path.append(place)
        tree.paths.append(path)
    return tree


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with in common.

    Example:
        >>> common_beginning([5, 6, 7], [5, 6, 8, 9])
        2
    """
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def rows_of(groups: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Divides groups of texts into rows. Groups share one of up to `ROW_TOKENS` if that saves a tenth of their tokens.

    Returns:
        For each row the places of its groups. A group is never divided.
    """
    rows: list[list[int]] = []
    filled: list[Sequence[int]] = []
    held = 0
    for place in sorted(range(len(groups)), key=lambda place: max(map(len, groups[place]), default=0)):
        alone = len(tree_of(groups[place]).tokens)
        size = len(tree_of([*filled, *groups[place]]).tokens) if held + 0.1 * alone <= ROW_TOKENS else ROW_TOKENS + 1
        if rows and size <= min(ROW_TOKENS, held + 0.9 * alone):
            rows[-1].append(place)
            filled, held = [*filled, *groups[place]], size
        else:
            rows.append([place])
            filled, held = list(groups[place]), alone
    return rows


def collate_trees(trees: Sequence[Tree], pad_token_id: int, dtype: torch.dtype, before: int = 0) -> dict[str, Tensor]:
    """Pads trees on the right into one batch.

    Args:
        trees: B of them.
        pad_token_id: fills up shorter rows; these tokens see themselves alone, and no other token sees them.
        dtype: of the mask, the model's own.
        before: tokens in the model's cache, which stand in front of every tree and which all its tokens see.

    Returns:
        `input_ids` and `position_ids`, int64 `[B, longest]`, and `attention_mask`, 0 where a token is seen and the
        lowest number elsewhere, `[B, 1, longest, before + longest]`.
    """
    longest = max(len(tree.tokens) for tree in trees)
    input_ids = torch.full((len(trees), longest), pad_token_id)
    positions = torch.zeros_like(input_ids)
    seen = torch.eye(longest, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, tree in enumerate(trees):
        input_ids[row, : len(tree.tokens)] = torch.tensor(tree.tokens)
        depths: list[int] = []
        for parent in tree.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else before)
        for path in tree.paths:
            places = torch.tensor(path, dtype=torch.long)
            seen[row, places[:, None], places] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        positions[row, : len(depths)] = torch.tensor(depths)
    seen = torch.nn.functional.pad(seen, (before, 0), value=True)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask.unsqueeze(1)}
