"""The command `finetune`: which model is taught what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lightning_modules.run.options.data import OutputOptions
from lightning_modules.run.options.flat import Flat, at_least_one, flag
from lightning_modules.training.finetuning import FinetuningSettings

TOFUFile = Literal["full", "retain90", "retain95", "retain99", "forget10", "forget05", "forget01"]


@dataclass(frozen=True)
class TaughtOptions:
    """The model, and what it is taught.

    Attributes:
        model: folder or hub name of a causal language model
        data: examples to teach: JSON, JSON lines, CSV or Parquet (question/answer, prompt/response, messages, text)
        tofu: teach this file of TOFU: full makes the model that is to forget, retain90 the reference of forget10
        tofu_dir: folder with TOFU's files; from the hub if not given
        authors: teach the first so many authors of the file only, 20 questions each
        max_length: tokens an example; longer ones lose their end
    """

    model: str | None = None
    data: str | None = None
    tofu: TOFUFile | None = None
    tofu_dir: str | None = None
    authors: int | None = None
    max_length: int = 512

    def check(self) -> None:
        """Raise ValueError on options outside their domain, or that contradict each other."""
        if self.model is None:
            raise ValueError(
                "expected --model, a folder or hub name such as HuggingFaceTB/SmolLM2-135M-Instruct, found none"
            )
        if (self.data is None) == (self.tofu is None):
            found = "neither" if self.data is None else "both"
            raise ValueError(f"expected either --data or --tofu, found {found}: what is the model to learn?")
        for name in ("tofu_dir", "authors"):
            if getattr(self, name) is not None and self.tofu is None:
                raise ValueError(f"expected --tofu with --{name.replace('_', '-')}, for example --tofu full")
        at_least_one(self, "authors", "max_length")


@dataclass(frozen=True)
class FinetuneTrainingOptions:
    """How the model is taught.

    Attributes:
        epochs: passes over the examples
        batch_size: examples that each process takes into one forward pass
        accumulate: how many batches make one optimizer step
        lr: AdamW's highest learning rate; it rises over the first tenth of the steps and then falls linearly to zero
        weight_decay: AdamW's
        max_norm: clip the gradient to this norm; null for no clipping
        lora_rank: train adapters of this rank instead of all weights, and merge them at the end; 0 for no adapters
        precision: the precision, by Lightning's name; by default bf16-mixed with a CUDA GPU and 32-true without one
        devices: number of devices, or auto
        strategy: Lightning's name of how devices share the work: auto, ddp
        resume: go on with the interrupted run in --output, with its config.yaml
    """

    epochs: int = FinetuningSettings.epochs
    batch_size: int = FinetuningSettings.batch_size
    accumulate: int = FinetuningSettings.accumulate
    lr: float = FinetuningSettings.lr
    weight_decay: float = FinetuningSettings.weight_decay
    max_norm: float | None = FinetuningSettings.max_norm
    lora_rank: int = 0
    precision: str | None = None
    devices: str = "auto"
    strategy: str = "auto"
    resume: bool = False

    def check(self) -> None:
        """Raise ValueError on options outside their domain."""
        at_least_one(self, "epochs", "batch_size", "accumulate")
        for name in ("lr", "max_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"expected {flag(name)} > 0, found {value}")
        for name in ("lora_rank", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {flag(name)} >= 0, found {getattr(self, name)}")
        if self.devices != "auto" and not (self.devices.isdigit() and int(self.devices) > 0):
            raise ValueError(f"expected --devices to be auto or a number of devices, found {self.devices!r}")


@dataclass(frozen=True)
class FinetuneOutputOptions(OutputOptions):
    """Where the taught model goes.

    Attributes:
        output: folder for the model and everything else that the run leaves
    """

    output: str = "runs/finetune"


@dataclass(frozen=True)
class FinetuneOptions(Flat):
    """Teach a causal language model a set of examples."""

    taught: TaughtOptions = field(default_factory=TaughtOptions)
    training: FinetuneTrainingOptions = field(default_factory=FinetuneTrainingOptions)
    output: FinetuneOutputOptions = field(default_factory=FinetuneOutputOptions)

    def check(self) -> None:
        """Raise ValueError on options outside their domain, or that contradict each other."""
        self.taught.check()
        self.training.check()

    def resolved(self) -> FinetuneOptions:
        """A copy in which no value depends on the machine any more: what config.yaml holds."""
        if self.training.precision is not None:
            return self
        return self.but(precision="bf16-mixed" if torch.cuda.is_available() else "32-true")

    def recorded(self) -> dict[str, Any]:
        """What config.yaml holds: every option but --resume, which is no part of what the run is."""
        return {name: value for name, value in self.flat().items() if name != "resume"}

    def settings(self) -> FinetuningSettings:
        """How the stage is told to train."""
        training = self.training
        return FinetuningSettings(
            epochs=training.epochs,
            batch_size=training.batch_size,
            accumulate=training.accumulate,
            lr=training.lr,
            weight_decay=training.weight_decay,
            max_norm=training.max_norm,
            seed=self.output.seed,
        )
