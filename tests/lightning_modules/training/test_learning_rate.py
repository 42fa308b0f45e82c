"""The trial steps for a learning rate: they leave no trace, and a way is what a walk along the points finds."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import lightning_modules as lm
from lightning_modules.training.learning_rate import FACTOR, FASTER, MOST, MOVED, Trial, rate_for, trial
from lightning_modules.training.perturb import PerturbSettings
from lightning_modules.training.probability import mean_probabilities, uncollated
from tests.lightning_modules.training.test_module import Bigram, batches
from tests.lightning_modules.training.test_perturbed import adapters, llama

pytestmark = pytest.mark.filterwarnings("ignore:.*computes all its logits.*", "ignore:.*does not have many workers.*")

POINTS = st.lists(st.tuples(st.floats(1e-6, 1.0), st.floats(0.0, 1.0)), min_size=1, max_size=6)


@given(POINTS, st.floats(0.01, 0.9))
def test_the_way_is_the_first_place_on_the_line_through_the_points_that_is_at_the_level(
    points: list[tuple[float, float]], level: float
) -> None:
    """The oracle walks in small paces."""
    found = Trial([{"lr": 0.0, "forget": 1.0}, *({"lr": rate, "forget": p} for rate, p in points)], level).way
    at, here, paces = 0.0, 1.0, 1000
    for rate, there in points:
        for pace in range(1, paces + 1):
            if (there if pace == paces else here + (there - here) * pace / paces) < level:
                assert found is not None
                assert abs(found - (at + rate * pace / paces)) <= 2 * rate / paces + 1e-12
                return
        at, here = at + rate, there
    assert found is None or abs(found - at) <= 1e-9 * at  # at the level to the last digit


@given(st.floats(1e-6, 1.0), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=50))
def test_steps_of_the_rate_go_the_way(way: float, shares: list[float]) -> None:
    gone = rate_for(way, shares) * sum(shares)
    assert abs(gone - way) <= 0.051 * way  # two digits


class _Data(L.LightningDataModule):
    def __init__(self, data: list[Any]) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=None)


def dropped() -> nn.Module:
    model = adapters()
    model.get_submodule("base_model.model").config.attention_dropout = 0.3
    return model


@pytest.mark.parametrize(
    ("make", "perturb"),
    [(Bigram, None), (llama, PerturbSettings(start=0.1, end=0.3)), (dropped, None)],
)
def test_trial_steps_forget_and_are_the_same_again_and_leave_no_trace(
    make: Callable[[], nn.Module], perturb: PerturbSettings | None
) -> None:
    model = make().eval()
    torch.manual_seed(5)
    random.seed(5)
    data = batches(30)
    kept, drawn = copy.deepcopy(model.state_dict()), (torch.get_rng_state(), random.getstate())
    rows = uncollated(data[0]["forget"])
    before = mean_probabilities(model, {"forget": rows}, pad_token_id=0)["forget"]

    def tried() -> Trial:
        module = lm.UnlearningModule(model, optimizer=partial(torch.optim.AdamW, lr=1.0), perturb=perturb).train()
        return trial(module, _Data(data), rows, level=before / 3, pad_token_id=0)

    once, again = tried(), tried()
    assert repr(once) == repr(again)  # NaN is not equal to itself
    assert once.points[0] == {"lr": 0.0, "forget": before}
    assert once.way is not None or make is dropped  # which knows nothing, and diverges at last
    assert 2 <= len(once.points) <= MOST + 1
    assert all(point["forget"] >= before / 3 for point in once.points[:-1])
    assert [point["lr"] for point in once.points] == sorted({point["lr"] for point in once.points})
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert all(part.training for part in model.modules())  # as a module's `train()` left them


def test_trial_steps_grow_faster_as_long_as_nothing_moves() -> None:
    data = batches(30)
    module = lm.UnlearningModule(Bigram(), optimizer=partial(torch.optim.AdamW, lr=1.0))
    points = trial(module, _Data(data), uncollated(data[0]["forget"]), level=0.0, pad_token_id=0).points
    factors = [after["lr"] / before["lr"] for before, after in itertools.pairwise(points[1:])]
    moved = [point["forget"] < MOVED * points[0]["forget"] for point in points[1:-1]]
    assert len(set(moved)) == 2
    assert factors == pytest.approx([FACTOR if far else FASTER for far in moved])
