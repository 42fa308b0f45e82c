"""What the commands can be told. Strings end here: `resolve` turns names into functions and "it depends" into values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

import gradsurgery as gs
from lightning_modules.training import objectives

if TYPE_CHECKING:
    from lightning_modules.training.uld import ULDSettings

Split = Literal["forget01", "forget05", "forget10"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DataOptions:
    """The model, what it is to forget and to keep, and how it is scored."""

    model: str = _option(
        "scratch", "folder or hub name of a causal language model; 'scratch' trains a small Llama first (and caches it)"
    )
    authors: int = _option(10, "authors that the model from scratch learns")
    forget_authors: int | None = _option(
        None, "so many of them, the last ones, are to be forgotten; a fifth if not given"
    )
    forget: str | None = _option(
        None, "examples to forget: JSON, JSON lines, CSV or Parquet (question/answer, prompt/response, messages, text)"
    )
    retain: str | None = _option(None, "examples to keep")
    tofu: Split | None = _option(None, "forget this split of TOFU")
    tofu_dir: str | None = _option(None, "folder with TOFU's files; from the hub if not given")
    holdout: str | None = _option(
        None,
        "examples that neither the model nor the reference has seen, of the kind to forget: attacks on membership are scored with them; "
        "nothing is trained on them; a file, or with --tofu also a split of TOFU, holdout10",
    )
    max_length: int = _option(512, "tokens an example; longer ones lose their end")
    max_new_tokens: int = _option(64, "tokens a generated answer")
    evaluation_examples: int = _option(400, "examples of each split to score, the first ones")
    evaluation_batch_size: int = _option(32, "texts a forward pass when scoring")
    reference: str | None = _option(
        None,
        "a model that never saw the forget set (folder or hub name), or its evaluation.jsonl; for 'scratch' it is trained",
    )
    reference_cache: bool = _option(
        True, "keep the scores of a reference model and use them again; false scores it anew"
    )
    seed: int = _option(0, "of the data's order, the adapters, and the model from scratch")
    output: str = _option("runs/unlearn", "folder for everything that the run leaves")

    def check(self) -> None:
        """Raise ValueError on options that contradict each other."""
        files = (self.forget is not None, self.retain is not None)
        if any(files) and not all(files):
            raise ValueError("expected --forget and --retain together, found only one of them")
        if any(files) and self.tofu is not None:
            raise ValueError("expected either --forget and --retain, or --tofu, found both")
        if self.tofu_dir is not None and self.tofu is None:
            raise ValueError("expected --tofu with --tofu-dir, for example --tofu forget10")
        if self.model != "scratch" and not any(files) and self.tofu is None:
            raise ValueError(
                f"expected --forget and --retain, or --tofu, with --model {self.model}: which answers is it to forget?"
            )
        for name in ("max_length", "max_new_tokens", "evaluation_examples", "evaluation_batch_size", "authors"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected --{name.replace('_', '-')} >= 1, found {getattr(self, name)}")
        if self.forget_authors is not None:
            if self.model != "scratch" or any(files):
                raise ValueError(
                    "--forget-authors: expected a model from scratch and no --forget, which says what is to be forgotten; leave it out"
                )
            if not 1 <= self.forget_authors < self.authors:
                raise ValueError(
                    f"expected 1 <= --forget-authors < --authors, {self.authors}, found {self.forget_authors}"
                )


@dataclass
class EvaluateOptions(DataOptions):
    """Score a model on its splits and write metrics.json."""

    output: str = _option("runs/evaluate", "folder for metrics.json")
    log: bool = _option(
        False, "write evaluation.jsonl too, the scores of every example, which can be a later run's --reference"
    )


@dataclass
class UnlearnOptions(DataOptions):
    """Make a model forget, and measure what it forgot and what it kept. Without arguments: a small model and fictional authors.

    The defaults are the papers' (CE-U, GRU). What kept most at equal forgetting in our small experiment (README, "Does it help?"):
    --ema-decay 0.7 --retain-weight 200 --guard update
    """

    method: Literal["surgery", "uld"] = _option(
        "surgery", "train the model by two losses and surgery, or by ULD an assistant whose logits are subtracted"
    )
    forget_loss: str = _option("ceu", f"loss on the forget batch: {', '.join(objectives.NAMES)}")
    loss_options: dict[str, float] = field(
        default_factory=dict, metadata={"help": "options of the forget loss, for example {beta: 0.5}"}
    )
    retain_loss: str = _option(
        "cross_entropy", "loss on the retain batch: cross_entropy, or kl_divergence from the start"
    )
    start_model: Literal["auto", "copy", "adapters_off", "precomputed"] = _option(
        "auto",
        "how a loss that compares with the model before unlearning knows it: a second copy, the model with its adapters switched off (auto "
        "where there are plain adapters), or log-likelihoods on disk (auto for npo and dpo, which need no more)",
    )
    refusals: str | None = _option(
        None, "text file with a refusal a line, for dpo and idk; some of our own if not given"
    )
    rule: str = _option(
        "gru", f"how the two gradients are combined: {', '.join([*gs.rules.RULES, *gs.elementwise.ELEMENTWISE])}"
    )
    rule_options: dict[str, float] = field(
        default_factory=dict, metadata={"help": "options of the rule, for example {alpha: 5}"}
    )
    ema_decay: float | None = _option(
        0.2, "weight of the old value in the retain gradient's moving average; null for none"
    )
    retain_weight: float = _option(0.0, "multiple of the retain gradient to add after the rule")
    retain_inside: float = _option(0.0, "multiple of the retain loss inside the forget objective, before the rule")
    dual: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "PDU: weigh the retain loss by a dual variable, for example {limit: 0.3, step_size: 5, initial: 100}"
        },
    )
    guard: Literal["none", "measure", "update"] = _option(
        "none", "look at the parameter change itself: measure it, or project it"
    )
    scope: Literal["global", "tensor"] = _option("global", "one projection for the model, or one for each tensor")
    metric: Literal["euclidean", "optimizer"] = _option("euclidean", "inner product that conflict is measured in")
    optimizer: str = _option("AdamW", "class of torch.optim that steps")
    lr: float | None = _option(None, "learning rate; 1e-5, for the model from scratch 5e-5")
    weight_decay: float = _option(0.01, "of the optimizer")
    warmup_steps: int = _option(5, "steps over which the learning rate rises")
    epochs: int | None = _option(None, "passes over the forget set; 5, for the model from scratch 20")
    stop_below: float | None = _option(
        None,
        "stop once the mean probability of the forget answers is below this, 0 for never; never, for the model from scratch 0.05",
    )
    score_every: int | None = _option(
        None,
        "optimizer steps between scores on up to 64 examples of each set; a 25th of the run, for the model from scratch 1",
    )
    collapse_below: float | None = _option(
        0.1, "stop when the mean retain probability is below this fraction of what it was at the start; null for never"
    )
    best_below: float | None = _option(
        None,
        "end with the weights of the scored step with the largest retain probability among those with a forget probability below this; "
        "null for the last weights",
    )
    probes: bool | None = _option(
        None,
        "at the end, teach a float32 copy a quarter of the forget answers again, and round copies to 8 and 4 bits; only for the model from "
        "scratch",
    )
    batch_size: int = _option(8, "forget and retain examples a forward pass and process")
    accumulate: int | None = _option(None, "batches an optimizer step; 4, for the model from scratch 1")
    max_norm: float | None = _option(1.0, "clip the combined gradient to this norm; null for no clipping")
    lora_rank: int = _option(
        0, "train adapters of this rank instead of all weights; merged at the end; of ULD's assistant (32 if 0)"
    )
    uld: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "settings of ULD: num_layers, weight, top_logit_filter, retain_weight, lora_alpha, perturbed_per_row; for the model "
            "from scratch num_layers is 1 and weight 1"
        },
    )
    lora_init: Literal["default", "fila"] = _option(
        "default", "how adapters start: at random, or by LoKU's FILA from Fisher information"
    )
    precision: str | None = _option(None, "Lightning's name of it; bf16-mixed, on a CPU 32-true")
    devices: str = _option("auto", "number of devices, or auto")
    strategy: str = _option("auto", "Lightning's name of how devices share the work: auto, ddp")
    resume: bool = _option(False, "go on with the interrupted run in --output, with its config.yaml")

    def check(self) -> None:
        """Raise ValueError on options outside their domain."""
        super().check()
        gs.rules.by_name(self.rule)
        self.optimizer_class()
        for name in ("batch_size", "accumulate", "epochs", "score_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected --{name.replace('_', '-')} >= 1, found {value}")
        if self.lora_rank < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"expected --lora-rank and --warmup-steps >= 0, found {self.lora_rank} and {self.warmup_steps}"
            )
        for name in ("collapse_below", "best_below"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise ValueError(f"expected --{name.replace('_', '-')} between 0 and 1, found {value}")
        if self.lr is not None and self.lr <= 0.0:
            raise ValueError(f"expected --lr > 0, found {self.lr}")
        if self.devices != "auto" and not (self.devices.isdigit() and int(self.devices) > 0):
            raise ValueError(f"expected --devices to be auto or a number of devices, found {self.devices!r}")
        try:
            self.bound_loss()
            objectives.by_name(self.retain_loss)
            if self.dual:
                gs.losses.DualVariable(**self.dual)
        except TypeError as error:
            raise ValueError(
                f"expected options that {self.forget_loss} and the dual variable know, found: {error}"
            ) from error
        known = {"num_layers", "weight", "top_logit_filter", "retain_weight", "lora_alpha", "perturbed_per_row"}
        if set(self.uld) - known:
            raise ValueError(
                f"--uld: expected {', '.join(sorted(known))}, found {', '.join(sorted(set(self.uld) - known))}"
            )
        if self.method == "uld" and (self.probes or self.best_below is not None):
            raise ValueError(
                "--probes, --best-below: expected a run with surgery, found --method uld, whose model they do not know"
            )
        if self.method == "uld" and self.resume:
            raise ValueError(
                "--resume: expected a run with surgery, found --method uld, which keeps no checkpoints; start it anew"
            )
        if self.lora_init == "fila" and not self.lora_rank:
            raise ValueError("expected --lora-rank with --lora-init fila, for example 8, found 0")
        if self.start_model == "adapters_off" and (not self.lora_rank or self.lora_init == "fila"):
            raise ValueError(
                "expected --start-model adapters_off with adapters that leave the base as it is (--lora-rank without --lora-init fila), "
                "found none; choose copy or precomputed"
            )
        try:
            self.surgery()(self.optimizer_class()([("weight", torch.nn.Parameter(torch.zeros(1)))]))
            rule: Any = self.bound_rule()
            rule([[], []] if gs.elementwise.is_elementwise(rule) else torch.eye(2, dtype=torch.float64))
        except TypeError as error:
            raise ValueError(
                f"expected options that {self.optimizer} and the rule {self.rule} know, found: {error}"
            ) from error

    def bound_loss(self) -> Any:
        """The forget loss with its options."""
        loss = objectives.by_name(self.forget_loss)
        inspect.signature(loss).bind_partial(**self.loss_options)
        return partial(loss, **self.loss_options) if self.loss_options else loss

    def bound_rule(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The rule with its options."""
        return partial(gs.rules.by_name(self.rule), **self.rule_options)

    def surgery(self) -> Callable[[torch.optim.Optimizer], gs.GradientSurgery]:
        """Base optimizer -> GradientSurgery as these options want it."""
        return partial(
            gs.GradientSurgery,
            rule=self.bound_rule(),
            ema_decay=self.ema_decay,
            scope=self.scope,
            metric=self.metric,
            record_scope=gs.scope.by_layer,
            guard=None if self.guard == "none" else self.guard,
            add={"retain": self.retain_weight} if self.retain_weight else None,
            max_norm=self.max_norm,
            accumulate=(self.accumulate or 1) > 1,
        )

    def optimizer_class(self) -> Callable[..., torch.optim.Optimizer]:
        """The class called `optimizer`.

        Raises:
            ValueError: If torch.optim has none of this name with a learning rate and weight decay.
        """
        kind = getattr(torch.optim, self.optimizer, None)
        if not (isinstance(kind, type) and {"lr", "weight_decay"} <= set(inspect.signature(kind).parameters)):
            raise ValueError(
                f"--optimizer: expected a class of torch.optim with lr and weight_decay, such as AdamW, found {self.optimizer!r}"
            )
        return kind

    def resolved(self) -> UnlearnOptions:
        """A copy in which nothing depends on anything: what config.yaml holds."""
        scratch = self.model == "scratch"
        uld = self.method == "uld"
        depends: dict[str, Any] = {
            "lr": (3e-3 if scratch else 1e-3) if uld else 5e-5 if scratch else 1e-5,
            "epochs": (30 if scratch else 10) if uld else 20 if scratch else 5,
            "accumulate": 1 if scratch else 4,
            "stop_below": 0.05 if scratch else None,
            "score_every": 1 if scratch else None,
            "probes": scratch and not uld,
            "precision": "bf16-mixed" if torch.cuda.is_available() else "32-true",
        }
        known = {name: value for name, value in depends.items() if getattr(self, name) is None}
        if uld:
            known |= {"lora_rank": self.lora_rank or 32}
            known |= {"uld": ({"num_layers": 1, "weight": 1.0} if scratch else {}) | self.uld}
        return replace(self, **known)

    def uld_settings(self) -> ULDSettings:
        """How `train_assistant` trains; a YAML file may have written counts as 8.0."""
        from lightning_modules.training.uld import ULDSettings

        counts = ("num_layers", "perturbed_per_row")
        given: dict[str, Any] = {name: int(value) if name in counts else value for name, value in self.uld.items()}
        return ULDSettings(
            lora_rank=self.lora_rank or 32,
            lr=self.lr or 1e-3,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            epochs=self.epochs or 10,
            batch_size=self.batch_size,
            max_length=self.max_length,
            seed=self.seed,
            **given,
        )
