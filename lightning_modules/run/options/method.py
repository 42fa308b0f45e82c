"""The method: losses, rule and surgery, or ULD."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

import gradsurgery as gs
from lightning_modules.run.options.flat import one_of
from lightning_modules.training import objectives


@dataclass(frozen=True)
class MethodOptions:
    """What is descended, and how the two gradients become one.

    Attributes:
        method: train the model by two losses and surgery, or by ULD an assistant whose logits are subtracted
        forget_loss: loss on the forget batch: {names}
        loss_options: options of the forget loss, for example {beta: 0.5}
        retain_loss: loss on the retain batch: any name that forget_loss takes except dpo and idk, which teach refusals;
            usually cross_entropy, or kl_divergence, which keeps the outputs of the model before unlearning
        start_model: how a loss that compares with the model before unlearning knows it: a second copy, the model with
            its adapters switched off (auto where there are plain adapters), or log-likelihoods on disk (auto for npo
            and dpo, which need no more)
        refusals: text file with a refusal a line, for dpo and idk; some of our own if not given
        rule: how the two gradients are combined: {names}
        rule_options: options of the rule, for example {alpha: 5}
        ema_decay: weight of the old value in the retain gradient's moving average; null for none
        retain_weight: multiple of the retain gradient to add after the rule
        retain_inside: multiple of the retain loss inside the forget objective, before the rule
        dual: PDU: weigh the retain loss by a dual variable, for example {limit: 0.3, step_size: 5, initial: 100}
        guard: look at the parameter change itself: measure it, or project it
        scope: one projection for the model, or one for each tensor
        metric: inner product that conflict is measured in
    """

    method: Literal["surgery", "uld"] = "surgery"
    forget_loss: str = one_of(objectives.NAMES, "ceu")
    loss_options: dict[str, float] = field(default_factory=dict)
    retain_loss: str = one_of(objectives.NAMES, "cross_entropy")
    start_model: Literal["auto", "copy", "adapters_off", "precomputed"] = "auto"
    refusals: str | None = None
    rule: str = one_of([*gs.rules.RULES, *gs.elementwise.ELEMENTWISE], "gru")
    rule_options: dict[str, float] = field(default_factory=dict)
    ema_decay: float | None = 0.2
    retain_weight: float = 0.0
    retain_inside: float = 0.0
    dual: dict[str, float] = field(default_factory=dict)
    guard: Literal["none", "measure", "update"] = "none"
    scope: Literal["global", "tensor"] = "global"
    metric: Literal["euclidean", "optimizer"] = "euclidean"

    def check(self) -> None:
        """Raise ValueError on an unknown name, or on options that the loss or the dual variable does not have."""
        gs.rules.by_name(self.rule)
        try:
            self.bound_loss()
            objectives.by_name(self.retain_loss)
            if self.dual:
                gs.losses.DualVariable(**self.dual)
        except TypeError as error:
            raise ValueError(
                f"expected options that {self.forget_loss} and the dual variable know, found: {error}"
            ) from error

    def bound_loss(self) -> Any:
        """The forget loss with its options."""
        loss = objectives.by_name(self.forget_loss)
        inspect.signature(loss).bind_partial(**self.loss_options)
        return partial(loss, **self.loss_options) if self.loss_options else loss

    def bound_rule(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The rule with its options."""
        return partial(gs.rules.by_name(self.rule), **self.rule_options)

    def surgery(
        self, *, max_norm: float | None, accumulate: bool
    ) -> Callable[[torch.optim.Optimizer], gs.GradientSurgery]:
        """Base optimizer -> the `GradientSurgery` that these options describe."""
        return partial(
            gs.GradientSurgery,
            rule=self.bound_rule(),
            ema_decay=self.ema_decay,
            scope=self.scope,
            metric=self.metric,
            record_scope=gs.scope.by_layer,
            guard=None if self.guard == "none" else self.guard,
            add={"retain": self.retain_weight} if self.retain_weight else None,
            max_norm=max_norm,
            accumulate=accumulate,
        )
