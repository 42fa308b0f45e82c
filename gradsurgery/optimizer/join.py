"""One scalar whose single backward pass captures every row: what lets a trainer that owns the loop do surgery unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Backward(NamedTuple):
    """What the scalar's backward pass does.

    Attributes:
        capture: (objective, loss, incoming gradient, whether to keep the graph) -> nothing; runs the loss's own backward pass.
        finish: incoming gradient -> nothing; called when every row is captured.
        retain_graph: Keep the graphs until the last of the inner backward passes.
    """

    capture: Callable[[str, Tensor, Tensor, bool], None]
    finish: Callable[[Tensor], None]
    retain_graph: bool


def join(objectives: Sequence[str], losses: Mapping[str, Tensor], backward: Backward) -> Tensor:
    """See `GradientSurgery.join`."""
    if set(losses) != set(objectives):
        raise ValueError(f"join: expected one loss for each of {list(objectives)}, found {list(losses)}")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"join: expected a loss of one number for {name!r}, found {found}; take its mean or sum first"
            )
    if not torch.is_grad_enabled():
        return _total(losses)  # validation: there is nothing to capture
    for name, loss in losses.items():
        if not loss.requires_grad:
            raise RuntimeError(
                f"join: expected the loss of {name!r} to depend on trainable parameters, found one without a graph"
            )
    # Protected rows first: the first objective's row, captured last, is the one that the update overwrites.
    ordered = {name: losses[name] for name in (*objectives[1:], objectives[0])}
    anchor = torch.zeros((), device=losses[objectives[0]].device, requires_grad=True)
    return _Join.apply(backward, ordered, anchor)


class _Join(torch.autograd.Function):
    """The losses are no inputs of the function: autograd would hand them one shared backward pass."""

    @staticmethod
    def forward(ctx: Any, backward: Backward, losses: dict[str, Tensor], _anchor: Tensor) -> Tensor:
        ctx.inner, ctx.losses = backward, losses
        return _total(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        losses = list(ctx.losses.items())
        for index, (name, loss) in enumerate(losses):
            keep = ctx.inner.retain_graph and index + 1 < len(losses)
            ctx.inner.capture(name, loss, gradients[0].to(loss).reshape(loss.shape), keep)
        ctx.inner.finish(gradients[0])
        return None, None, None


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    # A float64 model needs a float64 scalar: 1 / number of micro-batches comes back through its gradient.
    dtype = torch.float64 if any(loss.dtype == torch.float64 for loss in losses.values()) else torch.float32
    return torch.stack([loss.detach().to(dtype).reshape(()) for loss in losses.values()]).sum()
