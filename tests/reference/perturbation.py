"""The oracle of a perturbed row: three passes of `torch.autograd.grad`, the second on a copy whose weights are moved out of place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]


def gradient_at_moved_weights(model: nn.Module, loss: Loss, direction: Loss, radius: float, scale: str) -> list[Tensor]:
    """The gradient of ``loss`` at ``theta - radius g / |g|``, with g the gradient of ``direction`` at theta."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    g = torch.autograd.grad(direction(model), trained)
    length = torch.sqrt(sum((part.double().square().sum() for part in g), torch.zeros((), dtype=torch.float64)))
    moved = copy.deepcopy(model)
    there = [parameter for parameter in moved.parameters() if parameter.requires_grad]
    for weight, part in zip(there, g, strict=True):
        factor = radius / length if scale == "global" else radius * weight.detach().norm() / part.norm()
        weight.data = weight.data - (factor * part).to(weight.dtype)
    return list(torch.autograd.grad(loss(moved), there))


def as_loss(model: nn.Module, gradient: list[Tensor]) -> Tensor:
    """A loss whose gradient at the weights is the given one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.stack([(weight * part).sum() for weight, part in zip(trained, gradient, strict=True)]).sum()
