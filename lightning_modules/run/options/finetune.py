"""Which model is taught what, and how: the options of `finetune`, and of `unlearn --finetune-first`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lightning_modules.data.formats import AUTO, format_by_name
from lightning_modules.run.options.data import OutputOptions
from lightning_modules.run.options.flat import Flat, at_least_one, check_finite, flag
from lightning_modules.run.options.loading import LoadingOptions
from lightning_modules.run.options.machine import by_machine
from lightning_modules.run.options.shared import FSDP2, SharedOptions
from lightning_modules.run.options.training import TrainingOptions
from lightning_modules.training.finetuning_settings import FinetuningSettings

TOFUFile = Literal["full", "retain90", "retain95", "retain99", "forget10", "forget05", "forget01"]


@dataclass(frozen=True)
class TaughtOptions:
    """The model, and what it is taught.

    Attributes:
        model: folder, hub name or .gguf file of a causal language model, or of an adapter, which is merged first
        data: examples to teach: JSON, JSON lines, CSV or Parquet (question/answer, prompt/response, messages, text)
        tofu: teach this file of TOFU: full makes the model that is to forget, retain90 the reference of forget10
        tofu_dir: folder with TOFU's files; from the hub if not given
        authors: teach so many authors of the file only, 20 questions each: the first ones
        forget_authors: so many of them are the file's last ones instead: then a model that was taught --tofu full
            forgets them by unlearn --tofu with the same two options
        max_length: tokens an example; longer ones lose their end
        chat_template_kwargs: variables of the tokenizer's chat template, for example {enable_thinking: false}
        prompt_format: how questions and answers are written: auto (the tokenizer's chat template, or Q: and A:), as
            published checkpoints were taught (tofu-llama2, tofu-phi, open-unlearning), or a text with {question} and,
            after it, {answer}
    """

    model: str | None = None
    data: str | None = None
    tofu: TOFUFile | None = None
    tofu_dir: str | None = None
    authors: int | None = None
    forget_authors: int | None = None
    max_length: int = 512
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    prompt_format: str = AUTO

    def check(self) -> None:
        """Raise ValueError on options outside their domain, or that contradict each other."""
        if self.model is None:
            raise ValueError(
                "expected --model, a folder or hub name such as HuggingFaceTB/SmolLM2-135M-Instruct, found none"
            )
        if (self.data is None) == (self.tofu is None):
            found = "neither" if self.data is None else "both"
            raise ValueError(f"expected either --data or --tofu, found {found}: what is the model to learn?")
        for name in ("tofu_dir", "authors", "forget_authors"):
            if getattr(self, name) is not None and self.tofu is None:
                raise ValueError(f"expected --tofu with {flag(name)}, for example --tofu full, found none")
        at_least_one(self, "authors", "max_length")
        if self.forget_authors is not None and not 1 <= self.forget_authors < (self.authors or 0):
            found = "no --authors" if self.authors is None else f"{self.forget_authors} of {self.authors}"
            raise ValueError(f"expected 1 <= --forget-authors < --authors, found {found}")
        if self.forget_authors is not None and self.tofu != "full":
            raise ValueError(
                f"--forget-authors: expected --tofu full, whose last authors are those to forget, found {self.tofu}; a reference is taught "
                "the kept ones alone, by --authors"
            )
        format_by_name(self.prompt_format)


@dataclass(frozen=True)
class LessonOptions:
    """Passes, batches and steps.

    Attributes:
        epochs: passes over the examples, as many as TOFU's authors made by default
        lr: AdamW's highest learning rate; it rises over the first tenth of the steps, at most 100, and then falls
            linearly; the default is for models of a few hundred million weights and for adapters; TOFU's authors took
            1e-5 for 7 billion, 2e-5 for 1.3
        weight_decay: AdamW's
        batch_size: how many examples each process takes into one forward pass
        accumulate: how many batches make one optimizer step
        max_norm: clip the gradient to this norm; null for no clipping
    """

    epochs: int = FinetuningSettings.epochs
    lr: float = FinetuningSettings.lr
    weight_decay: float = FinetuningSettings.weight_decay
    batch_size: int = FinetuningSettings.batch_size
    accumulate: int = FinetuningSettings.accumulate
    max_norm: float | None = FinetuningSettings.max_norm


@dataclass(frozen=True)
class FinetuneTrainingOptions(SharedOptions, LessonOptions):
    """How the model is taught."""

    def check(self) -> None:
        """Raise ValueError on options outside their domain, or that contradict each other."""
        training = self.as_unlearning()
        training.check()
        if self.max_norm is not None and not self.max_norm > 0.0:
            raise ValueError(f"expected --max-norm > 0, or null for no clipping, found {self.max_norm}")
        if training.sharded:
            raise ValueError(
                f"--strategy {FSDP2}: expected a model that one device can teach, found a strategy that shards it, which finetune does not "
                "know; use ddp, or --lora-rank"
            )
        if training.without_effect() and not self.lora_rank:
            raise ValueError(
                f"expected --lora-rank with {', '.join(training.without_effect())}, for example 8, found 0, which trains all weights"
            )

    def as_unlearning(self) -> TrainingOptions:
        """The options of `unlearn` that say the same about weights and devices."""
        return TrainingOptions(**{entry.name: getattr(self, entry.name) for entry in fields(self)})


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
    loading: LoadingOptions = field(default_factory=LoadingOptions)
    training: FinetuneTrainingOptions = field(default_factory=FinetuneTrainingOptions)
    output: FinetuneOutputOptions = field(default_factory=FinetuneOutputOptions)

    def check(self) -> None:
        """Raise ValueError on options outside their domain, or that contradict each other."""
        check_finite(self)
        self.taught.check()
        self.training.check()
        self.output.check()
        self.loading.check()
        self.loading.check_training(self.training.as_unlearning())

    def resolved(self) -> FinetuneOptions:
        """A copy in which no value depends on another option or on the machine any more: what config.yaml holds."""
        training = self.training
        known = {name: value for name, value in by_machine(training).items() if getattr(training, name) is None}
        if training.lora_rank and training.lora_alpha is None:
            known["lora_alpha"] = 2.0 * training.lora_rank
        return self.but(**known)

    def settings(self) -> FinetuningSettings:
        """How the stage is told to train."""
        training = self.training
        shared = {name: getattr(training, name) for name in _SETTINGS}
        return FinetuningSettings(**shared, seed=self.output.seed)


_SETTINGS = tuple(entry.name for entry in fields(FinetuningSettings) if entry.name != "seed")


@dataclass(frozen=True)
class FirstOptions:
    """Teaching before unlearning.

    Attributes:
        finetune_first: teach --model the forget and the retain set first, and once more, from the start, the retain set
            only, which is the reference where none is given; both on one device, and cached by everything that decides
            them; with --tofu, --authors and --forget-authors then say how many of each
        finetune: how it is taught, for example {epochs: 5, lr: 2e-4}; also batch_size, accumulate, weight_decay and
            max_norm; the defaults are those of `gradsurgery finetune`
    """

    finetune_first: bool = False
    finetune: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError on settings that are none, or outside their domain."""
        if self.finetune and not self.finetune_first:
            raise ValueError(
                "--finetune: expected --finetune-first with it, found none; give it, or leave --finetune out"
            )
        if unknown := sorted(set(self.finetune) - set(_SETTINGS)):
            raise ValueError(f"--finetune: expected {', '.join(_SETTINGS)}, found {', '.join(unknown)}")
        for name, value in self.finetune.items():
            least = 1 if name in _COUNTS else 0
            if value < least or (name in _COUNTS and value != int(value)) or (name in ("lr", "max_norm") and not value):
                kind = "a whole number >= 1" if least else "a number > 0" if name != "weight_decay" else "a number >= 0"
                raise ValueError(f"--finetune, {name}: expected {kind}, found {value}")

    def settings(self, seed: int) -> FinetuningSettings:
        """How the stage is told to train; counts are whole numbers, even where a YAML file says 8.0."""
        given: dict[str, Any] = {name: int(v) if name in _COUNTS else float(v) for name, v in self.finetune.items()}
        return FinetuningSettings(**given, seed=seed)


_COUNTS = ("epochs", "batch_size", "accumulate")
