r"""An adversary that is taught the forget answers while the model forgets them: MUDMAN's idea (2506.12484).

A copy of the weights, the adversary, takes a step of gradient descent on each forget batch's cross-entropy. The forget
row is the gradient of the forget loss at the adversary's weights, and the step is taken from the model's:

$$\theta_a \leftarrow \theta_a - a\, \nabla_{\theta_a} \mathrm{CE}, \qquad
\theta_a \leftarrow \delta\, \theta_a + (1 - \delta)\, \theta, \qquad g_f = \nabla \ell(\theta_a) .$$

Every n steps it starts anew as the model. Where `PerturbSettings` moves the weights along one gradient, an adversary
has walked as a relearning attack does. Differences from the authors' code: the forget gradient is that at the
adversary's new weights, computed from a new forward pass (theirs mixes old activations with weights that were edited
in place).
Their rule, which drops coordinates whose signs differ, is `gradsurgery.rules.elementwise.sign_agreement`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import gradsurgery as gs
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.objectives import objective
from lightning_modules.training.perturb import PerturbSettings

_SMALLEST = 1e-30


@dataclass(frozen=True)
class AdversarySettings:
    """How the adversary learns.

    Attributes:
        lr: Of its plain gradient descent, a.
        every: It starts anew as the model so often, in steps, n; the paper's are 6 to 42.
        keep: Share of its distance from the model that it keeps from step to step, delta, in (0, 1].

    Raises:
        ValueError: If one of them is outside its domain.
    """

    lr: float = 1e-2
    every: float = 32
    keep: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"adversary, lr: expected a number > 0, found {self.lr}")
        if self.every < 1 or self.every != int(self.every):
            raise ValueError(f"adversary, every: expected a whole number >= 1, found {self.every}")
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"adversary, keep: expected a share above 0 and at most 1, found {self.keep}")


class AdversarialModule(UnlearningModule):
    """An `UnlearningModule` whose forget gradient is taken at an adversary's weights.

    The adversary is no part of a checkpoint: a resumed run starts it anew.

    Args:
        arguments: Of `UnlearningModule`, the model; `perturb` is what this module replaces.
        adversary: How the adversary learns.
        options: Of `UnlearningModule`.

    Raises:
        ValueError: As `UnlearningModule`; with `perturb` or `retain_inside`.

    Cost: two forward and backward passes of the forget batch more than `UnlearningModule`, less one; a copy of the
    trained weights, and of their gradient.
    """

    def __init__(self, *arguments: Any, adversary: AdversarySettings = AdversarySettings(), **options: Any) -> None:
        if options.pop("perturb", None) is not None:
            raise ValueError(
                "adversary: expected no perturb with it, found one; the adversary says where the gradient is taken"
            )
        super().__init__(*arguments, perturb=PerturbSettings(start=1.0), **options)
        self.adversary = adversary
        self._teach = objective(gs.losses.cross_entropy, 0)
        self._weights: list[Tensor] = []
        self._taught = 0

    def on_train_start(self) -> None:
        """Start with an adversary that is the model.

        Raises:
            RuntimeError: If the weights are sharded over processes.
        """
        super().on_train_start()
        if any(isinstance(parameter, DTensor) for parameter in self._trained()):
            raise RuntimeError(
                "adversary: expected weights that every process holds whole, found sharded ones; use ddp, or `perturb`"
            )
        self._weights, self._taught = [], 0

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Teach the adversary this forget batch, and then do as `UnlearningModule` does."""
        if self._at is None:
            raise RuntimeError("adversary: expected on_train_start before the first step; call super()")
        self._learn(batch)  # before any graph is built: it moves the weights in place and back
        return super().training_step(batch)

    def _learn(self, batch: Mapping[str, Mapping[str, Tensor]]) -> None:
        settings, parameters = self.adversary, self._trained()
        here = [parameter.detach().clone() for parameter in parameters]
        if not self._weights or self._taught % int(settings.every) == 0:
            self._weights = [weight.clone() for weight in here]
        self._taught += 1
        with torch.no_grad():
            torch._foreach_copy_(parameters, self._weights)  # pyright: ignore[reportPrivateUsage]
        try:
            torch.clear_autocast_cache()  # it holds 16-bit copies of the weights as they were
            gradients = self._gradients(self._teach(self, batch, "forget"), parameters)
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, here)  # pyright: ignore[reportPrivateUsage]
            torch.clear_autocast_cache()
        with torch.no_grad():
            for weight, start, gradient in zip(self._weights, here, gradients, strict=True):
                weight.sub_(gradient, alpha=settings.lr)
                weight.lerp_(start, 1.0 - settings.keep)

    def _gradients(self, loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        """The gradient of the whole step's loss, in every process; 0 where a loss does not reach a parameter."""
        try:
            found: Any = torch.autograd.grad(loss, parameters, allow_unused=True)
        except RuntimeError as error:
            if "incompatible with .grad()" not in str(error):
                raise
            raise RuntimeError(
                "adversary: expected gradient checkpointing that takes gradients by name, found use_reentrant=True; say "
                'gradient_checkpointing_enable({"use_reentrant": False})'
            ) from error
        gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for gradient, parameter in zip(found, parameters, strict=True)
        ]
        if self.trainer.world_size == 1:
            return gradients
        return [cast("Tensor", self.trainer.strategy.reduce(gradient, reduce_op="mean")) for gradient in gradients]

    def _perturbed(self, batch: Mapping[str, Mapping[str, Tensor]], name: str) -> gs.Perturbed:
        if self._at is None:
            raise RuntimeError("adversary: expected on_train_start before the first step; call super()")
        parameters = self._trained()
        with torch.no_grad():
            back = [parameter - weight for parameter, weight in zip(parameters, self._weights, strict=True)]
            distance = torch.stack([row.double().square().sum() for row in back]).sum().sqrt()
        # Moving by its length against the gradient of <weights, way back> is the way from the model to the adversary.
        self._at.radius = max(float(distance), _SMALLEST)

        def loss() -> Tensor:
            value = self.objectives[name](self, batch, name)
            self.losses[name] = value.detach()
            return value

        def direction() -> Tensor:
            return torch.stack([(weight * row).sum() for weight, row in zip(parameters, back, strict=True)]).sum()

        return gs.Perturbed(loss=loss, direction=direction, at=self._at)

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]
