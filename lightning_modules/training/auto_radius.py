r"""`radius="auto"`: how far weights may move before the model remembers worse, measured on the model itself.

The forget gradient is taken where the model remembers best. From the weights $\theta$ of the model before unlearning,
along the way u that the perturbation takes, the cross-entropy of a forget batch,

$$L(\rho) = L(\theta - \rho u),$$

falls first and rises soon, because u is a straight line and the loss is not. Its lowest point is the radius to start
with. As the model forgets, that point moves away, so the radius grows: to `GROWTH` times the start.

Measured: L is lowest at 0.2 to 0.4 for the small Llama, where a recipe that was tuned by hand goes from 0.2 to 1, and
between 0.01 and 0.1 for SmolLM2-135M, where .03 to .3 works and 0.5 breaks the perturbed model. How far a relearning
attack moves the weights does not tell them apart: AdamW moves each weight by about its learning rate a step, so the
way grows with the number of weights, 0.8 for the small one and several units for the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.optimizer.perturbation import Scale
from lightning_modules.data.examples import evenly_spaced
from lightning_modules.data.tokenization import IGNORED, Encoded, collate
from lightning_modules.evaluation.likelihood import device_of, evaluation_mode
from lightning_modules.progress import Stage
from lightning_modules.training.heads import AnswerHead, answer_values

GROWTH = 5.0
"""The last radius over the first."""

_RATIO = 2.0**0.5
_TRIES = 24


@dataclass(frozen=True)
class RadiusSearch:
    """How the radius is searched.

    Attributes:
        batches: Forget batches, evenly spread over the examples, each with a search of its own; the median counts.
        batch_size: Examples in a batch, as many as all processes have in one of training.
        parts: A batch is read in so many parts, one after the other, with the memory of one and a further gradient.
        scale: The unit of the radius, as in `PerturbSettings`.
    """

    batches: int = 4
    batch_size: int = 8
    parts: int = 1
    scale: Scale = "global"

    def count(self, examples: int) -> int:
        """Batches that so many forget examples give; each is searched with a backward pass."""
        return max(1, min(self.batches, examples // self.batch_size))


def measured_radius(
    model: nn.Module, forget: Sequence[Encoded], *, pad_token_id: int, settings: RadiusSearch = RadiusSearch()
) -> dict[str, float]:
    r"""Measures the radius with which to start, and that to end with, for `PerturbSettings`.

    For each batch, $\rho$ goes up (or down) from $L / \langle \nabla L, u \rangle$, where a straight line would reach
    zero, by a factor of $\sqrt 2$ a try as long as the loss falls. Everything is in the weights' own precision and
    without dropout, and rounded to two digits, so that processes on other machines find the same. The weights are
    restored bit for bit.

    Args:
        model: Before unlearning; what it trains is moved (of adapters, their weights).
        forget: Forget examples.
        pad_token_id: Of the tokenizer.
        settings: Of the search.

    Returns:
        `{"start": ..., "end": ...}`.

    Raises:
        ValueError: If there are no examples, nothing is trained, or the loss of a batch falls nowhere.

    Cost: for each batch a forward and a backward pass and about five forward passes, and a copy of the gradient and of
    the trained weights.
    """
    if not forget:
        raise ValueError("radius auto: expected forget examples to measure it on, found none")
    count = settings.count(len(forget))
    rows = evenly_spaced(forget, count * settings.batch_size)
    batches = [collate(rows[number::count], pad_token_id) for number in range(count)]
    stage = Stage("Measuring the radius, batches", count)
    found: list[float] = []
    with evaluation_mode(model):
        head, device = AnswerHead(model), device_of(model)
        for batch in batches:
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            found.append(_lowest(model, head, on_device, settings))
            stage.advance()
    start = _two_digits(median(found))
    return {"start": start, "end": _two_digits(GROWTH * start)}


def _lowest(model: nn.Module, head: AnswerHead, batch: dict[str, Tensor], settings: RadiusSearch) -> float:
    """The radius at which the batch's loss is lowest, among those tried."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not weights:
        raise ValueError("radius auto: expected a model that trains something, found every parameter frozen")
    count = (batch["labels"][:, 1:] != IGNORED).sum().clamp_min(1)

    def losses() -> Iterator[Tensor]:
        """Of the parts; together they are the mean over the tokens of the whole batch."""
        for number in range(settings.parts):
            part = {name: tensor[number :: settings.parts] for name, tensor in batch.items()}
            if len(part["labels"]):
                yield answer_values(gs.losses.cross_entropy, head.states(part), part["labels"])[0].sum() / count

    first = 0.0
    gradient: list[Tensor | None] = [None] * len(weights)
    with torch.enable_grad():
        for loss in losses():
            first += float(loss.detach())
            gradient = _plus(gradient, torch.autograd.grad(loss, weights, allow_unused=True))
    pairs = [(weight, part) for weight, part in zip(weights, gradient, strict=True) if part is not None]
    way = _way(pairs, settings.scale)
    slope = sum(float((step.double() * part.double()).sum()) for step, (_, part) in zip(way, pairs, strict=True))
    if not (math.isfinite(first) and math.isfinite(slope) and slope > 0.0):
        raise ValueError(
            f"radius auto: expected forget answers with a finite loss and a gradient, found a loss of {first:g} and a slope of {slope:g}; "
            "give a number instead"
        )
    before = [weight.detach().clone() for weight, _ in pairs]

    def at(radius: float) -> float:
        try:
            for (weight, _), step in zip(pairs, way, strict=True):
                weight.data.sub_(step, alpha=radius)
            return sum(float(loss.detach()) for loss in losses())
        finally:
            for (weight, _), known in zip(pairs, before, strict=True):
                weight.data.copy_(known)

    return _search(at, first, first / slope)


def _plus(sums: Sequence[Tensor | None], further: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums of gradients, of which a weight that no part reaches has none."""
    return [
        new if old is None else old if new is None else old.add_(new) for old, new in zip(sums, further, strict=True)
    ]


def _search(at: Callable[[float], float], first: float, guess: float) -> float:
    """The best radius of a geometric row through the guess, which ends where the loss stops to fall."""
    tried = at(guess)
    factor = _RATIO if tried < first else 1.0 / _RATIO
    best, lowest = (guess, tried) if tried < first else (0.0, first)
    radius = guess
    for _ in range(_TRIES):
        radius *= factor
        tried = at(radius)
        if tried < lowest:
            best, lowest = radius, tried
        elif best:
            break
    if not best:
        raise ValueError(
            f"radius auto: expected a loss of the forget answers that falls along its gradient, found none below {first:g} down to a "
            f"radius of {radius:.1g}; give a number instead"
        )
    return best


def _way(pairs: Sequence[tuple[Tensor, Tensor]], scale: Scale) -> list[Tensor]:
    """What the weights lose at a radius of 1, as `gradsurgery.Perturbed` moves them."""
    lengths = [float(part.double().norm()) for _, part in pairs]
    if scale == "global":
        whole = math.hypot(*lengths) or 1.0
        return [part / whole for _, part in pairs]
    sizes = [float(weight.double().norm()) for weight, _ in pairs]
    return [part * (size / (length or 1.0)) for (_, part), size, length in zip(pairs, sizes, lengths, strict=True)]


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


class SameRadius(Callback):
    """Gives every process the radius of the first one, should they have measured two."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002 (Lightning's signature)
        """Before the first step."""
        module: Any = pl_module
        if module.perturb is not None:
            start, end = trainer.strategy.broadcast((module.perturb.start, module.perturb.end))
            module.perturb = replace(module.perturb, start=start, end=end)
