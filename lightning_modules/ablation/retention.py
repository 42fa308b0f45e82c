"""Equal retention: each method is mixed with the start model until it retains the same share, and then compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from gradsurgery.task_vectors import StateDict, calibrate_mix, mix
from lightning_modules.ablation.ending import Cost
from lightning_modules.ablation.matching import Matching
from lightning_modules.ablation.scoring import Scorer


class Ended(NamedTuple):
    """What a method leaves: the targets that it met, and the two ends of the line along which it can be mixed.

    Attributes:
        matching: The targets that were met and missed on the way.
        model: Can hold any state of the line.
        load: Puts a state into the model.
        before: State of the start model.
        after: State where the method ended.
        extra_backward_passes: Backward passes before the first step.
        radius: What was measured where the method says `radius: auto`; else None.
        cost: Of what came after the last step.
        peak_megabytes: The most memory that the training took, see `memory.peak_megabytes`.
        diverged: Why there is no end to be scored; None if there is one.
    """

    matching: Matching
    model: nn.Module
    load: Callable[[StateDict], object]
    before: StateDict
    after: StateDict
    extra_backward_passes: int = 0
    radius: dict[str, float] | None = None
    cost: Cost = Cost()
    peak_megabytes: float | None = None
    diverged: str | None = None


def own_end(ended: Ended, scorer: Scorer) -> dict[str, Any] | str:
    """The scores and attacks where a method ended by itself, and what it took to get there; or why there is no end."""
    if ended.diverged is not None:
        return ended.diverged
    ended.load(ended.after)
    if not math.isfinite(kept := scorer.retention(ended.model)):
        return f"diverged: retain_probability is {kept} at the end"
    end = ended.matching.curve[-1]
    return {
        "step": end["step"],
        "seconds": end["seconds"] + ended.cost.seconds,
        "further_backward_passes": ended.cost.backward_passes,
        **ended.matching.progress(),
        "peak_megabytes": ended.peak_megabytes,
        **scorer.thoroughly(ended.model, attack=True),
    }


def equal_retention(share: float, ended: Ended, scorer: Scorer) -> dict[str, Any] | str:
    r"""What a method has still forgotten once it retains a given share again: UWC's comparison (2406.09179).

    The state where the method ended is mixed with the start, $\rho\,\theta_0 + (1 - \rho)\,\theta$, with the
    smallest rho that restores the share (`gradsurgery.task_vectors.calibrate_mix`). If nothing has to be restored, rho
    is 0, and more than the share may be retained. Where the state is a weight (ULD's, or a task vector's), mixing makes
    the weight smaller.

    Args:
        share: Of the start model's mean retain probability, in (0, 1).
        ended: What the method left.
        scorer: Retention is measured on its retain examples, as many as at a match.

    Returns:
        `share_of_start` (rho), where on the path the method ended, and the scores of the mix. If the method diverged, a
        sentence that says so.
    """

    def score(state: StateDict) -> float:
        ended.load(state)
        return scorer.retention(ended.model)

    if ended.diverged is not None:
        return ended.diverged
    if not math.isfinite(kept := score(ended.after)):
        return f"diverged: retain_probability is {kept} at the end"
    rho = calibrate_mix(ended.before, ended.after, score, target=share)
    ended.load(mix(ended.before, ended.after, rho))
    end = ended.matching.curve[-1]
    at = {name: end[name] for name in ("step", "seconds")}
    if "weight" in end:
        at["weight"] = (1.0 - rho) * end["weight"]
    return {"share_of_start": rho, **at, **ended.matching.progress(), **scorer.thoroughly(ended.model)}
