"""The finish: a short training after a deep forgetting, so that the answers are fluent again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import gradsurgery as gs
from lightning_modules.training import objectives
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.noise import NoiseSettings
from lightning_modules.training.references import Reference, SecondModel
from lightning_modules.training.warmup import rising_and_falling


@dataclass(frozen=True)
class FinishSettings:
    """How the finish is trained.

    Attributes:
        lr: The highest learning rate of a new AdamW with betas .9 and .98; it rises over the first tenth of the steps
            and falls over the others.
        max_norm: Clip the gradient to this norm; None for no clipping.

    Raises:
        ValueError: If one of them is not a positive number.
    """

    lr: float = 5e-4
    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name, number in (("lr", self.lr), ("max_norm", self.max_norm)):
            if number is not None and not 0.0 < number < math.inf:
                raise ValueError(f"finish, {name}: expected a number > 0, found {number}")


def finishing_module(
    model: nn.Module,
    reference: Reference,
    settings: FinishSettings = FinishSettings(),
    *,
    teacher: SecondModel | None = None,
    noise: NoiseSettings | None = None,
) -> UnlearningModule:
    """The module that gives a model that has forgotten deeply its fluent answers back.

    A model whose forget answers were pushed down far says nothing sensible in their place. This minimises the plain sum
    of two losses: the cross-entropy of substitute answers to the forget questions, and the KL divergence from the start
    model on the retain answers. Train it for six to twenty steps on batches whose forget examples are the questions
    with substitutes (`lightning_modules.data.substitutes.other_answers`). Before the deepening it brings the answers
    back.

    With a teacher, the first loss is the divergence from it on the forget answers (`objectives.distillation`), and the
    batches are those of the forget and the retain set. The answers are then as the teacher would give them, which knows
    the names in the questions and nothing else.

    Args:
        model: That has forgotten.
        reference: The model before unlearning: `SecondModel(copy)`, or `AdapterOff()`.
        settings: Of the training.
        teacher: A model that never learned the forget answers, if there is one.
        noise: Of `UnlearningModule`: holds the outputs on noised retain answers too.

    Raises:
        ValueError, TypeError: As `UnlearningModule`.

    Cost: a step takes three forward and two backward passes, of a batch each; with noise two and one more.
    """
    return UnlearningModule(
        model,
        forget_loss=gs.losses.cross_entropy if teacher is None else objectives.distillation(teacher),
        retain_loss=gs.losses.kl_divergence,
        optimizer=partial(torch.optim.AdamW, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01),
        surgery=partial(gs.GradientSurgery, rule="sum", max_norm=settings.max_norm),
        schedule=rising_and_falling,
        reference=reference,
        noise=noise,
    )
