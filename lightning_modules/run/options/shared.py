"""Which weights are trained, and on what: the options that `unlearn` and `finetune` share."""

# No __future__ here: for annotations that are strings, jsonargparse would execute what derived classes' modules import
# for type checkers only, and that is torch.
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_modules.run.options.flat import flag
from lightning_modules.training.adapter_settings import AdapterSettings

FSDP2 = "fsdp2"
"""The strategy that is ours and not Lightning's."""


@dataclass(frozen=True)
class SharedOptions:
    """Adapters, devices, and what is said about the run itself.

    Attributes:
        save: what is left in model/: the weights with the adapters merged into them, or the adapter alone, as PEFT
            saves it, for the model that --model names
        lora_rank: train adapters of this rank instead of all weights; 0 for no adapters
        lora_alpha: adapters are scaled by alpha / rank, or alpha / sqrt(rank) with rslora; by default twice the rank
        lora_targets: which modules have adapters: all-linear for every linear layer but the head, or names such as
            q_proj,v_proj
        lora_dropout: dropout on the adapters' input while training
        lora_kind: plain LoRA, DoRA (a trained length for each row of the weight), or rank-stabilised LoRA
        checkpoint_every: optimizer steps between checkpoints, besides one after every epoch; null for epochs only
        gradient_checkpointing: keep the input of every layer alone for the backward pass, which computes the rest
            again: the same steps with less memory, a third more time
        padding_free: read the texts of a batch without padding, several in a row, and what they begin with in common,
            such as a system prompt, once: the same steps up to rounding, of fewer tokens; a model whose attention does
            not allow it, which is tried out, and one with dropout go on with padding; by default with a --model on
            a CPU, without --compile and shards
        compile: have torch.compile make one program of the model's layers for the training steps: the first one takes
            half a minute for the smallest model, and it pays in long trainings at best; it needs a C++ compiler on a
            CPU, and Triton on a GPU
        precision: the precision, by Lightning's name; by default bf16-mixed with a --model on a CUDA GPU, or
            on a CPU with AMX or ARM's bfloat16, and 32-true elsewhere
        devices: number of devices, or auto
        num_nodes: number of machines that train together; torchrun or srun starts the command on each
        strategy: how devices share the work: auto, ddp or another name of Lightning's under which each holds the model
        logger: log the loss of every step into logs/ of the output folder: csv, tensorboard or wandb
        callbacks: further callbacks of Lightning, best given in the YAML file of --config: a list of {class_path: ...,
            init_args: {...}}
        resume: go on with the interrupted run in --output, with its config.yaml
        dry_run: say what would be done, and in how much memory, and do nothing
    """

    save: Literal["merged", "adapter"] = "merged"
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: str | list[str] = "all-linear"
    lora_dropout: float = 0.0
    lora_kind: Literal["lora", "dora", "rslora"] = "lora"
    checkpoint_every: int | None = None
    gradient_checkpointing: bool = False
    padding_free: bool | None = None
    compile: bool = False
    precision: str | None = None
    devices: str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    logger: Literal["csv", "tensorboard", "wandb"] | None = None
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    resume: bool = False
    dry_run: bool = False

    @property
    def sharded(self) -> bool:
        """Whether the model is sharded over the devices."""
        return self.strategy == FSDP2

    @property
    def processes(self) -> int:
        """How many processes train together, one for each device of each machine."""
        import torch  # only here: the parser needs these options before torch is there

        here = max(1, torch.cuda.device_count()) if self.devices == "auto" else int(self.devices)
        return here * self.num_nodes

    def adapters(self, seed: int) -> AdapterSettings:
        """What the adapters are, without any a rank of 0."""
        return AdapterSettings(
            self.lora_rank,
            self.lora_alpha,
            self.lora_targets,
            self.lora_dropout,
            self.lora_kind,
            seed=seed,
        )

    def check_compiled(self, retain_inside: float) -> None:
        """Raise ValueError on a method whose graphs cannot be compiled."""
        if self.compile and retain_inside:
            raise ValueError(
                f"--retain-inside: expected 0 with --compile, found {retain_inside}: the retain loss's graph is run backward twice, which "
                "a compiled one cannot; leave one of them out"
            )

    def without_effect(self) -> list[str]:
        """The options about adapters that are given although nothing is adapted."""
        default = SharedOptions()
        about = ("lora_alpha", "lora_targets", "lora_dropout", "lora_kind")
        return [flag(name) for name in about if getattr(self, name) != getattr(default, name)]
