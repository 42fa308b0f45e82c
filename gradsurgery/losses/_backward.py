"""What the backward passes of losses, written by hand, ask of the gradient that they are given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def check_first_derivative() -> None:
    """Refuse create_graph=True, inside a backward pass whose numbers have no graph.

    ``once_differentiable`` would let such a gradient pass as a constant wherever nobody asks for its own graph: second
    derivatives of a sum or a mean would lack this loss without a word.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "backward: expected a first derivative, found create_graph=True; losses of gradsurgery have no second one, write the "
            "loss in plain PyTorch where it is needed"
        )


def batched(gradient: Tensor) -> bool:
    """Whether it stands for many (is_grads_batched, vmap): then it has no address, and nothing takes it in place."""
    try:
        gradient.data_ptr()
    except RuntimeError:
        return True
    return False


def rowwise(gradient: Callable[[Tensor], Tensor], outer: Tensor) -> Tensor:
    """The gradient, ``[N, V]``, whose row n is a multiple of ``outer[n]``.

    Where ``outer`` stands for many, it is the gradient of ones, times each of them.
    """
    if not batched(outer):
        return gradient(outer)
    rows = gradient(torch.ones(outer.shape, dtype=outer.dtype, device=outer.device))
    return (rows * outer[:, None]).to(rows.dtype)
