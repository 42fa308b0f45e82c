"""The placebo: a correction as long as the rule's, in a random direction."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules.training.module import UnlearningModule


class Placebo(Callback):
    r"""Adds to the forget gradient a random vector that is as long as a rule's correction.

    It tells whether a rule helps by its direction or by the length of its step: where the rule helps and its placebo
    does not, it is the direction.

    A rule turns the first row $g_0$ into $\sum_k c_k g_k$. With $d = c - e_0$, its correction is
    $\sum_k d_k g_k$, of length $\sqrt{d^\top G d}$.

    The optimizer itself has to take the forget gradient alone (the rule `none`) and to keep the averages that the
    rule would see. Its scope has to be the whole model, its metric Euclidean, and its `max_norm` None.

    Args:
        rule: Gram matrix -> coefficients; the length of its correction is taken.
        seed: Of the random directions. They come from a generator of their own, and are the same on every device.

    Attributes:
        length: Of the last correction.
    """

    def __init__(self, rule: Callable[[Tensor], Tensor], seed: int = 0) -> None:
        self.rule = rule
        self.generator = torch.Generator().manual_seed(seed)
        self.length = 0.0

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:  # noqa: ARG002 (Lightning's)
        """Add the random vector to the gradients that `combine` has written."""
        if not isinstance(pl_module, UnlearningModule) or (record := pl_module.surgery.record) is None:
            raise TypeError("Placebo: expected an UnlearningModule after its backward pass, found none")
        coefficients = self.rule(record.gram).clone()
        coefficients[0] -= 1.0
        length = (coefficients @ record.gram @ coefficients).clamp_min(0.0).sqrt()
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        noise = [torch.randn(gradient.shape, generator=self.generator).to(gradient) for gradient in gradients]
        norm = torch.stack([row.double().square().sum() for row in noise]).sum().sqrt()
        self.length = float(length)
        for gradient, row in zip(gradients, noise, strict=True):
            gradient.add_(row, alpha=float(length / norm))
