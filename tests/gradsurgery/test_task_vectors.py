"""Arithmetic on state dicts against loops over names in float64, and the search for the smallest mix against a fine grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradsurgery.task_vectors import calibrate_mix, mix, negate, rectified, task_vector
from tests.tolerances import COMBINED, close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
StateDict = dict[str, Tensor]


def state(seed: int, *, dtype: torch.dtype = torch.float32) -> StateDict:
    """A tied embedding and head, a bias, a scalar, an empty tensor, and a counter."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "embedding": shared,
        "bias": torch.randn(4, generator=generator, dtype=torch.float64).to(dtype),
        "gain": torch.randn((), generator=generator, dtype=torch.float64).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "steps": torch.tensor([7, 8]),
        "mask": torch.tensor([True, False]),
        "head": shared,
    }


def flat(entries: StateDict) -> np.ndarray[Any, Any]:
    """Every floating number once."""
    chosen = [t.double().flatten() for name, t in entries.items() if t.is_floating_point() and name != "head"]
    return torch.cat(chosen).numpy()


def expect(
    found: StateDict, numbers: np.ndarray[Any, Any], like: StateDict, dtype: torch.dtype, scale: float = 8.0
) -> None:
    assert list(found) == list(like)
    assert all(found[name].dtype == like[name].dtype and found[name].shape == like[name].shape for name in like)
    close(torch.from_numpy(flat(found)), torch.from_numpy(numbers), COMBINED[dtype], scale=scale)
    assert found["head"].data_ptr() == found["embedding"].data_ptr()
    assert not {t.data_ptr() for t in found.values() if t.numel()} & {t.data_ptr() for t in like.values() if t.numel()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_task_vector_is_the_difference(dtype: torch.dtype) -> None:
    before, after = state(0, dtype=dtype), state(1, dtype=dtype)
    vector = task_vector(before, after)
    expect(vector, flat(after) - flat(before), before, dtype)
    assert not vector["steps"].any()
    assert not vector["mask"].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rho", [0.0, 0.1, 0.5, 1.0])
def test_mix_is_the_weighted_mean(dtype: torch.dtype, rho: float) -> None:
    before, after = state(0, dtype=dtype), state(1, dtype=dtype)
    found = mix(before, after, rho)
    expect(found, rho * flat(before) + (1.0 - rho) * flat(after), before, dtype)
    assert found["steps"].tolist() == [7, 8]
    assert found["mask"].tolist() == [True, False]
    if rho in (0.0, 1.0):
        assert all(torch.equal(found[name], (after, before)[int(rho)][name]) for name in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [1.0, 0.3, -2.0])
def test_negate_takes_away_a_multiple(dtype: torch.dtype, weight: float) -> None:
    before, vector = state(0, dtype=dtype), task_vector(state(1, dtype=dtype), state(2, dtype=dtype))
    found = negate(before, vector, weight)
    expect(found, flat(before) - weight * flat(vector), before, dtype)
    assert found["steps"].tolist() == [7, 8]


def test_half_types_are_rounded_once() -> None:
    """In bf16 the factors 0.1 and 0.9 would be rounded, and so would each product."""
    before, after = ({"w": torch.full((1,), value, dtype=torch.bfloat16)} for value in (3.0, 1.0))
    assert float(mix(before, after, 0.3)["w"]) == float(torch.tensor(1.6).bfloat16())
    assert float(mix(before, after, 1.0 / 3.0)["w"]) == float(torch.tensor(5.0 / 3.0).bfloat16())


def test_the_answer_has_the_first_arguments_types() -> None:
    before, after = state(0), state(1, dtype=torch.bfloat16)
    assert {t.dtype for t in mix(before, after, 0.5).values() if t.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("seed", range(6))
def test_rectified_is_the_projection_by_hand(seed: int) -> None:
    before = state(seed, dtype=torch.float64)
    vectors = [task_vector(before, state(10 * seed + s + 1, dtype=torch.float64)) for s in range(3)]
    references = [task_vector(before, state(10 * seed + s + 7, dtype=torch.float64)) for s in range(3)]
    if seed == 0:  # one that does not conflict: -tau and its reference point the same way
        references[1] = {name: -t if t.is_floating_point() else t for name, t in vectors[1].items()}
        references[1]["head"] = references[1]["embedding"]
    moved, met = np.zeros_like(flat(before)), []
    for vector, reference in zip(map(flat, vectors), map(flat, references), strict=True):
        product = -vector @ reference
        met.append(product < 0.0)
        moved += -vector + max(0.0, -product) / (reference @ reference) * reference
    assert any(met)
    found = rectified(before, vectors, references, weight=0.7)
    expect(found, flat(before) + 0.7 * moved, before, torch.float64, scale=64.0)


def test_rectified_against_itself_does_not_move_and_against_nothing_is_negation() -> None:
    before = state(0)
    vector = task_vector(before, state(1))
    expect(rectified(before, [vector], [vector]), flat(before), before, torch.float32)
    nothing = task_vector(before, before)
    expect(rectified(before, [vector], [nothing]), flat(negate(before, vector)), before, torch.float32)


def test_tied_weights_of_a_model_stay_tied_and_load() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5))
    model[1].weight = model[0].weight
    before = {name: t.clone() for name, t in model.state_dict().items()}
    before["1.weight"] = before["0.weight"]
    nn.init.normal_(model[0].weight)
    mixed = mix(model.state_dict(), before, 0.25)
    assert mixed["0.weight"] is mixed["1.weight"]
    model.load_state_dict(mixed)
    assert torch.equal(model[1].weight, mixed["0.weight"])
    assert not mixed["0.weight"].requires_grad


def test_nan_passes_through() -> None:
    before, after = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([math.nan, 2.0])}
    for found in (mix(before, after, 0.5), task_vector(before, after), negate(before, after)):
        assert found["w"].isnan().tolist() == [True, False]
    assert rectified(before, [after], [before])["w"].isnan().all()


def change(**entries: Tensor) -> Callable[[StateDict], StateDict]:
    return lambda given: {**given, **entries}


MISFITS = [
    (lambda given: {k: v for k, v in given.items() if k != "bias"}, r"the same names, found otherwise: bias"),
    (change(extra=torch.zeros(1)), r"the same names, found otherwise: extra"),
    (change(bias=torch.zeros(5)), r"the same shapes, found otherwise: bias"),
    (change(steps=torch.zeros(2)), r"both integer or neither, found otherwise: steps"),
    (
        change(head=torch.zeros(5, 3)),
        r"entries that share memory in before to be equal in \w+(\[0\])?, found otherwise: head",
    ),
]


@pytest.mark.parametrize(("misfit", "sentence"), MISFITS)
def test_what_does_not_fit_is_named(misfit: Callable[[StateDict], StateDict], sentence: str) -> None:
    before, other = state(0), misfit(state(1))
    vector = task_vector(state(1), state(2))
    for call in (
        lambda: task_vector(before, other),
        lambda: mix(before, other, 0.5),
        lambda: negate(before, misfit(vector)),
        lambda: rectified(before, [vector], [misfit(vector)]),
        lambda: rectified(before, [misfit(vector)], [vector]),
        lambda: calibrate_mix(before, other, lambda model: 1.0),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_integers_that_cannot_be_mixed_are_refused() -> None:
    before, after = state(0), {**state(1), "steps": torch.tensor([7, 9]), "mask": torch.tensor([True, True])}
    for call in (lambda: task_vector(before, after), lambda: mix(before, after, 0.5)):
        with pytest.raises(ValueError, match=r"before, after: expected equal integer entries.*steps, mask"):
            call()
    with pytest.raises(ValueError, match=r"vector: expected 0 at integer entries.*steps, mask"):
        negate(before, after)
    with pytest.raises(ValueError, match=r"vectors\[0\]: expected 0 at integer entries"):
        rectified(before, [after], [task_vector(before, before)])


def test_long_lists_of_names_are_cut() -> None:
    before = {f"layer{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match="layer0, layer1, layer2, layer3, layer4 and 4 more"):
        mix(before, {}, 0.5)


@pytest.mark.parametrize("rho", [-0.1, 1.1, math.nan])
def test_a_share_outside_0_and_1_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match="rho: expected the original model's share"):
        mix(state(0), state(1), rho)


def test_rectified_wants_a_reference_for_each_part() -> None:
    before = state(0)
    for vectors, references in (([], []), ([task_vector(before, before)], [])):
        with pytest.raises(ValueError, match="expected one reference for each of at least one part"):
            rectified(before, vectors, references)


# Calibration ---------------------------------------------------------------------------------------------------------------------

BEFORE, AFTER = {"rho": torch.ones((), dtype=torch.float64)}, {"rho": torch.zeros((), dtype=torch.float64)}


class Counted:
    """A score of rho that counts its calls and remembers where it was asked."""

    def __init__(self, function: Callable[[float], float]) -> None:
        self.function, self.asked = function, list[float]()

    def __call__(self, model: StateDict) -> float:
        self.asked.append(float(model["rho"]))
        return self.function(self.asked[-1])


RISING: dict[str, Callable[[float], float]] = {
    "line": lambda rho: rho,
    "high start": lambda rho: 0.6 + 0.4 * rho,
    "late": lambda rho: rho**8 + 1e-3,
    "early": lambda rho: rho**0.05,
    "step": lambda rho: 0.2 if rho < 0.3141592 else 1.0,
    "stairs": lambda rho: math.floor(8.0 * rho) + 1.0,
    "overshoot": lambda rho: 5.0 * rho * (1.2 - rho) if rho < 0.9 else 1.0,
}


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6, 1e-15])
@pytest.mark.parametrize("target", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("name", RISING)
def test_the_smallest_share_that_passes_is_found(name: str, target: float, tolerance: float) -> None:
    score = Counted(RISING[name])
    found = calibrate_mix(BEFORE, AFTER, score, target=target, tolerance=tolerance)
    wanted = target * RISING[name](1.0)
    assert RISING[name](found) >= wanted
    assert len(score.asked) <= 60
    assert len(set(score.asked)) == len(score.asked), "nothing is scored twice"
    grid = np.linspace(0.0, 1.0, 100_001)
    first = next(rho for rho in grid if RISING[name](float(rho)) >= wanted)
    assert found <= first + max(tolerance, 2.0**-32)
    assert found >= first - 1.1e-5
    if tolerance == 1e-3:
        assert len(score.asked) <= 12


def test_an_unlearned_model_that_passes_needs_no_mixing() -> None:
    score = Counted(lambda rho: 0.96 + 0.04 * rho)
    assert calibrate_mix(BEFORE, AFTER, score) == 0.0
    assert len(score.asked) == 2


NOT_RISING: dict[str, Callable[[float], float]] = {
    "a hill, then a valley": lambda rho: 1.0 if 0.1 <= rho <= 0.3 or rho > 0.8 else 0.9 - rho,
    "waves": lambda rho: 1.0 if rho == 1.0 else 0.5 + 0.5 * math.cos(20.0 * (rho - 0.4)),
    "falls, then rises": lambda rho: abs(rho - 0.6) + (0.4 if rho > 0.95 else 0.0),
}


@pytest.mark.parametrize("tolerance", [1e-3, 1e-12])
@pytest.mark.parametrize("name", NOT_RISING)
def test_a_score_that_does_not_rise_is_searched_on_a_grid_too(name: str, tolerance: float) -> None:
    score = Counted(NOT_RISING[name])
    found = calibrate_mix(BEFORE, AFTER, score, tolerance=tolerance)
    wanted = 0.95 * NOT_RISING[name](1.0)
    assert NOT_RISING[name](found) >= wanted
    assert found in score.asked
    assert len(score.asked) <= 60
    if name == "a hill, then a valley":
        assert abs(found - 0.1) <= 2e-3


def test_a_share_of_the_grid_that_was_scored_before_is_not_scored_again() -> None:
    """The bisection that ends at 17/32 has scored 16/32, and the grid below is one of 32nds."""
    score = Counted(lambda rho: 1.0 if rho >= 0.51 else 0.9 - rho)
    assert calibrate_mix(BEFORE, AFTER, score, tolerance=1.0 / 32.0) == 17.0 / 32.0
    assert 0.5 in score.asked
    assert len(set(score.asked)) == len(score.asked)


def test_a_model_is_scored_through_its_state_dict() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    inputs, before = torch.randn(50, 3), {k: v.clone() for k, v in model.state_dict().items()}
    target = model(inputs).detach()
    after = {name: t + torch.randn_like(t) for name, t in before.items()}

    def score(entries: StateDict) -> Tensor:
        model.load_state_dict(entries)
        return torch.exp(-nn.functional.mse_loss(model(inputs), target)).detach()

    rho = calibrate_mix(before, after, lambda entries: float(score(entries)), target=0.9)
    assert float(score(mix(before, after, rho))) >= 0.9 > float(score(mix(before, after, rho - 1e-3)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target": 0.0}, "target: expected a share"),
        ({"target": 1.5}, "target: expected a share"),
        ({"target": math.nan}, "target: expected a share"),
        ({"tolerance": 0.0}, "tolerance: expected a step"),
        ({"tolerance": 1.0}, "tolerance: expected a step"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_scored(options: dict[str, float], sentence: str) -> None:
    score = Counted(lambda rho: 1.0)
    with pytest.raises(ValueError, match=sentence):
        calibrate_mix(BEFORE, AFTER, score, **options)
    assert not score.asked


@pytest.mark.parametrize(
    "function", [lambda rho: -1.0, lambda rho: 0.0, lambda rho: math.nan, lambda rho: rho or math.nan]
)
def test_scores_that_mean_nothing_are_refused(function: Callable[[float], float]) -> None:
    with pytest.raises(ValueError, match=r"score: expected a (finite|positive) number"):
        calibrate_mix(BEFORE, AFTER, Counted(function))


def test_equal_infinite_entries_stay_as_they_are() -> None:
    """A causal mask may be a buffer of the model."""
    before, after, other = (
        {"w": torch.tensor([1.0, w]), "mask": torch.tensor([0.0, -math.inf])} for w in (2.0, 4.0, 3.0)
    )
    vectors = [task_vector(before, after), task_vector(before, other)]
    assert [vector["mask"].tolist() for vector in vectors] == [[0.0, 0.0]] * 2
    assert mix(before, after, 0.25)["mask"].tolist() == [0.0, -math.inf]
    found = rectified(before, vectors, vectors[::-1])
    assert found["mask"].tolist() == [0.0, -math.inf]
    assert found["w"].isfinite().all()


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_a_mix_of_one_side_is_that_side(rho: float) -> None:
    """Also where the other one is not finite."""
    before, after = {"w": torch.tensor([0.1, math.inf])}, {"w": torch.tensor([0.3, math.nan])}
    expected = before if rho else after
    assert torch.equal(mix(before, after, rho)["w"].nan_to_num(), expected["w"].nan_to_num())
