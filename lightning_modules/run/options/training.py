"""Steps, batches, weights and devices: how a method is trained."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from lightning_modules.run.options.flat import at_least_one, flag, not_negative
from lightning_modules.run.options.shared import FSDP2, SharedOptions
from lightning_modules.training.adapter_settings import AdapterSettings
from lightning_modules.training.uld_settings import ULDSettings

# The parser needs these options before torch is there, which takes seconds: what needs torch imports it itself. No
# __future__ here: jsonargparse would execute the block below for the sake of annotations that are strings.
if TYPE_CHECKING:
    import torch

    from lightning_modules.training.warmup import Schedule


SHARDED_PRECISIONS = ("32-true", "bf16-mixed")
"""The keys of `lightning_modules.training.sharding.POLICIES`, which takes seconds to import."""


@dataclass(frozen=True)
class StepOptions:
    """Steps, batches and where they end.

    Attributes:
        optimizer: class of torch.optim that steps
        optimizer_options: further options of that class, for example {eps: 1e-4}
        lr: learning rate; auto finds one from about ten trial steps, which are taken back: as large as reaches the
            forget probability of --stop-below within the steps of the run; by default auto, 5e-5 for the model from
            scratch, or 1e-5 with --strategy fsdp2; with --method uld 1e-3, or 3e-3 for the model from scratch
        weight_decay: of the optimizer
        warmup_steps: steps over which the learning rate rises
        lr_schedule: after the warm-up the learning rate stays (constant), or falls over the last two thirds of the
            steps to a twentieth (linear)
        epochs: passes over the forget set, if the target is not reached before; by default 5, or as many as make 40
            steps (80 with --keep-asked-words, which --model has by default), or 20 for the model from scratch; with
            --method uld 10, or 30 for the model from scratch
        steps: optimizer steps, instead of epochs
        stop_below: the target: stop training once the mean probability of the forget answers is below this; 0 means
            never; by default the reference's own mean probability of them, at most 0.1, if there is a reference, or
            else 0.05, which it is for the model from scratch too; never with --method uld
        score_every: optimizer steps between two scores, each on up to 64 examples of each set; by default a 25th of the
            run, at least 4, or 1 for the model from scratch
        collapse_below: stop when the mean retain probability is below this fraction of what it was at the start; null
            for never
        best_below: end with the weights of the scored step with the largest retain probability among those with a
            forget probability below this; null for the last weights
        probes: attack the model at the end, and the reference: quick (or no value) teaches a copy a quarter of the
            forget answers again, for 20 steps, and rounds copies to 8, 4 and 3 bits; all also teaches them for 100 and
            200 faster steps and by LoRA, teaches retain answers and general knowledge, asks in other words, after
            parts of the answer and after examples, samples 32 answers to each question and reads off the layers, which
            costs 620 training steps and 37 answers to each question; by default none, or quick for the model from
            scratch
        batch_size: how many forget examples, and as many retain examples, each process takes into one forward pass
        group_by_length: sort the examples of eight batches by length, so that less is padding; the forget and retain
            sets are passed through in the same way, in another order
        accumulate: how many batches make one optimizer step; by default 4, or fewer where that leaves an epoch fewer
            than 10 steps, or 1 for the model from scratch
        max_norm: clip the combined gradient to this norm; null for no clipping
        uld: settings of ULD: num_layers, weight, top_logit_filter, retain_weight, perturbed_per_row;
            the defaults are the paper's, but for the model from scratch num_layers is 1 and weight is 1
        lora_init: how adapters start: at random, or by LoKU's FILA from Fisher information
    """

    optimizer: str = "AdamW"
    optimizer_options: dict[str, float] = field(default_factory=dict)
    lr: float | Literal["auto"] | None = None
    weight_decay: float = 0.01
    warmup_steps: int = 5
    lr_schedule: Literal["constant", "linear"] = "constant"
    epochs: int | None = None
    steps: int | None = None
    stop_below: float | None = None
    score_every: int | None = None
    collapse_below: float | None = 0.1
    best_below: float | None = None
    probes: Literal["none", "quick", "all"] | bool | None = None
    batch_size: int = 8
    group_by_length: bool = False
    accumulate: int | None = None
    max_norm: float | None = 1.0
    uld: dict[str, float] = field(default_factory=dict)
    lora_init: Literal["default", "fila"] = "default"


@dataclass(frozen=True)
class TrainingOptions(SharedOptions, StepOptions):
    """How it is trained: steps, batches, weights, and the devices. Of what is shared, this is said in other words.

    Attributes:
        save: what is left in model/: the weights with the adapters merged into them, or the adapter alone, as PEFT
            saves it, for the model that --model names (of the model from scratch a copy is left in base/)
        lora_rank: train adapters of this rank instead of all weights; 0 for no adapters; with --method uld it is the
            rank of the assistant's adapters, and 0 means 32
        lora_alpha: adapters are scaled by alpha / rank, or alpha / sqrt(rank) with rslora; by default twice the rank;
            with --method uld that of the assistant's adapters, and by default 32
        lora_targets: which modules have adapters, the assistant's too: all-linear for every linear layer but the head,
            or names such as q_proj,v_proj
        lora_dropout: dropout on the adapters' input while training, the assistant's too
        strategy: how devices share the work: auto, ddp or another name of Lightning's; fsdp2 shards a model that no
            device can hold
        logger: log the numbers of every step, the curve and the scores into logs/ of the output folder too: csv,
            tensorboard or wandb; by default surgery.csv, curve.csv and metrics.json alone hold them
    """

    def __post_init__(self) -> None:
        if isinstance(self.probes, bool):  # as in config.yaml of earlier versions, and the flag without a value
            object.__setattr__(self, "probes", "quick" if self.probes else "none")

    def check(self) -> None:
        """Raise ValueError on options outside their domain, or that contradict each other.

        `optimizer_class` has what needs torch.
        """
        at_least_one(
            self, "batch_size", "accumulate", "epochs", "steps", "score_every", "checkpoint_every", "num_nodes"
        )
        not_negative(self, "lora_rank", "warmup_steps", "weight_decay")
        if self.padding_free and self.compile:
            raise ValueError(
                "--padding-free: expected false with --compile, whose programs read batches with padding, found true; leave one of them out"
            )
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"expected --epochs or --steps, found both, {self.epochs} and {self.steps}")
        for name in ("collapse_below", "best_below"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise ValueError(f"expected {flag(name)} between 0 and 1, found {value}")
        if self.stop_below is not None and not 0.0 <= self.stop_below < 1.0:
            raise ValueError(
                f"expected --stop-below at least 0, which means never, and below 1, found {self.stop_below}"
            )
        if isinstance(self.lr, (int, float)) and self.lr <= 0.0:
            raise ValueError(f"expected --lr > 0, found {self.lr}")
        if self.devices != "auto" and not (self.devices.isdigit() and int(self.devices) > 0):
            raise ValueError(f"expected --devices to be auto or a number of devices, found {self.devices!r}")
        if self.uld:
            known = uld_numbers()
            if set(self.uld) - set(known):
                raise ValueError(
                    f"--uld: expected {', '.join(sorted(known))}, found {', '.join(sorted(set(self.uld) - set(known)))}"
                )
            for name, value in self.uld.items():
                if value < 0 or (known[name] is int and value != int(value)):
                    kind = "a whole number" if known[name] is int else "a number"
                    raise ValueError(f"--uld, {name}: expected {kind} >= 0, found {value}")
        if self.resume and self.dry_run:
            raise ValueError("--dry-run: expected a run that is not begun, found --resume; leave one of them out")
        if str(self.precision).endswith("-true") and self.precision not in ("32-true", "64-true"):
            raise ValueError(
                f"--precision: expected one under which what is trained keeps small updates, found {self.precision}, which turns all "
                "weights into that type, and an update below a 512th of such a weight is rounded away; use bf16-mixed, or --dtype bfloat16 "
                "with --lora-rank, which holds only the weights below the adapters so"
            )
        self._check_adapters()

    def _check_adapters(self) -> None:
        if self.lora_init == "fila" and not self.lora_rank:
            raise ValueError("expected --lora-rank with --lora-init fila, for example 8, found 0")
        if self.sharded:
            self._check_sharded()
        if self.save == "adapter" and not self.lora_rank:
            raise ValueError(
                "expected --lora-rank with --save adapter, for example 8, found 0, which trains all weights"
            )
        if self.lora_init == "fila" and self.lora_kind == "dora":
            raise ValueError(
                "expected --lora-kind lora or rslora with --lora-init fila, which splits the weights, found dora"
            )
        if self.lora_alpha is not None and not 0.0 < self.lora_alpha < math.inf:
            raise ValueError(f"expected --lora-alpha > 0, found {self.lora_alpha}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"expected --lora-dropout at least 0 and below 1, found {self.lora_dropout}")
        if not self.lora_targets or not all(self.lora_targets):
            raise ValueError(
                f"expected --lora-targets all-linear or names such as q_proj,v_proj, found {self.lora_targets!r}"
            )

    def _check_sharded(self) -> None:
        if self.lr == "auto":
            raise ValueError(
                f"--lr auto: expected a model that one device can train for a few steps, found --strategy {FSDP2}, which shards it; give "
                "a number, such as 1e-5"
            )
        if self.precision not in (None, *SHARDED_PRECISIONS):
            raise ValueError(
                f"--strategy {FSDP2}: expected --precision {' or '.join(SHARDED_PRECISIONS)}, found {self.precision!r}, for which sharded "
                "gradients have no loss scale and checkpoints no float32 weights"
            )
        if self.gradient_checkpointing:
            raise ValueError(
                f"--strategy {FSDP2}: expected no --gradient-checkpointing, found it: that shards gather the same weights for a layer that "
                "is run again has not been tested; leave it out, and use more devices or a smaller --batch-size"
            )
        if self.padding_free:
            raise ValueError(
                f"--strategy {FSDP2}: expected no --padding-free, found it: the backbone alone cannot read shards; leave it out"
            )
        if self.compile:
            raise ValueError(
                f"--strategy {FSDP2}: expected no --compile, found it: compiled shards have not been tested; leave it out"
            )
        if self.lora_init == "fila":
            raise ValueError(
                f"--strategy {FSDP2}: expected adapters that start at random, found --lora-init fila, whose Fisher information needs the "
                "whole model and its gradients on one device; leave --lora-init out"
            )
        if self.save == "adapter":
            raise ValueError(
                f"--strategy {FSDP2}: expected --save merged, found adapter, which one process would have to hold beside the whole model; "
                "leave --save out"
            )
        if self.best_below is not None:
            raise ValueError(
                f"--strategy {FSDP2}: expected to end with the last weights, found --best-below, whose best weights one process loads "
                "back whole; use --stop-below, which ends the training there"
            )

    def adapters(self, seed: int) -> AdapterSettings:
        """As in `SharedOptions`, with the start that --lora-init says."""
        return replace(super().adapters(seed), init=self.lora_init)

    @property
    def adapters_start_at_zero(self) -> bool:
        """Whether the model with its adapters switched off is the model before unlearning."""
        return self.lora_rank > 0 and self.lora_init == "default"

    @property
    def accumulates(self) -> bool:
        """Whether an optimizer step takes more than one batch."""
        return (self.accumulate or 1) > 1

    @property
    def probed(self) -> bool:
        """Whether there are probes at the end."""
        return self.probes not in (None, "none")

    def optimizer_class(self) -> "Callable[..., torch.optim.Optimizer]":
        """The class called `optimizer`.

        Raises:
            ValueError: If torch.optim has none of this name with a learning rate and weight decay.
        """
        import torch

        kind = getattr(torch.optim, self.optimizer, None)
        if not (isinstance(kind, type) and {"lr", "weight_decay"} <= set(inspect.signature(kind).parameters)):
            raise ValueError(
                f"--optimizer: expected a class of torch.optim with lr and weight_decay, such as AdamW, found {self.optimizer!r}"
            )
        return kind

    def schedule(self) -> "Schedule | None":
        """The schedule of the learning rate; None where it stays after the warm-up."""
        from lightning_modules.training.warmup import falling_late

        return None if self.lr_schedule == "constant" else partial(falling_late, warmup_steps=self.warmup_steps)

    def base_optimizer(self, lr: float | None = None) -> "Callable[..., torch.optim.Optimizer]":
        """Parameters -> the base optimizer with its weight decay, and this learning rate or its own."""
        return partial(
            self.optimizer_class(), lr=lr or self.lr, weight_decay=self.weight_decay, **self.optimizer_options
        )


def uld_numbers() -> dict[str, type]:
    """The settings that --uld takes, by name, and whether each is an int or a float.

    They are the numbers among `ULDSettings` that no option of their own gives. `lora_alpha` came before --lora-alpha,
    and still means the same.
    """
    elsewhere = {*(option.name for option in fields(TrainingOptions)), "seed"} - {"lora_alpha"}
    kinds = {entry.name: type(entry.default) for entry in fields(ULDSettings) if entry.name not in elsewhere}
    return {name: kind for name, kind in kinds.items() if kind in (int, float)}
