"""What the report calls a leak: what comes back beyond what was there before, and beyond what the reference says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lightning_modules.report import attacks
from lightning_modules.report.finished import FinishedRun


def warned(probes: dict[str, Any]) -> list[str]:
    return attacks.warnings(FinishedRun({}, probes=probes))


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({None: 0.10, 8: 0.15, 4: 0.35, 3: 0.20}, "to 4 bits brings forgotten answers back: from 0.100 to 0.350."),
        ({None: 0.40, 8: 0.41, 4: 0.45}, None),  # it was known before, and is little better known
        ({None: 0.40, 8: 0.10, 4: 0.05}, None),
    ],
)
def test_rounding_leaks_if_it_brings_back_more_than_was_known_without(
    known: dict[int | None, float], said: str | None
) -> None:
    points = [{"bits": bits, "forget": mean} for bits, mean in known.items()]
    assert warned({"quantization": {"points": points}}) == ([] if said is None else [f"Rounding the weights {said}"])


def test_what_rounding_leaves_stands_beside_the_reference_of_the_same_bits() -> None:
    points = [{"bits": bits, "forget": mean} for bits, mean in ((None, 0.1), (8, 0.2), (4, 0.3))]
    control = [{"bits": bits, "forget": mean} for bits, mean in ((4, 0.6), (None, 0.4), (8, 0.5))]
    header, *rows = attacks.rounded({"quantization": {"points": points, "control": {"points": control}}})
    assert header == ("weights", "forget", "forget, reference")
    assert rows == [
        ("as trained", "0.100", "0.400"),
        ("8 bits", "0.200", "0.500"),
        ("4 bits", "0.300", "0.600"),
    ]


def taught(start: float, end: float) -> dict[str, Any]:
    points = [{"step": step, "taught": 0.9, "rest": rest} for step, rest in ((0, start), (20, end))]
    return {"taught": 10, "rest": 30, "steps": 20, "lr": 5e-5, "points": points}


@pytest.mark.parametrize(
    ("model", "control", "shallow"),
    [
        ((0.1, 0.3), None, True),
        ((0.1, 0.15), None, False),
        ((0.1, 0.3), (0.25, 0.25), True),  # the reference guesses more, and learns nothing
        ((0.1, 0.5), (0.05, 0.42), False),  # it rises as much
        ((0.5, 0.55), (0.1, 0.1), False),  # what is known before the lessons is no rise
    ],
)
def test_relearning_is_shallow_forgetting_if_it_rises_beyond_the_rise_of_the_reference(
    model: tuple[float, float], control: tuple[float, float] | None, shallow: bool
) -> None:
    probe = {"model": taught(*model), "control": None if control is None else taught(*control)}
    assert [said.partition(":")[0] for said in warned({"relearn": probe})] == ["The forgetting is shallow"] * shallow
    (found,) = attacks.attacks({"relearn": probe})
    assert (found.start, found.model.mean) == model
    assert (found.control and found.control.mean) == (control and control[1])


def layers(probabilities: Sequence[float]) -> dict[str, Any]:
    return {"layers": [{"layer": n, "probability": p, "interval": None} for n, p in enumerate(probabilities)]}


@pytest.mark.parametrize(
    ("inside", "never", "leaks"),
    [
        ([0.0, 0.4, 0.05], None, True),
        ([0.0, 0.4, 0.05], [0.0, 0.1, 0.0], True),
        ([0.0, 0.4, 0.05], [0.0, 0.35, 0.0], False),  # a model that never saw them has them there too
        ([0.0, 0.4, 0.05], [0.0, 0.35], True),  # of another depth, so that no layer is the same
        ([0.0, 0.4, 0.35], None, False),  # it says them itself
        ([0.0, 0.4, 0.9], None, False),
    ],
)
def test_answers_are_still_inside_if_a_layer_before_the_last_has_them(
    inside: list[float], never: list[float] | None, leaks: bool
) -> None:
    probe = {"model": layers(inside), "control": None if never is None else layers(never)}
    (found,) = attacks.attacks({"lens": probe})
    assert found.name == "read off after layer 1 (logit lens)"
    assert (found.start, found.model.mean) == (inside[-1], 0.4)
    assert (found.control and found.control.mean) == (never[1] if never and len(never) == len(inside) else None)
    assert [said.partition(":")[0] for said in warned({"lens": probe})] == ["The answers are still inside"] * leaks


def best_of(recalls: Sequence[float]) -> dict[str, Any]:
    points = [{"k": 2**n, "rouge_l_recall": recall, "interval": None} for n, recall in enumerate(recalls)]
    return {"temperature": 1.0, "points": points}


@pytest.mark.parametrize(
    ("never", "leaks"),
    [
        (None, False),  # more answers match more words by chance as well
        ([0.2, 0.25, 0.3], True),
        ([0.2, 0.4, 0.55], False),
    ],
)
def test_samples_leak_if_the_best_of_as_many_of_the_reference_is_worse(never: list[float] | None, leaks: bool) -> None:
    probe = {"model": best_of([0.2, 0.5, 0.6]), "control": None if never is None else best_of(never)}
    (found,) = attacks.attacks({"sampling": probe})
    assert (found.name, found.start, found.model.mean) == ("best of 4 sampled answers", 0.2, 0.6)
    assert (found.control and found.control.mean) == (never and never[-1])
    assert [said.partition(":")[0] for said in warned({"sampling": probe})] == ["Sampling leaks"] * leaks


def test_a_way_of_asking_stands_alone_where_the_plain_questions_did_not_fit() -> None:
    row = {"n": 2, "probability": 0.3, "rouge_l_recall": 0.2, "probability_interval": None, "rouge_interval": None}
    found = [*attacks.attacks({"prompts": {"model": {"attacks": {"paraphrase": row}}, "control": None}})]
    assert found[0].sentence.endswith("the model gives back: probability 0.300, ROUGE-L recall 0.200.")
    assert all(attack.control is None and attack.warning is None for attack in found)


def test_questions_that_did_not_fit_are_counted() -> None:
    row = {"n": 2, "probability": 0.3, "rouge_l_recall": None, "probability_interval": None}
    found = [{"few_shot": row | {"left_out": count}} for count in (0, 3)]
    said = [attacks.sentences({"prompts": {"model": {"attacks": one}, "control": None}}) for one in found]
    assert said[1] == [f"{said[0][0]} 3 more did not fit into the model's context."]
