"""How fast forgotten answers return when some of them, or something else, is taught."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradsurgery as gs
from lightning_modules.data.examples import evenly_spaced
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.evaluation.intervals import mean_interval
from lightning_modules.evaluation.likelihood import device_of
from lightning_modules.progress import Stage
from lightning_modules.training.adapters import AdapterSettings, adapt
from lightning_modules.training.callbacks.probe import Probe, plain_copy
from lightning_modules.training.displacement import Displacement
from lightning_modules.training.heads import AnswerHead, answer_values
from lightning_modules.training.merging import merged
from lightning_modules.training.probability import mean_and_each, mean_probabilities


@dataclass(frozen=True)
class RelearnSettings:
    """What a model is taught again, and how often it is scored.

    Attributes:
        steps: Optimizer steps.
        every: Steps between scores; the start and the end are scored too.
        also: Further steps after which it is scored.
        lr: Learning rate.
        batch_size: Examples a step.
        share: Of the forget answers that is taught.
        seed: Of the order of the batches, and of the adapters.
        lora_rank: Teach adapters of this rank on every linear layer but the head, with alpha twice the rank; 0 teaches
            all weights.
        autocast: Teach and score under autocast to bfloat16, as a run with precision bf16-mixed does; the weights stay
            float32.
    """

    steps: int = 20
    every: int = 4
    also: tuple[int, ...] = ()
    lr: float = 1e-5
    batch_size: int = 8
    share: float = 0.25
    seed: int = 0
    lora_rank: int = 0
    autocast: bool = False

    def check(self, examples: int | None) -> None:
        """Refuse settings with which nothing can be taught or tested.

        Args:
            examples: Forget examples, of which a share is taught; None where other lessons are.

        Raises:
            ValueError: If a setting is outside its domain, or the share leaves nothing to teach or nothing to test.
        """
        for name, value in (("steps", self.steps), ("every", self.every), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"relearn_probe: expected {name} >= 1, found {value}")
        if outside := [step for step in self.also if not 1 <= step <= self.steps]:
            raise ValueError(
                f"relearn_probe: expected scores after 1 to {self.steps} steps, found {outside[0]} in also"
            )
        if not (self.lr > 0.0 and math.isfinite(self.lr)):
            raise ValueError(f"relearn_probe: expected a learning rate > 0, found {self.lr}")
        if self.lora_rank < 0:
            raise ValueError(f"relearn_probe: expected lora_rank >= 0, found {self.lora_rank}")
        if examples is not None and not 0 < round(self.share * examples) < examples:
            raise ValueError(
                f"relearn_probe: expected a share that teaches some of the forget answers and leaves some, found share={self.share} of "
                f"{examples}"
            )


def relearn_probe(
    model: nn.Module,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded] = (),
    *,
    pad_token_id: int,
    settings: RelearnSettings = RelearnSettings(),
    lessons: Sequence[Encoded] | None = None,
) -> dict[str, Any]:
    r"""Fine-tunes a copy on part of the forget answers, and scores the answers that it was not taught.

    What was only hidden comes back together with what is taught; what is gone does not. The idea is that of Hu et al.,
    "Jogging the memory of unlearned LLMs" (2406.13356), and of "Do unlearning methods remove information from language
    model weights?" (2410.08827), which teaches some facts and tests others. With `lessons` something else is taught, as
    in the "benign" attacks of the first paper and of 2409.18025, and every forget answer is tested.

    A result needs the same probe of a reference (a model that never saw the forget set) beside it. The taught answers
    share style and names with the rest, so that some of the rise is learning and not remembering.

    Taught are round(share * n) answers, evenly spread over the n. The copy is trained by AdamW without weight decay, at
    a constant learning rate, on the mean cross-entropy of a batch's answer tokens, with batches in a shuffled order and
    dropout off. Its weights are float32 whatever the model's dtype: an update of 1e-5 is lost in bfloat16. The model
    and the global random state stay as they are.

    Args:
        model: A causal language model; adapters are merged into the copy.
        forget: n >= 2 forget examples.
        retain: Examples to score beside them; none if empty.
        pad_token_id: Of the tokenizer.
        settings: Of the teaching.
        lessons: Taught instead of forget answers.

    Returns:
        `{"steps", "lr", "batch_size", "lora_rank", "taught", "rest", "points"}`: the settings, the numbers of taught
        answers and of the rest, and a point for every score, `{"step", "taught", "rest"}` and "retain" if given, mean
        probabilities. Then `"interval"`, `[low, high]` of the last mean of the rest, from the `"values"` of its answers
        (`evaluation.intervals.mean_interval`; None for a single answer), and how far the weights went:
        `"displacement"` $\|\theta' - \theta\|_2$, and `"relative_displacement"`, that over $\|\theta\|_2$.

    Raises:
        ValueError: If a setting is outside its domain, the share leaves nothing to teach or nothing to test, or there
            are no lessons.
        RuntimeError: If the weights are sharded.

    Cost: a float32 copy of the model with AdamW's two states, gradients and the start (20 bytes a parameter), and
    `settings.steps` training steps.
    """
    settings.check(None if lessons is not None else len(forget))
    taught, rest = _taught_and_rest(forget, settings.share) if lessons is None else (list(lessons), list(forget))
    if not taught:
        raise ValueError("relearn_probe: expected lessons to teach, found none")
    splits = {"taught": taught, "rest": rest} | ({"retain": list(retain)} if retain else {})
    others = {name: rows for name, rows in splits.items() if name != "rest"}

    start = plain_copy(model).float().requires_grad_(True).eval()
    moved = Displacement(start)
    learner = adapt(start, AdapterSettings(settings.lora_rank, seed=settings.seed)).eval()
    head, order, device = AnswerHead(learner), torch.Generator().manual_seed(settings.seed), device_of(learner)

    def precision() -> torch.autocast:
        """Entered anew for every pass: autocast keeps its copies of the weights until it is left."""
        return torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast)

    points: list[dict[str, Any]] = []

    def score(step: int) -> list[float]:
        """Add a point. Returns the values of the rest."""
        with precision():
            means = mean_probabilities(learner, others, pad_token_id=pad_token_id)
            means["rest"], each = mean_and_each(learner, rest, pad_token_id=pad_token_id)
        points.append({"step": step} | {name: means[name] for name in splits})
        return each

    values = score(0)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    waiting: list[int] = []
    stage = Stage("Teaching the forgotten answers to a copy, steps", settings.steps)
    with torch.enable_grad():
        for step in range(1, settings.steps + 1):
            if len(waiting) < min(settings.batch_size, len(taught)):
                waiting += torch.randperm(len(taught), generator=order).tolist()
            rows, waiting = waiting[: settings.batch_size], waiting[settings.batch_size :]
            batch = collate([taught[row] for row in rows], pad_token_id)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with precision():
                loss = answer_values(gs.losses.cross_entropy, head.states(batch), batch["labels"])
            gs.losses.token_mean(*loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            stage.advance()
            if step % settings.every == 0 or step in settings.also or step == settings.steps:
                values = score(step)
    interval = mean_interval(values)
    length, relative = moved.to(merged(learner))
    return {
        **{name: getattr(settings, name) for name in ("steps", "lr", "batch_size", "lora_rank")},
        "taught": len(taught),
        "rest": len(rest),
        "points": points,
        "interval": None if interval is None else [interval.low, interval.high],
        "displacement": length,
        "relative_displacement": relative,
        "values": values,
    }


def _taught_and_rest(forget: Sequence[Encoded], share: float) -> tuple[list[Encoded], list[Encoded]]:
    chosen = set(evenly_spaced(range(len(forget)), round(share * len(forget)), centred=True))
    return [forget[place] for place in sorted(chosen)], [row for place, row in enumerate(forget) if place not in chosen]


class RelearnProbe(Probe):
    """Runs `relearn_probe` on the trained model at the end of training, and on a reference if there is one.

    One process does it; the trained model is never touched. Put it after `BestTradeoff`, so that it probes the model
    that is kept.

    Args:
        forget: Forget examples.
        retain: Retain examples.
        pad_token_id: Of the tokenizer.
        control: Makes the reference, a model with the same tokenizer that never saw the forget set, when it is needed.
            It may return None.
        folder: The run's folder, to write the result as "relearn" of `probes.json` for the report; None writes nothing.
        settings: Fields of `RelearnSettings`.

    Attributes:
        result: `{"model": ..., "control": ... or None}`, each as `relearn_probe` returns it; None before the end.
    """

    name = "relearn"

    def __init__(
        self,
        forget: Sequence[Encoded],
        retain: Sequence[Encoded] = (),
        *,
        pad_token_id: int,
        control: Callable[[], nn.Module | None] | None = None,
        folder: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(folder)
        self.forget, self.retain, self.control = forget, retain, control
        self.pad_token_id, self.settings = pad_token_id, RelearnSettings(**settings)

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """The results of `relearn_probe` for the model and the reference."""
        result: dict[str, Any] = {"model": self._probe(model), "control": None}
        reference = None if self.control is None else self.control()
        if reference is not None:
            result["control"] = self._probe(reference.to(device_of(model)))
        return result

    def _probe(self, model: nn.Module) -> dict[str, Any]:
        return relearn_probe(model, self.forget, self.retain, pad_token_id=self.pad_token_id, settings=self.settings)
