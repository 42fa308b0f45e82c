r"""UNDO: distil a model that has forgotten into a copy of itself that noise has made forget more (2506.06278).

A model that has been made not to say something still holds it, and a few steps bring it back. A student that learns to
answer as that model does, from weights that are partly lost, learns what it says and not what it holds. The student
starts at

$$\theta = (1 - \alpha)\, \theta_T + \alpha \beta\, N ,$$

with N uniform as Xavier's for every matrix. It is trained on $\mathrm{KL}(p_T \,\|\, p)$ of both sets' answer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import gradsurgery as gs
from lightning_modules.training.counts import whole
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.references import SecondModel
from lightning_modules.training.warmup import rising_and_falling


@dataclass(frozen=True)
class UndoSettings:
    """How the student starts and learns.

    Attributes:
        steps: Optimizer steps.
        alpha: How much of each weight is lost, in (0, 1]; the paper's are .1 to .8.
        beta: Multiple of Xavier's noise; the paper's are 0 to .1.
        lr: The highest learning rate of an AdamW without weight decay; it rises and falls as the finish's.
        max_norm: Clip the gradient to this norm; None for no clipping.
        seed: Of the noise.

    Raises:
        ValueError: If one of them is outside its domain.
    """

    steps: int = 100
    alpha: float = 0.6
    beta: float = 0.1
    lr: float = 7e-4
    max_norm: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"undo, steps: expected at least 1, found {self.steps}")
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"undo, alpha: expected a share above 0 and at most 1, found {self.alpha}")
        if not 0.0 <= self.beta < math.inf:
            raise ValueError(f"undo, beta: expected a number >= 0, found {self.beta}")
        for name, value in (("lr", self.lr), ("max_norm", self.max_norm)):
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"undo, {name}: expected a number > 0, found {value}")


def undo_settings(given: Mapping[str, float]) -> UndoSettings:
    """The settings from numbers; counts are whole numbers, even where a YAML file says 100.0.

    Raises:
        TypeError: If one of them is no setting.
        ValueError: As `UndoSettings`, or if a count is no whole number.
    """
    return UndoSettings(**whole(given, ("steps", "seed"), "undo, "))


@torch.no_grad()
def perturb_(model: nn.Module, settings: UndoSettings) -> None:
    """Mix every matrix of a model with noise, in place; of a mixture's experts, that are one tensor, each is a matrix.

    Vectors (the gains of norms, biases) stay as they are. The authors' code shrinks them by 1 - alpha, which is
    harmless where a gain is 1 + w as in Gemma, and scales a Llama's hidden states down. Tied weights are mixed once.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    convolutions = (part for part in model.modules() if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    kernels = {id(part.weight) for part in convolutions}
    for weight in model.parameters():
        if weight.ndim < 2:
            continue
        outputs, inputs = (weight.shape[0], weight[0].numel()) if id(weight) in kernels else weight.shape[-2:]
        bound = math.sqrt(6.0 / (outputs + inputs))
        noise = (2.0 * torch.rand(weight.shape, generator=generator) - 1.0).to(weight) * bound
        weight.mul_(1.0 - settings.alpha).add_(noise, alpha=settings.alpha * settings.beta)


def undoing_module(model: nn.Module, settings: UndoSettings = UndoSettings()) -> UnlearningModule:
    """The module that distils a model into itself: a copy is the teacher, and the model is mixed with noise at once.

    Train it on the batches of `ForgetRetainDataModule`.

    Args:
        model: That has forgotten; its adapters are merged.
        settings: Of noise and training.

    Cost: a copy of the model; a step takes four forward and two backward passes, of a batch each.
    """
    teacher = SecondModel()
    module = UnlearningModule(
        model,
        forget_loss=gs.losses.kl_divergence,
        retain_loss=gs.losses.kl_divergence,
        optimizer=partial(torch.optim.AdamW, lr=settings.lr, weight_decay=0.0),
        surgery=partial(gs.GradientSurgery, rule="sum", max_norm=settings.max_norm),
        schedule=rising_and_falling,
        reference=teacher,
    )
    perturb_(model, settings)
    return module
