"""Equal retention: methods differ in what they lose, so each is mixed with the start model until it keeps a given share again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from gradsurgery.task_vectors import StateDict, calibrate_mix, mix
from lightning_modules.ablation.matching import Matching
from lightning_modules.ablation.scoring import Scorer


class Ended(NamedTuple):
    """What a method leaves: what was met on the way, and the line from its end back to the start.

    Attributes:
        matching: What was met.
        model: Holds any state of the line.
        load: Puts a state into the model.
        before: State of the start.
        after: State of the end.
        extra_backward_passes: Batches differentiated before the first step.
    """

    matching: Matching
    model: nn.Module
    load: Callable[[StateDict], object]
    before: StateDict
    after: StateDict
    extra_backward_passes: int = 0


def equal_retention(share: float, ended: Ended, scorer: Scorer) -> dict[str, Any] | str:
    r"""What a method has forgotten once it keeps a share of the start's retain probability again: UWC's comparison (2406.09179).

    Its end is mixed with the start, :math:`\rho\,\theta_0 + (1 - \rho)\,\theta`, with the smallest rho that restores the share
    (`gradsurgery.task_vectors.calibrate_mix`); rho is 0 where nothing is to be restored, and then more may be kept than the share. Where
    the state is a weight (ULD's, a task vector's), the mix is a smaller weight.

    Args:
        share: Of the start's mean retain probability, in (0, 1).
        ended: The method.
        scorer: Its retain examples are those of a match.

    Returns:
        `share_of_start` (rho), where on the path the end was, and the scores of the mix; or why there are none.
    """

    def score(state: StateDict) -> float:
        ended.load(state)
        return scorer.retention(ended.model)

    if not math.isfinite(kept := score(ended.after)):
        return f"diverged: retain_probability is {kept} at the end"
    rho = calibrate_mix(ended.before, ended.after, score, target=share)
    ended.load(mix(ended.before, ended.after, rho))
    end = ended.matching.curve[-1]
    at = {name: end[name] for name in ("step", "seconds")}
    if "weight" in end:
        at["weight"] = (1.0 - rho) * end["weight"]
    return {"share_of_start": rho, **at, **ended.matching.progress(), **scorer.thoroughly(ended.model)}
