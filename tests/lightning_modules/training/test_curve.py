"""How often the curve is scored: a 25th of the steps that this process takes, whatever share of the data it has."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_modules.training.callbacks import TradeoffCurve
from tests.lightning_modules.training.test_callbacks import examples, fit


@pytest.mark.parametrize(
    ("batches_of_this_process", "options", "every"),
    [(100, {}, 4), (50, {}, 2), (50, {"max_epochs": 4}, 8), (3, {}, 1)],
)
def test_the_curve_has_a_25th_of_the_steps_that_are_taken_between_two_points(
    batches_of_this_process: int, options: dict[str, Any], every: int
) -> None:
    curve = TradeoffCurve({"forget": examples(1, 1), "retain": examples(1, 2)}, pad_token_id=0)
    fit([curve], batches_of_this_process, **options)
    assert curve.every_n_steps == every
    steps = [int(point["step"]) for point in curve.points]
    assert steps == sorted({*range(0, steps[-1] + 1, every), steps[-1]})
