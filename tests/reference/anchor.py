"""The weights that an anchor leaves, by least squares over the inputs themselves: no moments, no inverse, no basis."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pulled(start: Tensor, weight: Tensor, inputs: Tensor, strength: float) -> Tensor:
    """The V that minimises `|V - W|^2 + strength / c * mean over the rows x of |(V - W_0) x|^2`.

    Args:
        start: `W_0 [out, n]`.
        weight: `W [out, n]`.
        inputs: `[N, n]`.
        strength: 0 and more; c is the mean of the squared inputs.
    """
    scale = math.sqrt(strength / float(inputs.square().mean()) / len(inputs))
    system = torch.cat([torch.eye(inputs.shape[1]).to(inputs), scale * inputs])
    wanted = torch.cat([(weight - start).T, torch.zeros(len(inputs), len(weight)).to(weight)])
    return start + torch.linalg.lstsq(system, wanted, driver="gelsd").solution.T


def pulled_tied(start: Tensor, weight: Tensor, tokens: Tensor, inputs: Tensor, strength: float) -> Tensor:
    """The same of a weight `[V, n]` that is an embedding of these tokens, and the head with these inputs, row by row."""
    shares = torch.bincount(tokens.flatten(), minlength=len(weight)).to(weight)
    scale = math.sqrt(strength / float(inputs.square().mean()) / len(inputs))
    found = []
    for row, before, share in zip(weight, start, shares / shares.mean(), strict=True):
        eye = torch.eye(inputs.shape[1]).to(inputs)
        system = torch.cat([eye, math.sqrt(strength * float(share)) * eye, scale * inputs])
        wanted = torch.cat([row - before, torch.zeros(len(row) + len(inputs)).to(weight)])
        found.append(before + torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:, 0])
    return torch.stack(found)
