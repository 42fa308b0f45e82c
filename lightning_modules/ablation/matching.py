"""Matching: methods forget at different speeds, so each is looked at where it has forgotten as much as the target says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
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


class Matching:
    """Targets met along a path of states that are looked at one after another.

    Between two states on either side of a target the path is bisected.

    Args:
        targets: Each met once, in whatever order.
        score: Model -> scores by name, at least those of the targets.
        describe: Model at a match -> what is to be known of it.
        tolerance: See `match`.
        progress: Numbers that grow along the path (counts of conflicts), for the rows of matches.

    Attributes:
        curve: One dictionary for each state: where it is (`step`, `seconds`), and its scores.
        matches: Target -> description with where on the path it is, and the score that was matched.
        missed: Target -> why it was not met.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        score: Callable[[nn.Module], Mapping[str, float]],
        describe: Callable[[nn.Module], Mapping[str, Any]],
        *,
        tolerance: float = 0.04,
        progress: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.score, self.describe, self.progress, self.tolerance = score, describe, progress, tolerance
        self.open = list(targets)
        self.curve: list[dict[str, float]] = []
        self.matches: dict[Target, dict[str, Any]] = {}
        self.missed: dict[Target, str] = {}

    def look(self, model: nn.Module, at: Mapping[str, float], move: Callable[[float], None]) -> None:
        """Score a state, find the targets between the last state and this one, and come back to this one.

        Args:
            model: In the state.
            at: Where on the path it is: numbers between which can be interpolated.
            move: Takes the model from the last state (0) to this one (1).
        """
        point = {**at, **self.score(model)}
        passed = [target for target in self.open if target.passed(point[target.metric])]
        if not self.curve:
            for target in passed:
                self._miss(target, f"{target.metric} was {point[target.metric]:.4g} before the first step")
        else:
            for target in passed:
                self._match(target, model, move, point, at)
            move(1.0)
        self.curve.append(point)
        for target in [target for target in self.open if not math.isfinite(point[target.metric])]:
            where = f"{point['step']:.0f} steps" + (f", weight {point['weight']:.4g}" if "weight" in point else "")
            self._miss(target, f"diverged: {target.metric} is {point[target.metric]} after {where}")

    def close(self, where: str) -> None:
        """Say of what is still open how far it came."""
        for target in list(self.open):
            reached = f"{target.metric} was {self.curve[-1][target.metric]:.4g}"
            self._miss(target, f"not reached: {reached} {where}")

    def give_up(self, reason: str) -> None:
        """Say of what is still open why nobody will look for it any more."""
        for target in list(self.open):
            self._miss(target, reason)

    def _match(
        self,
        target: Target,
        model: nn.Module,
        move: Callable[[float], None],
        point: Mapping[str, float],
        at: Mapping[str, float],
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
        mixed = {name: last[name] + found.position * (point[name] - last[name]) for name in at}
        self.open.remove(target)
        self.matches[target] = {**mixed, **self.progress(), "matched": found.value, **self.describe(model)}

    def _miss(self, target: Target, reason: str) -> None:
        self.open.remove(target)
        self.missed[target] = reason


def _scored(move: Callable[[float], None], score: Callable[[], float], position: float) -> float:
    move(position)
    return score()
