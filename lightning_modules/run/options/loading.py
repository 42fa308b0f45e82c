"""How a model's files become a model: the options of every command that loads one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lightning_modules.run.options.flat import flag
from lightning_modules.run.options.shared import FSDP2
from lightning_modules.run.options.training import TrainingOptions


@dataclass(frozen=True)
class LoadingOptions:
    """How models are loaded.

    Attributes:
        dtype: type in which the weights of the models are held; bfloat16 takes half the memory, and where a model is
            trained it needs adapters (--lora-rank), which, with all updates, stay float32
        attn_implementation: the code that computes attention, by Transformers' name, such as eager, sdpa or
            flash_attention_2; by default the one that Transformers chooses
        revision: branch, tag or commit of --model on the hub; by default its main branch
        trust_remote_code: run the Python code that comes with a model; false refuses models that need it
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def check(self, *, scratch: bool = False) -> None:
        """Raise ValueError on options that say nothing.

        Args:
            scratch: Whether the model is trained here, and not loaded.
        """
        if scratch and (said := self.stated()):
            raise ValueError(
                f"{', '.join(map(flag, said))}: expected --model, which is loaded so, found the model from scratch, which is trained here; "
                "leave it out"
            )
        for name in ("attn_implementation", "revision"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"{flag(name)}: expected a name, found {value!r}; leave it out for the default")

    def check_training(self, training: TrainingOptions) -> None:
        """Raise ValueError where the type of the weights would lose updates, or be turned into another one.

        Args:
            training: Of the weights of a model; ULD's assistant is always made of adapters.
        """
        if self.dtype == "float32":
            return
        if not training.lora_rank:
            raise ValueError(
                f"--dtype {self.dtype}: expected --lora-rank with it, whose adapters are float32, found 0, which trains all weights: "
                "an update below a 512th of such a weight is rounded away; use --dtype float32, with --precision bf16-mixed where speed "
                "asks for it"
            )
        if training.lora_init == "fila":
            raise ValueError(
                f"--dtype {self.dtype}: expected adapters that leave the weights as they are, found --lora-init fila, which takes its "
                "start out of them, and the rest would be rounded; use --dtype float32"
            )
        if training.sharded:
            raise ValueError(
                f"--dtype {self.dtype}: expected float32 with --strategy {FSDP2}, whose shards have one type, found {self.dtype}; use "
                "--precision bf16-mixed there, which computes in bfloat16"
            )

    def stated(self) -> list[str]:
        """The options that differ from their defaults."""
        default = LoadingOptions()
        return [entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(default, entry.name)]

    def of_reference(self) -> LoadingOptions:
        """The same for a model of another place: a revision is one of --model."""
        return replace(self, revision=None)

    def in_float32(self) -> LoadingOptions:
        """The same with float32 weights."""
        return replace(self, dtype="float32")

    @property
    def files(self) -> dict[str, Any]:
        """What Transformers is told whatever it loads: configuration, tokenizer or weights.

        Without a word about foreign code it would ask whoever sits at the terminal, and wait.
        """
        return {"trust_remote_code": self.trust_remote_code, **self.at}

    @property
    def at(self) -> dict[str, Any]:
        """The revision, where one is given."""
        return {"revision": self.revision} if self.revision else {}

    @property
    def weights(self) -> dict[str, Any]:
        """What it is told about weights besides."""
        attention = {"attn_implementation": self.attn_implementation} if self.attn_implementation else {}
        return {"dtype": self.dtype, **attention}


USUAL = LoadingOptions()
"""Float32 weights, and nothing of a model is executed."""
