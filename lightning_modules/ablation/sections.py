"""The sections of a grid that all its rows share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_modules.run.options import TOFUSplit


@dataclass(frozen=True)
class Data:
    """What is to be forgotten and kept. These are the options of `unlearn` with the same names, and `stale_share`.

    Attributes:
        stale_share: Share of the retain answers in whose place training sees the answer to the most similar other
            question, as if it were of an older state of the world. Scores are those of the right answers.
    """

    tofu: TOFUSplit | None = None
    tofu_dir: str | None = None
    authors: int = 10
    forget_authors: int | None = None
    forget: str | None = None
    retain: str | None = None
    retain_heldout: str | None = None
    heldout_authors: int = 0
    reference: str | None = None
    max_length: int = 512
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    stale_share: float = 0.0


@dataclass(frozen=True)
class Scratch:
    """The small Llama that is trained first, as arguments of `lightning_modules.training.scratch.scratch_model`."""

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
        max_epochs: Passes over the forget set, after which a target counts as not reached.
        evaluate_every: Steps between two scores. A target between the two is found by bisection.
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
        tolerance: A match may differ from its target by this share of it.
        forget_examples: Forget examples that are scored, the first ones.
        curve_examples: Retain examples that are scored along the way, evenly spaced. If there is a target for them, it
            is the `retain_examples` that are scored.
        retain_examples: Retain examples whose probability is scored at a match, evenly spaced.
        generated_examples: Examples of each split whose answers are generated at a match, evenly spaced.
        max_new_tokens: Of a generated answer.
        batch_size: Texts in a forward pass.
        attacks: Relearning attacks by name, each a column of the table: what the mean probability of the untaught
            forget answers is after a quarter of them has been taught again to a copy, for example
            {A20: {steps: 20, lr: 5e-5}} (`lightning_modules.training.callbacks.RelearnSettings`). They are run where a
            method ends, and on the reference.
        attack_matches: Run them at every other target too.
        utility: Score TOFU's Model Utility too, and its nine numbers, on as many examples of retain, real authors and
            world facts as `generated_examples` says. The data has to have them: TOFU's, with a ready model.
        autocast: Score and attack under autocast to bfloat16: faster where the processor is made for it, and
            less exact. `train.precision` says how the methods train.
    """

    tolerance: float = 0.04
    forget_examples: int = 400
    curve_examples: int = 48
    retain_examples: int = 400
    generated_examples: int = 48
    max_new_tokens: int = 64
    batch_size: int = 64
    attacks: dict[str, dict[str, float]] = field(default_factory=dict)
    attack_matches: bool = False
    utility: bool = False
    autocast: bool = False


@dataclass(frozen=True)
class Targets:
    """Where methods are compared.

    Attributes:
        forget_probability: Mean over the forget examples, met on the way.
        forget_nll: Mean over the forget examples, met on the way; "reference" stands for that of the reference.
        retain_probability: Mean over the retain examples, met on the way.
        retained: Share of the start's retain probability. It is restored in the model with which a method ends, by
            mixing that model with the start model (UWC, 2406.09179; see `equal_retention`). A method ends where it has
            met all other targets, or with `end` at its own end.
        end: With "own" every method trains until its own end: its `steps` or `epochs` are over or its `stop_below` is
            reached, and its finish or its distillation is done. It is scored there, too. Otherwise training stops where
            all other targets are met.
    """

    forget_probability: tuple[float, ...] = ()
    forget_nll: tuple[float | Literal["reference"], ...] = ()
    retain_probability: tuple[float, ...] = ()
    retained: tuple[float, ...] = ()
    end: tuple[Literal["own"], ...] = ()

    @property
    def on_the_way(self) -> dict[str, tuple[float | Literal["reference"], ...]]:
        """Score -> values that a method meets while it forgets."""
        return {name: values for name, values in vars(self).items() if name in _ON_THE_WAY}


_ON_THE_WAY = ("forget_probability", "forget_nll", "retain_probability")


@dataclass(frozen=True)
class Seeds:
    """Every method is run with every pair of seeds, so that differences between methods are paired."""

    data: tuple[int, ...] = (0,)
    model: tuple[int, ...] = (0,)
