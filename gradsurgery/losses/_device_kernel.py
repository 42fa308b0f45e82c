"""Triton's kernels of log-odds, where they run; they are taken where somebody chose them."""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any

import torch


@cache
def built() -> Any:
    """The kernels, or why they are lacking, in words."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no CUDA device"  # before anybody waits for an import
    try:
        from gradsurgery.losses import _triton as kernels
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    try:
        return kernels if _right(kernels) else f"{about(kernels)} computes other numbers than plain PyTorch"
    except Exception as error:  # a compiler, a driver or a device: whatever it raises, plain PyTorch is there
        return f"{about(kernels)} failed ({type(error).__name__}: {error})"


def about(kernels: Any) -> str:
    """What runs, in words."""
    return f"Triton {kernels.VERSION}{' in its interpreter' if kernels.INTERPRETED else ''}"


def device(kernels: Any) -> str:
    """The type of device whose tensors they read."""
    return "cpu" if kernels.INTERPRETED else "cuda"


def _right(kernels: Any) -> bool:
    """Whether what is read of two rows, and the softmax without the label that is written over them, is known."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]], device=device(kernels))
    labels = torch.tensor([2, 0], device=logits.device)
    read = torch.tensor([[1.0, 0.0], [math.exp(-1.0), math.exp(-1.0)], [2.0, 3.0], [1.0, 1.0]])
    found = kernels.reduce(logits, labels, 1.0, None)
    if not torch.allclose(torch.stack([part.float() for part in found]).cpu(), read):
        return False
    largest, rest, _, place = found
    total, ones = rest.log1p(), torch.ones_like(largest)
    share = -(-total).exp()
    kernels.gradient_(logits, largest, (total, ones), None, ((labels, ones), (place, share)), (1.0, None))
    first = 1.0 / (1.0 + math.e)
    written = torch.tensor([[-first, first - 1.0, 1.0], [1.0, first - 1.0, -first]])
    return torch.allclose(logits.cpu(), written)
