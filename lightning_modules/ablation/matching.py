"""Matching: methods forget at different speeds, so each is scored where it has forgotten as much as a target says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FALLS = {"forget_probability": True, "forget_nll": False, "retain_probability": True}
"""Score that a target can be set for -> whether it falls while a model unlearns."""


class Match(NamedTuple):
    """Where a score met its target.

    Attributes:
        position: On the path, in [0, 1].
        value: Of the score at this position.
        calls: How often the score was computed.
    """

    position: float
    value: float
    calls: int


class Target(NamedTuple):
    """A value that a score is to reach.

    Attributes:
        metric: The score, one of `FALLS`.
        value: Of the score.
        name: What the table calls the target.
    """

    metric: str
    value: float
    name: str

    def passed(self, value: float) -> bool:
        """Whether a model with this score has reached the target; a model with NaN has not."""
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
    """Find the position on a path of states where a score meets a target, by bisection, and leave the state there.

    A path is anything with a position in [0, 1], for example the line between two parameter vectors (`between`), or the
    mix of a model and its start. The score has to be continuous, but not monotone: bisection finds one of the positions
    where it meets the target.

    Args:
        move: Takes the state to a position.
        score: Computes the score of the state.
        target: The value to meet.
        ends: The scores at positions 0 and 1, if they are known.
        tolerance: The score may differ from the target by this share of it.
        max_calls: How many scores are computed before giving up.

    Raises:
        ValueError: If the target is not between the scores at the ends.
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
    """The straight line from one parameter vector (position 0) to another (position 1), as a path for `match`."""

    @torch.no_grad()
    def move(position: float) -> None:
        for parameter, old, new in zip(parameters, before, after, strict=True):
            parameter.copy_(torch.lerp(old, new, position))

    return move


class Matching:
    """Meet targets along a path of states, which are scored one after another.

    Where two successive states lie on either side of a target, the path between them is bisected.

    Args:
        targets: Each is met once, in whatever order.
        score: Model -> scores by name, at least those of the targets.
        describe: Model -> what is recorded of a model that meets a target.
        tolerance: As in `match`.
        progress: Further numbers for what is recorded of a match, such as the share of steps with a conflict so far.

    Attributes:
        open: Targets that are neither met nor missed so far.
        curve: One dictionary for each state: where on the path it is (`step`, `seconds`), and its scores.
        matches: Target -> what `describe` recorded, where on the path that was, and the score that was matched.
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
        """Score a state, meet the targets that lie between the previous state and this one, and return to this one.

        Args:
            model: In this state.
            at: Where on the path the state is, as numbers that can be interpolated between two states.
            move: Takes the model from the previous state (position 0) to this one (position 1).
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
        """End the path: every target that is still open is missed, and the reason says how near its score came."""
        for target in list(self.open):
            reached = f"{target.metric} was {self.curve[-1][target.metric]:.4g}"
            self._miss(target, f"not reached: {reached} {where}")

    def give_up(self, reason: str) -> None:
        """Stop for a reason of its own, which is then the reason of every target that is still open."""
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
