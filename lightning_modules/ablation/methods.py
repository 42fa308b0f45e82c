"""One row of an ablation's table: which method, with which settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from lightning_modules.run.options import MethodOptions
from lightning_modules.run.options.names import NO_RULE
from lightning_modules.training.adversary import AdversarySettings
from lightning_modules.training.undo import undo_settings

Kind = Literal["surgery", "uld", "task_vector", "rectified_task_vector"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    A setting means what the option of `unlearn` with the same name means, except for these.

    Attributes:
        name: What the table calls the method; no two methods have the same.
        baseline: Name of the method that it is compared with.
        kind: "surgery" trains with two losses and a rule. "uld" trains an assistant, whose logits times a weight are
            subtracted. "task_vector" fine-tunes a copy on the forget set and takes away a weight times what that added.
            "rectified_task_vector" does so with both halves of the forget set, TRU-style (unverified), see
            `gradsurgery.task_vectors.rectified`.
        rule: Can also be "none": the forget gradient alone.
        placebo: Replace the rule's correction by one of the same length in a random direction.
        guard: By default "measure", which changes nothing and counts the steps that raise the retain loss to first
            order.
        lr: Instead of that of `train`.
        batch_size: Instead of that of `train`, of either set.
        optimizer: Instead of that of `train`.
        steps: Optimizer steps, instead of epochs.
        epochs: Instead of the `max_epochs` of `train`. A kind with a weight trains for all of its epochs.
        lora_rank: Of adapters, which are trained instead of all weights, or of ULD's assistant, where 0 means 32.
        lora_init: "fila" measures Fisher information first, and the time that this takes counts as training.
        uld: Settings of ULD, but not its weight, which is matched.
        max_norm: Instead of that of `train`.
        stop_below: End once the forget probability is below this; only with the target `end`.
        retain_rows: Protect so many rows instead of one: the retain examples in so many parts, in their order, each
            with a gradient and an average of its own. 0 is one row, of the whole retain batch.
        row_examples: Examples of each of these rows in a step.
        adversary: Take the forget gradient at the weights of an adversary that is taught the forget answers, MUDMAN's
            idea, see `lightning_modules.training.adversary.AdversarySettings`.
        undo: After the training, distil the model into a copy of itself with noise, UNDO (2506.06278), see
            `lightning_modules.training.undo.UndoSettings`; only with the target `end`.
        finish_steps: As in `unlearn`, only with the target `end`; `finish_lr` is half of `lr` by default.
        max_weight: The largest weight that is tried. Weights are tried from 0 upward.
    """

    name: str
    baseline: str | None = None
    kind: Kind = "surgery"
    forget_loss: str = "ceu"
    loss_options: dict[str, float] = field(default_factory=dict)
    retain_loss: str = "cross_entropy"
    rule: str = "gru"
    rule_options: dict[str, float] = field(default_factory=dict)
    ema_decay: float | None = 0.2
    scope: Literal["global", "tensor"] = "global"
    metric: Literal["euclidean", "optimizer"] = "euclidean"
    guard: Literal["none", "measure", "update"] = "measure"
    retain_weight: float = 0.0
    retain_noise: float = 0.0
    retain_anchor: float = 0.0
    retain_inside: float = 0.0
    placebo: bool = False
    keep_asked_words: bool = False
    substitute_weight: float = 0.0
    lr: float | None = None
    batch_size: int | None = None
    optimizer: str | None = None
    optimizer_options: dict[str, float] = field(default_factory=dict)
    epochs: int | None = None
    steps: int | None = None
    max_norm: float | None = None
    lr_schedule: Literal["constant", "linear"] = "constant"
    stop_below: float | None = None
    radius: float | dict[str, float] | Literal["auto"] = field(default_factory=dict)
    radius_scale: Literal["global", "tensor"] = "global"
    adversary: dict[str, float] = field(default_factory=dict)
    retain_rows: int = 0
    row_examples: int = 1
    undo: dict[str, float] = field(default_factory=dict)
    finish_steps: int = 0
    finish_lr: float | None = None
    lora_rank: int = 0
    lora_init: Literal["default", "fila"] = "default"
    uld: dict[str, float] = field(default_factory=dict)
    max_weight: float = 2.0

    @property
    def backward_passes(self) -> int:
        """Backward passes that a step of the method needs.

        One, one more for each use of the retain loss, for noised retain examples, for substitute answers, and for the
        direction in which weights are moved.
        """
        if self.kind != "surgery":
            return 2 if self.kind == "uld" else 1
        surgery = self.rule != NO_RULE or self.retain_weight != 0.0 or self.guard == "update"
        moved = int(bool(self.radius)) + int(bool(self.adversary))
        retained = int(self.retain_inside != 0.0) + int(self.retain_noise != 0.0)
        return 1 + int(self.substitute_weight != 0.0) + retained + (self.retain_rows or int(surgery)) + moved

    def bound_rule(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The rule with its options: Gram matrix -> coefficients."""
        return MethodOptions(rule=self.rule, rule_options=self.rule_options).bound_rule()

    @property
    def note(self) -> str:
        """What a reader of the table must know to compare the method with the others; often empty."""
        adapters = f"adapters of rank {self.lora_rank}" + (", started by FILA" if self.lora_init == "fila" else "")
        weight = "its weight is matched, and lowered to restore retention"
        rows = f"{self.retain_rows} protected rows" if self.retain_rows else ""
        return {
            "surgery": f"{adapters}; merged before they are mixed" if self.lora_rank else rows,
            "uld": f"the model is unchanged; {weight}",
            "task_vector": weight,
            "rectified_task_vector": f"TRU-style (unverified); {weight}",
        }[self.kind]

    def check(self) -> None:
        """Raise ValueError on a setting that the method's kind ignores, or that is outside its domain."""
        default = Method(self.name)
        changed = {entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(default, entry.name)}
        if unused := sorted(changed - {"name", "baseline", "kind"} - _used(self.kind)):
            raise ValueError(f"expected settings of the kind {self.kind}, {sorted(_used(self.kind))}, found {unused}")
        if "weight" in self.uld:
            raise ValueError(
                "uld: expected settings other than weight, which is matched; max_weight is where that ends"
            )
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"expected epochs >= 1, found {self.epochs}")
        self._check_depth()
        if not 0.0 < self.max_weight < math.inf:
            raise ValueError(f"expected a finite max_weight > 0, found {self.max_weight}")

    def _check_depth(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"expected steps or epochs, found both, {self.steps} and {self.epochs}")
        if self.stop_below is not None and not 0.0 < self.stop_below < 1.0:
            raise ValueError(f"expected stop_below between 0 and 1, found {self.stop_below}")
        if self.retain_anchor and self.lora_rank and self.finish_steps:
            raise ValueError(
                "retain_anchor: expected all weights, or no finish_steps, found adapters, merged before them"
            )
        if self.retain_anchor and self.undo:
            raise ValueError("retain_anchor: expected no undo, whose noise an anchor would take back, found both")
        if self.undo and self.finish_steps:
            raise ValueError("expected undo or finish_steps, found both: each is what ends a method")
        try:
            if self.undo:
                undo_settings(self.undo)
            if self.adversary:
                AdversarySettings(**self.adversary)
        except TypeError as error:
            raise ValueError(f"expected settings that undo and adversary know, found: {error}") from error
        if self.adversary and (self.radius or self.retain_inside):
            raise ValueError("adversary: expected neither radius nor retain_inside with it, found one of them")
        if self.retain_rows < 0 or self.row_examples < 1:
            raise ValueError(
                f"expected retain_rows >= 0 and row_examples >= 1, found {self.retain_rows} and {self.row_examples}"
            )
        others = ("retain_inside", "retain_noise", "radius", "adversary", "placebo", "substitute_weight")
        if self.retain_rows and (found := [name for name in others if getattr(self, name)]):
            raise ValueError(f"retain_rows: expected none of {', '.join(others)} with it, found {', '.join(found)}")

    @property
    def own_end(self) -> list[str]:
        """Settings of the method that only matter where it is trained until its own end."""
        given = {"stop_below": self.stop_below is not None, "undo": self.undo, "finish_steps": self.finish_steps}
        return [name for name, value in given.items() if value]


def _used(kind: Kind) -> set[str]:
    """Settings that a kind uses."""
    if kind == "surgery":
        return {entry.name for entry in fields(Method)} - {"name", "baseline", "kind", "uld", "max_weight"}
    return {"lr", "epochs", "max_weight"} | ({"uld", "lora_rank"} if kind == "uld" else {"optimizer"})
