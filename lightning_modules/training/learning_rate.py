"""A learning rate from a few trial steps: one that brings the forget probability down in the steps that a run has."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_modules.data.tokenization import Encoded
from lightning_modules.evaluation.likelihood import device_of
from lightning_modules.progress import Stage
from lightning_modules.training.probability import mean_probabilities
from lightning_modules.training.resuming import random_state, set_random_state
from lightning_modules.training.trainer import trainer_options

FIRST, FACTOR, FASTER, MOST = 1e-6, 2.0, 4.0, 24
"""The learning rate of the first trial step, what each further step multiplies it by, what as long as the forget
probability has hardly moved, and the number of steps at most."""
MOVED = 0.99
"""It has moved when it is below this share of what it was."""
SCORED = 16
"""Forget examples that are scored after a trial step, evenly spaced."""


@dataclass(frozen=True)
class Trial:
    """What the trial steps did.

    Attributes:
        points: One for the start, with the rate 0, and one after each step: "lr", and "forget", the mean probability of
            the forget examples.
        level: The forget probability that was to be reached.
    """

    points: Sequence[Mapping[str, float]]
    level: float

    @property
    def way(self) -> float | None:
        """The sum of the learning rates up to where the forget probability crossed the level; None if it did not.

        Between two points the probability is taken to fall on a line.
        """
        total = 0.0
        for before, after in zip(self.points, self.points[1:], strict=False):
            if after["forget"] < self.level:
                share = (before["forget"] - self.level) / (before["forget"] - after["forget"])
                return total + share * after["lr"]
            total += after["lr"]
        return None


def rate_for(way: float, shares: Sequence[float]) -> float:
    """The learning rate with which steps of these shares of it go a way, rounded to two digits.

    An optimizer such as AdamW moves each weight by about the learning rate a step, so a way is a sum of rates. Small
    steps go it at least as well as the trial's large ones, because their gradients are those of where they are.

    Args:
        way: From `Trial.way`.
        shares: Of the learning rate, that a schedule gives the steps in which the way is to be gone.

    Example:
        >>> rate_for(1e-3, [0.5, 1.0, 1.0, 1.0])
        0.00029
    """
    return float(f"{way / math.fsum(shares):.1e}")


def trial(
    module: L.LightningModule,
    data: L.LightningDataModule,
    scored: Sequence[Encoded],
    *,
    level: float,
    pad_token_id: int,
    callbacks: Sequence[Callback] = (),
    **trainer: Any,
) -> Trial:
    """Train for a few steps with a learning rate that grows, and put everything back.

    It trains on one device in this process, whatever launcher started it. Weights, gradients and random numbers are
    afterwards what they were, bit for bit; nothing is written.

    Args:
        module: A module whose `model` is trained; made for this, because its optimizer is.
        data: Its batches.
        scored: Forget examples. What is kept is not looked at: it may fall first, because these steps are larger than
            any of the run.
        level: The trial ends once the mean forget probability is below this.
        pad_token_id: Of the tokenizer.
        callbacks: What acts on the weights after a step.
        trainer: Further arguments of the Trainer: precision, accumulation.

    Cost: about ten optimizer steps and as many scores of up to 16 examples, and a copy of the trained weights in the
    host's memory.
    """
    rising = _Rising(scored, level, pad_token_id)
    with undisturbed(module.get_submodule("model")):
        alone = L.Trainer(
            **trainer_options(
                accelerator="auto",
                devices=1,
                max_epochs=-1,
                max_steps=MOST,
                callbacks=[*callbacks, rising],
                plugins=[LightningEnvironment()],  # srun would want as many devices as it has tasks
                **trainer,
            )
        )
        with suppress(FloatingPointError):  # the last step was too large: the trial is over
            alone.fit(module, data)
    return Trial(rising.points, level)


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Puts the trained weights, their device, the modes and the random numbers back, and removes gradients."""
    device = device_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.detach().cpu().clone() for parameter in trained]
    modes = [(part, part.training) for part in model.modules()]
    try:
        with same_random_numbers():
            yield
    finally:
        model.to(device)
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        for part, mode in modes:
            part.training = mode


@contextmanager
def same_random_numbers() -> Generator[None]:
    """What comes after the block draws the random numbers that it would have drawn without."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drawn = random_state(device)
    try:
        yield
    finally:
        set_random_state(drawn, device)


class _Rising(Callback):
    """Raises the learning rate after every step, and stops where enough is forgotten."""

    def __init__(self, scored: Sequence[Encoded], level: float, pad_token_id: int) -> None:
        self.scored, self.level, self.pad_token_id = scored, level, pad_token_id
        self.points: list[dict[str, float]] = []
        self._rate, self._stage = FIRST, Stage("Trial steps for the learning rate", None)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._score(trainer, pl_module, 0.0)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rate

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.points):
            self._stage.advance()
            self._score(trainer, pl_module, self._rate)
            moved = self.points[-1]["forget"] < MOVED * self.points[0]["forget"]
            self._rate *= FACTOR if moved else FASTER

    def _score(self, trainer: L.Trainer, module: L.LightningModule, rate: float) -> None:
        model = module.get_submodule("model")
        scores = mean_probabilities(model, {"forget": self.scored}, pad_token_id=self.pad_token_id)
        self.points.append({"lr": rate, **scores})
        if not scores["forget"] >= self.level:  # NaN too
            trainer.should_stop = True
