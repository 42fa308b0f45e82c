"""The pure metrics against hand-checkable cases and the aggregates of published evaluation logs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.metrics.functional import (
    UTILITY_NAMES,
    answer_probability,
    forget_quality,
    model_utility,
    option_probability,
    rouge_recall,
    truth_ratio,
)
from tests.reference import metrics as oracles
from tests.reference.published import LOGS, published

ROUGE_PAIRS = Path(__file__).parents[3].parent / "shared" / "fixtures" / "rouge_pairs.json"
IN_TABLES = {"real_authors": "real_authors", "world_facts": "real_world", "retain": "retain", "forget": "forget"}

PROBES = ("real_authors", "world_facts")


def published_pairs() -> list[dict[str, Any]]:
    """Texts of TOFU with their recalls, which are not ours to publish; `test_rouge.py` has some of our own."""
    if not ROUGE_PAIRS.is_file():
        pytest.skip(f"the published pairs are not in {ROUGE_PAIRS}")
    return json.loads(ROUGE_PAIRS.read_text())["pairs"]


@pytest.mark.parametrize("split", IN_TABLES)
@pytest.mark.parametrize("log", LOGS)
def test_truth_ratio_reproduces_the_published_aggregate(log: str, split: str) -> None:
    data = published(log)
    numbers = data["splits"][split]
    kind = "forget" if split == "forget" else "utility"
    result = truth_ratio(numbers["paraphrase_nll"], numbers["perturbed_nll"], kind=kind).mean().item()
    assert result == pytest.approx(
        data["expected"]["tofu_aggregate_script"][f"{IN_TABLES[split]}_truth_ratio"], abs=1e-6
    )


@pytest.mark.parametrize("split", ["retain", "forget"])
@pytest.mark.parametrize("log", LOGS)
def test_probability_reproduces_the_published_aggregate(log: str, split: str) -> None:
    data = published(log)
    result = answer_probability(data["splits"][split]["answer_nll"]).mean().item()
    assert result == pytest.approx(data["expected"]["tofu_aggregate_script"][f"{split}_probability"], abs=1e-6)


@pytest.mark.parametrize("split", PROBES)
@pytest.mark.parametrize("log", LOGS)
def test_option_probability_reproduces_the_published_aggregate(log: str, split: str) -> None:
    data = published(log)
    numbers = data["splits"][split]
    result = option_probability(numbers["answer_nll"], numbers["perturbed_nll"]).mean().item()
    expected = data["expected"]["tofu_aggregate_script"][f"{IN_TABLES[split]}_probability"]
    assert result == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("definition", ["tofu_aggregate_script", "tofu_utils_py", "open_unlearning"])
@pytest.mark.parametrize("log", LOGS)
def test_model_utility_reproduces_the_published_aggregate_from_its_nine(log: str, definition: str) -> None:
    expected = published(log)["expected"][definition]
    nine = {name: value for name, value in expected.items() if "forget" not in name and name != "model_utility"}
    assert model_utility(nine) == pytest.approx(expected["model_utility"], abs=1e-6)


def test_forget_quality_reproduces_the_published_pairs() -> None:
    logs = {
        name: published(f"tofu_{name}.json")["splits"]["forget"] for name in ("llama2-7b_full", "llama2-7b_retain90")
    }
    ratios = {name: truth_ratio(rows["paraphrase_nll"], rows["perturbed_nll"]) for name, rows in logs.items()}
    for pair in published("tofu_ks_pairs.json")["pairs"]:
        n = pair["n"]
        result = forget_quality(ratios[pair["model"]][:n], ratios[pair["reference"]][:n])
        assert result.statistic == pytest.approx(pair["statistic"], abs=1e-12)
        assert result.pvalue == pytest.approx(pair["pvalue"], rel=1e-6)
        assert result.n == n


@pytest.mark.parametrize("n", [1000, 3000])
def test_log10_of_the_p_value_is_exact_where_p_underflows(n: int) -> None:
    result = forget_quality(torch.arange(n), torch.arange(n) + n)
    assert result.pvalue == 0.0
    # Samples that do not overlap are 2 of C(2n, n) orders.
    assert result.log10_pvalue == pytest.approx(math.log10(2) - math.log10(math.comb(2 * n, n)), rel=1e-12)
    shifted = forget_quality(torch.arange(n), torch.arange(n) + 0.9 * n)
    steps = round(shifted.statistic * n)
    expected = math.log10(2 * math.comb(2 * n, n - steps)) - math.log10(math.comb(2 * n, n))
    assert shifted.log10_pvalue == pytest.approx(expected, rel=1e-9)
    unequal = forget_quality(torch.arange(n), torch.arange(n + 1) + n)
    assert (unequal.pvalue, unequal.n) == (0.0, n)
    assert result.log10_pvalue < unequal.log10_pvalue < -300


def test_float32_tensors_reproduce_it_too_and_stay_float32() -> None:
    data = published("tofu_llama2-7b_retain90.json")
    numbers = data["splits"]["forget"]
    result = truth_ratio(torch.tensor(numbers["paraphrase_nll"]), torch.tensor(numbers["perturbed_nll"]), kind="forget")
    assert result.dtype == torch.float32
    assert result.mean().item() == pytest.approx(
        data["expected"]["tofu_aggregate_script"]["forget_truth_ratio"], abs=1e-6
    )


def test_rouge_reproduces_the_published_pairs() -> None:
    pairs = published_pairs()
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_of_half_precision_are_float32_and_those_of_float64_stay_what_they_are(dtype: torch.dtype) -> None:
    found = truth_ratio(torch.tensor([2.0], dtype=dtype), torch.tensor([[1.0, 2.0]], dtype=dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(math.exp(0.5), rel=1e-6)


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


def test_option_probability_is_a_softmax_that_never_overflows() -> None:
    generator = torch.Generator().manual_seed(0)
    answer = torch.rand(40, generator=generator, dtype=torch.float64) * 8
    perturbed = torch.rand(40, 3, generator=generator, dtype=torch.float64) * 8
    for shift in (0.0, 1e3, 1e4):
        rows = zip((answer + shift).tolist(), (perturbed + shift).tolist(), strict=True)
        expected = [oracles.option_probability(right, wrong) for right, wrong in rows]
        assert option_probability(answer + shift, perturbed + shift).tolist() == pytest.approx(expected, rel=1e-9)
    assert option_probability([0.0, 1e4, math.inf], [[1e4], [0.0], [1.0]]).tolist() == [1.0, 0.0, 0.0]
    assert option_probability([1.0], [[math.inf, math.inf]]).tolist() == [1.0]
    undefined = option_probability([math.inf, math.nan, 1.0, 1.0], [[math.inf], [1.0], [math.nan], [1.0]])
    assert undefined.isnan().tolist() == [True, True, True, False]
    assert option_probability(answer.float(), perturbed.float()).dtype == torch.float32


@pytest.mark.parametrize(("answer", "perturbed"), [([], []), ([1.0], [1.0]), ([1.0], [[]]), ([1.0], [[1.0], [2.0]])])
def test_misshaped_options_are_a_value_error(answer: object, perturbed: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        option_probability(answer, perturbed)


def test_model_utility_is_the_exact_harmonic_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e-8, 1e-300):
        values = [scale * value for value in torch.rand(9, generator=generator, dtype=torch.float64).tolist()]
        found = model_utility(dict(zip(UTILITY_NAMES, values, strict=True)))
        assert found == pytest.approx(oracles.harmonic_mean(values), rel=1e-14)
    assert isinstance(found, float)
    assert model_utility({str(name): torch.tensor(0.25) for name in range(9)}) == 0.25


def test_model_utility_shows_zero_and_nan() -> None:
    good = dict.fromkeys(UTILITY_NAMES, 0.5)
    assert model_utility({**good, "retain/truth_ratio": 0.0}) == 0.0
    assert math.isnan(model_utility({**good, "retain/truth_ratio": math.nan}))
    assert math.isnan(model_utility({**good, "retain/truth_ratio": 0.0, "retain/probability": math.nan}))


@pytest.mark.parametrize(
    "change",
    [{"tenth": 0.5}, {"retain/probability": -0.1}, {"retain/probability": math.inf}, {"retain/probability": "high"},
     {"retain/probability": None}, {"retain/probability": torch.tensor([0.5, 0.5])}],
)  # fmt: skip
def test_anything_but_nine_numbers_is_a_value_error(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        model_utility({**dict.fromkeys(UTILITY_NAMES, 0.5), **change})
    for count in (0, 8):
        with pytest.raises(ValueError, match="exactly nine"):
            model_utility({str(name): 0.5 for name in range(count)})
