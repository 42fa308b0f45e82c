"""The method: losses, rule and surgery, or ULD."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_modules.run.options import names
from lightning_modules.run.options.flat import AUTO, not_negative, one_of

# The parser needs these options before torch is there, which takes seconds: what needs torch imports it itself. No
# __future__ here: jsonargparse would execute the block below for the sake of annotations that are strings.
if TYPE_CHECKING:
    import torch

    import gradsurgery as gs
    from lightning_modules.training.perturb import PerturbSettings


@dataclass(frozen=True)
class MethodOptions:
    """What is descended, and how the two gradients become one.

    Attributes:
        method: train the model by two losses and surgery, or by ULD an assistant whose logits are subtracted
        forget_loss: loss on the forget batch: {names}
        loss_options: options of the forget loss, for example {beta: 0.5}
        retain_loss: loss on the retain batch: any name that forget_loss takes except dpo, idk and jensun, which teach
            other answers; usually cross_entropy, or kl_divergence, which keeps the outputs of the model before
            unlearning
        start_model: how a loss that compares with the model before unlearning knows it: a second copy, the model with
            its adapters switched off (auto where there are plain adapters), or log-likelihoods on disk (auto for npo
            and dpo, which need no more)
        teacher: folder or hub name of a model that never learned the forget answers, such as the one before
            fine-tuning; --forget-loss kl_divergence brings these answers to the probabilities that the teacher gives
            them, and so does the finish; --forget-loss undial lowers the true tokens' logits there by its beta first
        refusals: text file with a refusal a line, for dpo and idk; some of our own if not given
        keep_asked_words: forget only what the question does not say itself: a word of the answer that is in the
            question, such as the name of who is asked about, is left alone; with --model the default is that of
            --recipe balanced
        substitute_weight: multiple, inside the forget objective, of the cross-entropy of another answer to the forget
            question, one of --substitutes or of similar retain questions: with --radius it is learned where the true
            one is remembered best
        rule: how the two gradients are combined: {names}; none takes the forget gradient as it is, and reads retain
            examples only for --retain-weight, --retain-inside or --guard: a control, or, with --retain-anchor, a step
            in half the time
        rule_options: options of the rule, for example {alpha: 5}
        ema_decay: weight of the old value in the retain gradient's moving average; null for none; with --model the
            default is that of --recipe balanced
        retain_weight: multiple of the retain gradient to add after the rule; with --model the default is that of
            --recipe balanced
        retain_noise: multiple, added to the retain loss, of the divergence from the model before unlearning on the
            retain examples with 30 % of their tokens replaced: keeps what no retain example shows; in the finish it has
            the weight 1
        retain_anchor: after every step, pull each layer back as far as its inputs on the retain examples would feel the
            change, with this strength times the learning rate, such as 600: keeps what no retain example shows, for a
            copy of the weights and n x n numbers for a layer with n inputs; 0 for none
        retain_inside: multiple of the retain loss inside the forget objective, before the rule
        dual: PDU: weigh the retain loss by a dual variable, for example {limit: 0.3, step_size: 5, initial: 100}
        guard: look at the parameter change itself: measure it, or project it; with --model the default is that of
            --recipe balanced
        radius: take the forget gradient at weights that are moved this far towards remembering the forget answers, so
            that relearning finds less: 0.5, or {start: 0.2, end: 1}, growing by the step; auto measures it
            on the model before training, where the loss of the forget answers is lowest, and config.yaml has what was
            found; by default they are not moved
        radius_scale: the unit of the radius: global for the length of the whole move, tensor for a multiple of each
            tensor's own length
        scope: one projection for the model, or one for each tensor
        metric: inner product that conflict is measured in
    """

    method: Literal["surgery", "uld"] = "surgery"
    forget_loss: str = one_of(names.LOSSES, "ceu")
    loss_options: dict[str, float] = field(default_factory=dict)
    retain_loss: str = one_of(names.LOSSES, "cross_entropy")
    start_model: Literal["auto", "copy", "adapters_off", "precomputed"] = "auto"
    teacher: str | None = None
    refusals: str | None = None
    keep_asked_words: bool = False
    substitute_weight: float = 0.0
    rule: str = one_of([*names.RULES, names.NO_RULE], "gru")
    rule_options: dict[str, float] = field(default_factory=dict)
    ema_decay: float | None = 0.2
    retain_weight: float = 0.0
    retain_noise: float = 0.0
    retain_anchor: float = 0.0
    retain_inside: float = 0.0
    dual: dict[str, float] = field(default_factory=dict)
    guard: Literal["none", "measure", "update"] = "none"
    radius: float | dict[str, float] | Literal["auto"] = field(default_factory=dict)
    radius_scale: Literal["global", "tensor"] = "global"
    scope: Literal["global", "tensor"] = "global"
    metric: Literal["euclidean", "optimizer"] = "euclidean"

    def check(self) -> None:
        """Raise ValueError on numbers outside their domain; `check_functions` has what needs torch."""
        not_negative(self, "retain_weight", "retain_noise", "retain_anchor", "retain_inside", "substitute_weight")
        if self.rule == names.NO_RULE:
            self._check_no_rule()

    def _check_no_rule(self) -> None:
        """Refuse what --rule none leaves without an effect."""
        idle: dict[str, Any] = {"--rule-options": self.rule_options}
        if self.guard == "none":
            idle["--ema-decay"] = self.ema_decay if self.ema_decay != type(self).ema_decay else None
            idle["--scope"] = self.scope if self.scope != "global" else None
            idle["--metric"] = self.metric if self.metric != "euclidean" else None
        if not self.retain_weight and self.guard != "update":  # nothing else reads the retain gradient
            idle |= {"--retain-noise": self.retain_noise, "--dual": self.dual}
        if self.alone:
            idle["--retain-loss"] = self.retain_loss if self.retain_loss != type(self).retain_loss else None
        if found := [f"{option} {value}" for option, value in idle.items() if value]:
            raise ValueError(
                f"--rule none: expected no option that needs a rule or a retain gradient, found {', '.join(found)}; leave it out, or "
                "choose a rule, --retain-weight or --guard update"
            )

    def check_functions(self) -> None:
        """Raise ValueError on a name, number or option that the losses, the rule or the dual variable do not have."""
        import gradsurgery as gs
        from lightning_modules.training import objectives

        self.bound_rule()
        if (self.radius == AUTO or self.perturb() is not None) and self.retain_inside:
            raise ValueError(
                f"--retain-inside: expected 0 with --radius, found {self.retain_inside}: the two losses are computed at different weights; "
                "use --retain-weight"
            )
        try:
            _try(self.bound_loss())
            retain = objectives.by_name(self.retain_loss)
            if self.dual:
                gs.losses.DualVariable(**self.dual)
        except TypeError as error:
            raise ValueError(
                f"expected options that {self.forget_loss} and the dual variable know, found: {error}"
            ) from error
        if objectives.needs_target(retain):
            raise ValueError(
                f"--retain-loss: expected a loss that keeps answers, found {self.retain_loss}, which teaches another one; JensUn's retain "
                "loss is jensen_shannon"
            )
        if objectives.needs_refusals(retain):
            raise ValueError(
                f"--retain-loss: expected a loss that keeps answers, found {self.retain_loss}, which teaches refusals"
            )
        losses = objectives.by_name(self.forget_loss), retain
        if self.substitute_weight and (objectives.needs_refusals(losses[0]) or objectives.needs_target(losses[0])):
            raise ValueError(
                f"--substitute-weight: expected a --forget-loss that teaches no answer itself, found {self.forget_loss}; give 0 "
                "(--recipe deep has 1), or another loss"
            )
        if self.refusals is not None and not objectives.needs_refusals(losses[0]):
            raise ValueError(
                f"--refusals: expected --forget-loss dpo or idk, which teach them, found {self.forget_loss}"
            )
        losses = (*losses, objectives.by_name("kl_divergence")) if self.retain_noise else losses
        if self.start_model == "precomputed" and (rows := [loss for loss in losses if objectives.needs_logits(loss)]):
            raise ValueError(
                f"--start-model precomputed: expected losses that compare log-likelihoods, found {objectives.name_of(rows[0])}, which "
                "compares all logits; choose copy or adapters_off"
            )

    @property
    def alone(self) -> bool:
        """Whether the forget gradient is all there is: nothing reads the retain loss or its gradient."""
        reads = self.retain_weight or self.retain_inside or self.guard != "none"
        return self.rule == names.NO_RULE and not reads

    @property
    def imitates(self) -> bool:
        """Whether the forget loss compares with the teacher instead of the model before unlearning."""
        return self.teacher is not None and self.forget_loss in names.IMITATING

    def perturb(self) -> "PerturbSettings | None":
        """How far the weights are moved; None if they are not.

        Raises:
            ValueError: If the radius is no positive number or has other entries than start and end.
            RuntimeError: If it is "auto" and not measured yet.
        """
        from lightning_modules.training.perturb import PerturbSettings

        if self.radius == AUTO:
            raise RuntimeError(
                "--radius auto: expected the measured radius in its place before the training is assembled"
            )
        span = {"start": self.radius} if isinstance(self.radius, (int, float)) else self.radius
        if not span:
            if self.radius_scale != "global":
                raise ValueError(f"expected --radius with --radius-scale {self.radius_scale}, found none")
            return None
        if "start" not in span or set(span) - {"start", "end"}:
            raise ValueError(
                f"--radius: expected a number, or start and end, as in {{start: 0.2, end: 1}}, found {', '.join(span)}"
            )
        try:
            return PerturbSettings(**span, scale=self.radius_scale)
        except ValueError as error:
            raise ValueError(f"--radius: {error}") from error

    def bound_loss(self) -> Any:
        """The forget loss with its options."""
        from lightning_modules.training import objectives

        loss = objectives.by_name(self.forget_loss)
        options = [
            name
            for name, entry in inspect.signature(loss).parameters.items()
            if entry.default is not entry.empty and name != "labels"
        ]
        for name in self.loss_options:
            if name not in options:
                raise TypeError(f"{name!r}; {self.forget_loss} has {', '.join(options) or 'none'}")
        return partial(loss, **self.loss_options) if self.loss_options else loss

    def bound_rule(self) -> "Callable[[torch.Tensor], torch.Tensor]":
        """The rule with its options."""
        import gradsurgery as gs

        if self.rule == names.NO_RULE:
            return partial(gs.rules.gradient_difference, alpha=0.0)
        return partial(gs.rules.by_name(self.rule), **self.rule_options)

    def surgery(
        self, *, max_norm: float | None, accumulate: bool
    ) -> "Callable[[torch.optim.Optimizer], gs.GradientSurgery]":
        """Base optimizer -> the `GradientSurgery` that these options describe."""
        import gradsurgery as gs

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


def _try(loss: Any) -> None:
    """Compute a loss once, of one token, so that an option outside its domain is refused before any work is done."""
    import torch

    examples = {"labels": torch.zeros(1, dtype=torch.int64), "lengths": torch.ones(1), "nll": torch.ones(1)}
    given: list[torch.Tensor] = []
    for name, entry in inspect.signature(loss).parameters.items():
        if entry.default is not entry.empty or entry.kind is not entry.POSITIONAL_OR_KEYWORD:
            continue
        example = next((value for ending, value in examples.items() if name.endswith(ending)), None)
        if example is None and not name.endswith("logits"):
            return  # an objective, which takes a model
        given.append(torch.zeros(1, 2) if example is None else example)
    loss(*given)
