"""Cross-entropy with the head in it, as other packages do it: Liger's kernels and Apple's Cut Cross-Entropy.

Both are Triton kernels, so that they stand beside ours where a GPU is, and in Triton's interpreter (`TRITON_INTERPRET=1`), where times
mean nothing. They are no dependencies of ours: what is not installed is left out, as is what fails, with a line that says why.

    pip install --no-deps liger-kernel cut-cross-entropy
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from tests.benchmarks.telling import progress

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states, weight, labels -> the mean over the tokens that count."""


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(hidden, weight, labels)
    return loss if isinstance(loss, Tensor) else loss[0]  # newer versions give further values


def cut(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """With gradients below its threshold left out, as it is by default."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels)


PACKAGES: dict[str, Head] = {"Liger, cross-entropy": liger, "Cut Cross-Entropy": cut}


def fused_heads(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Head]:
    """Those that run on this case."""
    if hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return {}
    found: dict[str, Head] = {}
    for name, head in PACKAGES.items():
        try:
            torch.autograd.grad(head(hidden, weight, labels), hidden)
        except Exception as error:
            progress(f"{name} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            found[name] = head
    return found
