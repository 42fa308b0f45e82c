"""The pure metrics against hand-checkable cases and the aggregates of published evaluation logs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.metrics.functional import answer_probability, rouge_recall, truth_ratio

FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures"
LOGS = ("tiny.json", "tofu_llama2-7b_full.json", "tofu_llama2-7b_retain90.json")
IN_TABLES = {"real_authors": "real_authors", "world_facts": "real_world", "retain": "retain", "forget": "forget"}


def fixture(name: str) -> dict[str, Any]:
    if not (FIXTURES / name).is_file():
        pytest.skip(f"the published logs are not in {FIXTURES}")
    return json.loads((FIXTURES / name).read_text())


@pytest.mark.parametrize("split", IN_TABLES)
@pytest.mark.parametrize("log", LOGS)
def test_truth_ratio_reproduces_the_published_aggregate(log: str, split: str) -> None:
    data = fixture(log)
    numbers = data["splits"][split]
    kind = "forget" if split == "forget" else "utility"
    result = truth_ratio(numbers["paraphrase_nll"], numbers["perturbed_nll"], kind=kind).mean().item()
    assert result == pytest.approx(
        data["expected"]["tofu_aggregate_script"][f"{IN_TABLES[split]}_truth_ratio"], abs=1e-6
    )


@pytest.mark.parametrize("split", ["retain", "forget"])
@pytest.mark.parametrize("log", LOGS)
def test_probability_reproduces_the_published_aggregate(log: str, split: str) -> None:
    data = fixture(log)
    result = answer_probability(data["splits"][split]["answer_nll"]).mean().item()
    assert result == pytest.approx(data["expected"]["tofu_aggregate_script"][f"{split}_probability"], abs=1e-6)


def test_float32_tensors_reproduce_it_too_and_stay_float32() -> None:
    data = fixture("tofu_llama2-7b_retain90.json")
    numbers = data["splits"]["forget"]
    result = truth_ratio(torch.tensor(numbers["paraphrase_nll"]), torch.tensor(numbers["perturbed_nll"]), kind="forget")
    assert result.dtype == torch.float32
    assert result.mean().item() == pytest.approx(
        data["expected"]["tofu_aggregate_script"]["forget_truth_ratio"], abs=1e-6
    )


def test_rouge_reproduces_the_published_pairs() -> None:
    pairs = fixture("rouge_pairs.json")["pairs"]
    generations, references = [pair["generation"] for pair in pairs], [pair["reference"] for pair in pairs]
    for options, column in (
        ({"kind": "rouge1"}, "rouge1_recall"),
        ({}, "rougeL_recall"),
        ({"use_stemmer": False}, "rougeL_recall_nostem"),
    ):
        assert rouge_recall(generations, references, **options).tolist() == [pair[column] for pair in pairs]


def test_truth_ratio_kinds_are_the_textbook_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    paraphrase = torch.rand(50, generator=generator, dtype=torch.float64) * 4
    perturbed = torch.rand(50, 5, generator=generator, dtype=torch.float64) * 4
    right, wrong = torch.exp(-paraphrase), torch.exp(-perturbed).prod(dim=1) ** (1 / 5)
    ratio = wrong / right
    assert (ratio < 1).any()
    assert (ratio > 1).any()
    torch.testing.assert_close(truth_ratio(paraphrase, perturbed), ratio)
    torch.testing.assert_close(truth_ratio(paraphrase, perturbed, kind="forget"), torch.minimum(ratio, 1 / ratio))
    torch.testing.assert_close(truth_ratio(paraphrase, perturbed, kind="utility"), (1 - ratio).clamp(min=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["ratio", "forget", "utility"])
def test_truth_ratio_is_finite_for_diverged_models(kind: str, dtype: torch.dtype) -> None:
    paraphrase = torch.tensor([1e4, 0.0, 1e4], dtype=dtype)
    perturbed = torch.tensor([[0.0, 0.0], [1e4, 1e4], [1e4, 1e4]], dtype=dtype)
    result = truth_ratio(paraphrase, perturbed, kind=kind)
    assert torch.isfinite(result).all()
    assert (
        result.tolist()
        == {
            "ratio": [torch.finfo(dtype).max, 0.0, 1.0],
            "forget": [0.0, 0.0, 1.0],
            "utility": [0.0, 1.0, 0.0],
        }[kind]
    )


@pytest.mark.parametrize("kind", ["ratio", "forget", "utility"])
def test_nan_stays_nan_in_its_own_row(kind: str) -> None:
    result = truth_ratio([math.nan, 1.0, 1.0], [[1.0, 2.0], [math.nan, 2.0], [1.0, 2.0]], kind=kind)
    assert result.isnan().tolist() == [True, True, False]
    assert answer_probability([math.nan, 1.0]).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("paraphrase", "perturbed"),
    [
        ([], []),
        ([1.0], [1.0]),
        ([1.0], [[]]),
        ([[1.0]], [[1.0]]),
        (1.0, [[1.0]]),
        ([1.0, 2.0], [[1.0]]),
        ([1.0], [[1.0], [2.0]]),
        ([1.0, 2.0], [[1.0], [1.0, 2.0]]),
        (["a"], [[1.0]]),
        (None, [[1.0]]),
    ],
)
def test_misshaped_truth_ratio_input_is_a_value_error(paraphrase: object, perturbed: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        truth_ratio(paraphrase, perturbed)


@pytest.mark.parametrize("nll", [[], 1.0, [[1.0]]])
def test_misshaped_probability_input_is_a_value_error(nll: object) -> None:
    with pytest.raises(ValueError, match="answer_nll"):
        answer_probability(nll)


def test_unknown_kinds_are_a_value_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"ratio, forget, utility.*'Forget'"):
        truth_ratio([1.0], [[1.0]], kind="Forget")
    with pytest.raises(ValueError, match=r"rouge1.*'rouge-l'"):
        rouge_recall("a", "a", kind="rouge-l")


def test_rouge_is_recall_of_the_target() -> None:
    assert rouge_recall("a b c d", "a b") == 1.0
    assert rouge_recall("a b", "a b c d") == 0.5
    assert rouge_recall(["a b c d", "a b"], ["a b", "a b c d"]).tolist() == [1.0, 0.5]
    assert rouge_recall("b a", "a b") == 0.5
    assert rouge_recall("b a", "a b", kind="rouge1") == 1.0
    assert rouge_recall("", "a b") == 0.0
    assert isinstance(rouge_recall("a", "a"), float)
    assert rouge_recall("running", "runs") == 1.0
    assert rouge_recall("running", "runs", use_stemmer=False) == 0.0


@pytest.mark.parametrize(("prediction", "target"), [([], []), (["a"], ["a", "b"]), ("a", ["a"]), (["a"], "a")])
def test_misshaped_rouge_input_is_a_value_error(prediction: object, target: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        rouge_recall(prediction, target)
