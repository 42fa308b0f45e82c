"""The sections of a grid that all its rows share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_modules.run.options import Split


@dataclass(frozen=True)
class Data:
    """What is to be forgotten and kept; the names and meanings are those of `unlearn`."""

    tofu: Split | None = None
    tofu_dir: str | None = None
    authors: int = 10
    forget_authors: int | None = None
    forget: str | None = None
    retain: str | None = None
    reference: str | None = None
    max_length: int = 512


@dataclass(frozen=True)
class Scratch:
    """The small Llama that is trained first: arguments of `lightning_modules.training.scratch.scratch_model`."""

    hidden_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    epochs: int = 25
    batch_size: int = 8
    lr: float = 2e-3


@dataclass(frozen=True)
class Train:
    """What all methods share, unless a row says otherwise.

    Attributes:
        max_epochs: Passes over the forget set after which a target counts as not reached.
        evaluate_every: Steps between scores; targets are bisected between two of them.
    """

    lr: float = 3e-4
    optimizer: str = "AdamW"
    weight_decay: float = 0.01
    warmup_steps: int = 5
    batch_size: int = 8
    max_norm: float | None = None
    precision: str = "32-true"
    max_epochs: int = 40
    evaluate_every: int = 2


@dataclass(frozen=True)
class Evaluate:
    """How much is scored.

    Attributes:
        tolerance: A match is within this share of its target.
        forget_examples: Forget examples scored everywhere, the first ones.
        curve_examples: Retain examples scored along the way, evenly spread; with a target for them, as many as at a match.
        retain_examples: Retain examples whose probability is scored at a match, evenly spread.
        generated_examples: Examples of each split whose answers are generated at a match, evenly spread.
        max_new_tokens: Of a generated answer.
        batch_size: Texts a forward pass.
    """

    tolerance: float = 0.04
    forget_examples: int = 400
    curve_examples: int = 48
    retain_examples: int = 400
    generated_examples: int = 48
    max_new_tokens: int = 64
    batch_size: int = 64


@dataclass(frozen=True)
class Targets:
    """Where methods are compared.

    Attributes:
        forget_probability: Mean over the forget examples, met on the way.
        forget_nll: The same; "reference" is the retrained model's.
        retain_probability: Mean over the retain examples, met on the way.
        retained: Share of the start's retain probability that is restored in what a method ends with, by mixing with the start model
            (UWC, 2406.09179; see `equal_retention`). A method ends where it has met the other targets.
    """

    forget_probability: tuple[float, ...] = ()
    forget_nll: tuple[float | Literal["reference"], ...] = ()
    retain_probability: tuple[float, ...] = ()
    retained: tuple[float, ...] = ()

    @property
    def on_the_way(self) -> dict[str, tuple[float | Literal["reference"], ...]]:
        """Score -> values that are met while a method goes on."""
        return {name: values for name, values in vars(self).items() if name != "retained"}


@dataclass(frozen=True)
class Seeds:
    """Every method sees every pair of them, so that differences are paired."""

    data: tuple[int, ...] = (0,)
    model: tuple[int, ...] = (0,)
