"""Triton's kernels of log-odds, where they run; they are taken where somebody chose them."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch


@cache
def built() -> Any:
    """The kernels, or why they are lacking, in words."""
    try:
        from gradsurgery.losses import _triton as kernels
    except ImportError:
        return "Triton is not installed"
    if not kernels.INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        return kernels if _right(kernels) else f"{about(kernels)} computes other numbers than plain PyTorch"
    except Exception as error:  # a compiler, a driver or a device: whatever it raises, plain PyTorch is there
        return f"{about(kernels)} failed: {error}"


def about(kernels: Any) -> str:
    """What runs, in words."""
    return f"Triton {kernels.VERSION}{' in its interpreter' if kernels.INTERPRETED else ''}"


def device(kernels: Any) -> str:
    """The type of device whose tensors they read."""
    return "cpu" if kernels.INTERPRETED else "cuda"


def _right(kernels: Any) -> bool:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]], device=device(kernels))
    labels = torch.tensor([2, 0], device=logits.device)
    expected = torch.tensor([[1.0, 0.0], [math.exp(-1.0), math.exp(-1.0)], [2.0, 3.0], [1.0, 1.0]])
    found = torch.stack([part.float() for part in kernels.reduce(logits, labels, 1.0, None)])
    return torch.allclose(found.cpu(), expected)
