"""Matching: methods forget at different speeds, so each is looked at where it has forgotten as much as the target says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

FALLS = {"forget_probability": True, "forget_nll": False, "retain_probability": True}
"""Score that a target can be set for -> whether it falls while a model unlearns."""


class Match(NamedTuple):
    """Where on the path the score met its target, what it was there, and how often it was computed."""

    position: float
    value: float
    calls: int


class Target(NamedTuple):
    """A value of one of the scores in `FALLS`, and what the table calls it."""

    metric: str
    value: float
    name: str

    def passed(self, value: float) -> bool:
        """Whether a model with this score has reached the target; NaN has not."""
        return value <= self.value if FALLS[self.metric] else value >= self.value


def match(
    move: Callable[[float], None],
    score: Callable[[], float],
    target: float,
    *,
    ends: tuple[float, float] | None = None,
    tolerance: float = 0.04,
    max_calls: int = 30,
) -> Match:
    r"""Go along a path of states to where a score meets its target, by bisection, and stay there.

    The path may be anything with a position in [0, 1]: the line between two parameter vectors (`between`), the mix of a model and its
    start. The score need not be monotone, only continuous: bisection finds one of the places where it meets the target.

    Args:
        move: Takes the state to a position.
        score: Of the state where it is.
        target: The value to meet.
        ends: The scores at 0 and 1, where they are known.
        tolerance: The score found is within this share of the target.
        max_calls: Scores to compute before giving up.

    Raises:
        ValueError: If the scores at the ends do not enclose the target.
        RuntimeError: If the score jumps over the target.

    Example:
        >>> at = [0.0]
        >>> found = match(lambda position: at.__setitem__(0, position), lambda: 1 - at[0] ** 2, 0.5, tolerance=0.01)
        >>> round(found.position, 2), at[0] == found.position
        (0.71, True)
    """
    calls = 0
    if ends is None:
        first, last = _scored(move, score, 0.0), _scored(move, score, 1.0)
        calls = 2
    else:
        first, last = ends
    if not min(first, last) <= target <= max(first, last):
        raise ValueError(f"expected the target {target:g} between the scores at the ends, found {first:g} and {last:g}")
    for position, value in ((1.0, last), (0.0, first)):
        if abs(value - target) <= tolerance * abs(target):
            move(position)
            return Match(position, value, calls)
    low, high = 0.0, 1.0
    while calls < max_calls:
        position = (low + high) / 2
        value = _scored(move, score, position)
        calls += 1
        if abs(value - target) <= tolerance * abs(target):
            return Match(position, value, calls)
        if (value < target) == (first < target):
            low = position
        else:
            high = position
    raise RuntimeError(
        f"expected the score to meet {target:g} within {tolerance:.0%} between {first:g} and {last:g}, found none in {max_calls} "
        "tries: it jumps there; evaluate more often, or use a lower learning rate"
    )


def between(parameters: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> Callable[[float], None]:
    """The line from one parameter vector (position 0) to another (position 1): a path for `match`."""

    @torch.no_grad()
    def move(position: float) -> None:
        for parameter, old, new in zip(parameters, before, after, strict=True):
            parameter.copy_(torch.lerp(old, new, position))

    return move


class MatchTargets(Callback):
    """Score the model while it trains, find where each target is met, describe the model there, and stop when all are.

    Between two scores on either side of a target the parameters are bisected; then they are put back, so that training goes on as if
    nobody had looked.

    Args:
        targets: Each met once, in whatever order.
        score: Model -> scores by name, at least those of the targets; it runs every `every_n_steps`, at the start and the end.
        describe: Model at a match -> what is to be known of it.
        every_n_steps: Optimizer steps between scores.
        tolerance: See `match`.
        progress: Model -> numbers that grow with the steps (counts of conflicts), for the rows of matches.

    Attributes:
        curve: One dictionary for each score, with `step` and `seconds` (of training alone).
        matches: Target -> description with `step`, `seconds`, and the score that was matched.
        missed: Target -> why it was not met.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        score: Callable[[nn.Module], Mapping[str, float]],
        describe: Callable[[nn.Module], Mapping[str, Any]],
        *,
        every_n_steps: int = 2,
        tolerance: float = 0.04,
        progress: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.score, self.describe, self.progress = score, describe, progress
        self.every_n_steps, self.tolerance = every_n_steps, tolerance
        self.open = list(targets)
        self.curve: list[dict[str, float]] = []
        self.matches: dict[Target, dict[str, Any]] = {}
        self.missed: dict[Target, str] = {}
        self._before: list[Tensor] = []
        self._started = self._away = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the start; a target that it passes can never be met."""
        self._started = time.perf_counter()
        self._look(trainer, pl_module)
        for target in [target for target in self.open if target.passed(self.curve[0][target.metric])]:
            self._miss(target, f"{target.metric} was {self.curve[0][target.metric]:.4g} before the first step")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Score every so many steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the end, and say of what is still open how far it came."""
        self._look(trainer, pl_module)
        last = self.curve[-1]
        for target in list(self.open):
            reached = f"{target.metric} was {last[target.metric]:.4g} after {last['step']:.0f} steps"
            self._miss(target, f"not reached: {reached} ({trainer.current_epoch} epochs)")

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, model = trainer.global_step, pl_module.get_submodule("model")
        if self.curve and self.curve[-1]["step"] >= step:
            return
        came = time.perf_counter()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        after = [parameter.detach().clone() for parameter in parameters]
        point = {"step": float(step), "seconds": came - self._started - self._away, **self.score(model)}
        if self.curve:
            for target in [target for target in self.open if target.passed(point[target.metric])]:
                self._match(target, model, between(parameters, self._before, after), point)
            between(parameters, after, after)(1.0)
        self.curve.append(point)
        for target in [target for target in self.open if not math.isfinite(point[target.metric])]:
            self._miss(target, f"diverged: {target.metric} is {point[target.metric]} after {step} steps")
        self._before = after
        self._away += time.perf_counter() - came
        trainer.should_stop = trainer.should_stop or not self.open

    def _match(
        self, target: Target, model: nn.Module, move: Callable[[float], None], point: Mapping[str, float]
    ) -> None:
        last = self.curve[-1]
        ends = last[target.metric], point[target.metric]
        try:
            found = match(
                move, lambda: self.score(model)[target.metric], target.value, ends=ends, tolerance=self.tolerance
            )
        except RuntimeError as error:
            self._miss(target, str(error))
            return
        mixed = {name: last[name] + found.position * (point[name] - last[name]) for name in ("step", "seconds")}
        self.open.remove(target)
        self.matches[target] = {**mixed, **self.progress(), "matched": found.value, **self.describe(model)}

    def _miss(self, target: Target, reason: str) -> None:
        self.open.remove(target)
        self.missed[target] = reason


def _scored(move: Callable[[float], None], score: Callable[[], float], position: float) -> float:
    move(position)
    return score()
