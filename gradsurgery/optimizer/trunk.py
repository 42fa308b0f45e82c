"""Trunk: losses that are computed from the same features run their heads backward one by one, and the trunk after them.

The graph of every head is freed before the first row of the trunk is made. What the heads send back to the features,
one cotangent for each loss, then goes through the trunk one after another, or all at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Features: TypeAlias = Tensor | Sequence[Tensor]
"""What losses are computed from: a tensor, or several."""

_Edge: TypeAlias = tuple[Any, int]
"""A node of the graph and the number of one of its outputs."""


class Shared(NamedTuple):
    """What losses share, as `GradientSurgery.join` was told.

    Attributes:
        features: The tensors that all losses are computed from.
        batched: Whether the cotangents go through the trunk all at once.
        reduced: Whether DDP or FSDP2 reduces every backward pass, and counts on whole ones.
    """

    features: Features
    batched: bool
    reduced: bool


class Trunk:
    """What lies before the features, and what lies behind them for each loss.

    Args:
        shared: What the losses share.
        losses: Those that were computed, by objective.

    Attributes:
        features: The features.
        batched: Whether the cotangents go through the trunk all at once.
        whole: Why heads and trunk cannot run apart, so that each loss needs one whole backward pass; None if they can.

    Raises:
        ValueError: If the features are no tensors, or the same one twice.
        RuntimeError: If the features have no graph, a loss is not computed from them, or ``batched`` is asked for where
            heads and trunk cannot run apart.
    """

    def __init__(self, shared: Shared, losses: Mapping[str, Tensor]) -> None:
        self.features = _checked(shared.features)
        self.batched = shared.batched
        cut = [_edge(feature) for feature in self.features]
        if len(set(cut)) < len(cut):
            raise ValueError("join: expected distinct features, found the same tensor twice; name each once")
        before, met = _leaves(chain.from_iterable(_behind(node) for node in dict(cut)), cut)
        behind = {}
        for name, loss in losses.items():
            behind[name], found = _leaves([_edge(loss)], cut)
            if not found:
                raise RuntimeError(
                    f"join: expected the loss of {name!r} to be computed from features, found a graph that does not contain them; give the "
                    "tensor itself that the heads take (a slice or a copy of it is another), or leave features out"
                )
        self._before = list(before.values())
        self._behind = {name: list(leaves.values()) for name, leaves in behind.items()}
        self._heads: dict[str, _Head] = {}
        self._rows: dict[str, list[Tensor | None]] = {}
        both = [leaf for leaves in behind.values() for key, leaf in leaves.items() if key in before]
        self.whole = _why_whole(self.features, [*self._before, *chain(*self._behind.values())], both, bool(met))
        if shared.reduced:
            self.whole = "gradients that DDP or FSDP2 reduces in every backward pass"
        if self.batched and self.whole is not None:
            raise RuntimeError(
                f"join: expected a trunk that runs apart from the heads with batched=True, found {self.whole}; leave batched out, and each "
                "loss gets a whole backward pass"
            )

    def run_heads(self, losses: Mapping[str, Tensor], gradient: Tensor, *, keep_graph: bool) -> None:
        """Run the head of every loss backward, and, batched, the trunk. Nothing is written to ``.grad``.

        Args:
            losses: In the order in which `write` will be called.
            gradient: Of each loss.
            keep_graph: Whether the heads share a graph, which is kept until the last of them.

        Raises:
            RuntimeError: If an operation of the trunk cannot take several cotangents at once.
        """
        number, last = len(self.features), list(losses)[-1:]
        for name, loss in losses.items():
            leaves = self._behind[name]
            found = torch.autograd.grad(
                loss,
                (*self.features, *leaves),
                gradient.to(loss).reshape(loss.shape),
                retain_graph=keep_graph and name not in last,
                allow_unused=True,
            )
            self._heads[name] = _Head(list(found[:number]), list(found[number:]))
        if self.batched:
            self._rows = dict(zip(self._heads, self._run_batched(), strict=True))

    def write(self, name: str) -> None:
        """Add the gradients of one loss to ``.grad``, after a backward pass of the trunk where that did not run yet."""
        head = self._heads.pop(name)
        for index, leaf in enumerate(self._behind[name]):
            gradient, head.gradients[index] = head.gradients[index], None
            if gradient is not None:
                torch.autograd.backward(leaf, gradient)  # adds a copy, as what autograd found may be shared
        if self.batched:
            for leaf, gradient in zip(self._before, self._rows.pop(name), strict=False):
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
            return
        reached = [pair for pair in zip(self.features, head.cotangents, strict=True) if pair[1] is not None]
        if reached:
            features, cotangents = zip(*reached, strict=True)
            torch.autograd.backward(features, cotangents, retain_graph=bool(self._heads))

    def _run_batched(self) -> list[list[Tensor | None]]:
        """What each loss gives the leaves before the features, by one backward pass of the trunk."""
        rows: list[list[Tensor | None]] = [[] for _ in self._heads]
        columns = [
            (feature, torch.stack([torch.zeros_like(feature) if part is None else part for part in parts]))
            for feature, *parts in zip(self.features, *(head.cotangents for head in self._heads.values()), strict=True)
            if any(part is not None for part in parts)
        ]
        if not columns:
            return rows
        features, cotangents = zip(*columns, strict=True)
        try:
            stacks: list[Tensor | None] = list(
                torch.autograd.grad(features, self._before, cotangents, allow_unused=True, is_grads_batched=True)
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "join: expected a trunk whose backward pass takes several cotangents at once (torch.vmap) with batched=True, found an "
                f"operation that does not ({str(error).splitlines()[0]}); leave batched out; zero_grad() recovers"
            ) from error
        for index, leaf in enumerate(self._before):
            # A row is no part of a stack, which would live as long as any of its rows. Each is freed when it is copied.
            stack, stacks[index] = stacks[index], None
            parts = [None] * len(rows) if stack is None else stack.unbind()
            for row, part in zip(rows, parts, strict=True):
                row.append(None if part is None else torch.empty_like(leaf).copy_(part))
        return rows


class _Head(NamedTuple):
    """What the backward pass of one loss's head gave; None where the loss does not depend on it.

    Attributes:
        cotangents: The gradient of each of the features.
        gradients: The gradient of each leaf behind them.
    """

    cotangents: list[Tensor | None]
    gradients: list[Tensor | None]


def _checked(features: Features) -> tuple[Tensor, ...]:
    found: tuple[Any, ...] = tuple(features) if isinstance(features, (tuple, list)) else (features,)
    if not found or not all(isinstance(feature, Tensor) for feature in found):
        raise ValueError(
            f"join: expected features to be a tensor or several, found {[type(feature).__name__ for feature in found]}; give the hidden "
            "states that the losses are computed from"
        )
    for feature in found:
        if feature.grad_fn is None:
            what = "a leaf" if feature.requires_grad else "one without a gradient"
            raise RuntimeError(
                f"join: expected features that a trunk computed from trainable parameters, found {what} of shape {list(feature.shape)}; "
                "give the tensor as the model returned it, not detached, or leave features out"
            )
    return found


def _edge(tensor: Tensor) -> _Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _behind(node: Any) -> Iterator[_Edge]:
    return (edge for edge in node.next_functions if edge[0] is not None)


def _leaves(start: Any, cut: Collection[_Edge]) -> tuple[dict[int, Tensor], set[_Edge]]:
    """The leaves that a graph reaches without passing one of the edges ``cut``, by their id, and those of these met."""
    cut, leaves, met, seen, todo = set(cut), {}, set(), set(), list(start)
    while todo:
        edge = todo.pop()
        if edge in cut:
            met.add(edge)
            continue
        node = edge[0]
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves[id(leaf)] = leaf
        todo.extend(_behind(node))
    return leaves, met


def _why_whole(
    features: Sequence[Tensor], leaves: Sequence[Tensor], both: Sequence[Tensor], nested: bool
) -> str | None:
    """Why each loss needs a whole backward pass; None if heads and trunk can run apart."""
    if both:
        return (
            f"a tensor of shape {list(both[0].shape)} both before and behind the features, as an embedding that is the head too is, or "
            "reached around them"
        )
    if nested:
        return "features that are computed from one another"
    if any(feature.retains_grad or feature._backward_hooks for feature in features):
        return "features with a hook or retain_grad()"
    if any(leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None) for leaf in leaves):
        return "parameters with hooks"
    return None
