"""Triton's kernels of log-odds, where they run; they are taken where somebody chose them."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from gradsurgery.native import Triton, Unavailable, tried, triton_kernels


@cache
def built() -> Any:
    """The kernels as `Triton`, or why they are lacking, in words."""
    try:
        found = triton_kernels("gradsurgery.losses._triton")
        tried(lambda: _right(found))
    except Unavailable as error:
        return str(error)
    return found


def _right(found: Triton) -> bool:
    """Whether what is read of two rows, and the softmax without the label that is written over them, is known."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]], device=found.device)
    labels = torch.tensor([2, 0], device=logits.device)
    read = torch.tensor([[1.0, 0.0], [math.exp(-1.0), math.exp(-1.0)], [2.0, 3.0], [1.0, 1.0]])
    parts = found.kernels.reduce(logits, labels, 1.0, None)
    if not torch.allclose(torch.stack([part.float() for part in parts]).cpu(), read):
        return False
    largest, rest, _, place = parts
    total, ones = rest.log1p(), torch.ones_like(largest)
    share = -(-total).exp()
    found.kernels.gradient_(logits, largest, (total, ones), None, ((labels, ones), (place, share)), (1.0, None))
    first = 1.0 / (1.0 + math.e)
    written = torch.tensor([[-first, first - 1.0, 1.0], [1.0, first - 1.0, -first]])
    return torch.allclose(logits.cpu(), written)
