"""The metric classes: any batches and any number of processes give what one pass over everything gives, and published logs."""

from __future__ import annotations

import copy
import math
import pickle
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torchmetrics import MetricCollection

import lightning_modules as lm
from lightning_modules.metrics import functional
from tests.gradsurgery.optimizer import distributed_workers
from tests.lightning_modules.metrics import metrics_workers
from tests.lightning_modules.metrics.metrics_workers import CASES, DATA, REFERENCE, N, numbers, whole
from tests.lightning_modules.metrics.test_functional import IN_TABLES, PROBES, published_pairs
from tests.reference import metrics as oracles
from tests.reference.published import LOGS, published


def odd_batches(n: int) -> list[slice]:
    sizes, start = random.Random(n), 0
    batches = []
    while start < n:
        stop = min(n, start + sizes.choice((1, 2, 3, 5, 7, 11, 13)))
        batches.append(slice(start, stop))
        start = stop
    return batches


@pytest.mark.parametrize("log", LOGS)
def test_the_classes_reproduce_the_published_aggregates_in_odd_batches(log: str) -> None:
    data = published(log)
    expected = data["expected"]["tofu_aggregate_script"]
    utility = lm.metrics.ModelUtility()
    for split, column in IN_TABLES.items():
        rows = data["splits"][split]
        probability = lm.metrics.AnswerProbability()
        ratio = lm.metrics.TruthRatio(kind="forget" if split == "forget" else "utility")
        for part in odd_batches(len(rows["answer_nll"])):
            answer, paraphrase, perturbed, rouge = (
                rows[name][part] for name in ("answer_nll", "paraphrase_nll", "perturbed_nll", "rougeL_recall")
            )
            probability.update(answer, perturbed if split in PROBES else None)
            ratio.update(paraphrase, perturbed)
            if split != "forget":
                utility.update(split, answer, paraphrase, perturbed, rouge)
        assert probability.compute().item() == pytest.approx(expected[f"{column}_probability"], abs=1e-6)
        assert ratio.compute().item() == pytest.approx(expected[f"{column}_truth_ratio"], abs=1e-6)
    assert utility.compute().item() == pytest.approx(expected["model_utility"], abs=1e-6)
    nine = utility.nine()
    assert tuple(nine) == functional.UTILITY_NAMES
    for split, column in IN_TABLES.items():
        if split != "forget":
            for metric, name in (("probability", "probability"), ("rouge_l_recall", "rouge"), ("truth_ratio",) * 2):
                assert nine[f"{split}/{metric}"] == pytest.approx(expected[f"{column}_{name}"], abs=1e-6)


@pytest.mark.parametrize("log", LOGS)
def test_the_option_normalised_forget_probability_of_uld(log: str) -> None:
    data = published(log)
    metric = lm.metrics.AnswerProbability()
    metric.update(data["splits"]["forget"]["answer_nll"], data["splits"]["forget"]["perturbed_nll"])
    expected = data["expected"]["forget_probability_normalised_by_options"]
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)


def test_forget_quality_reproduces_the_published_pairs_in_odd_batches() -> None:
    logs = {
        name: published(f"tofu_{name}.json")["splits"]["forget"] for name in ("llama2-7b_full", "llama2-7b_retain90")
    }
    ratios = {
        name: functional.truth_ratio(rows["paraphrase_nll"], rows["perturbed_nll"]) for name, rows in logs.items()
    }
    for pair in published("tofu_ks_pairs.json")["pairs"]:
        metric = lm.metrics.ForgetQuality(ratios[pair["reference"]][: pair["n"]])
        for part in odd_batches(pair["n"]):
            metric.update(ratios[pair["model"]][: pair["n"]][part])
        result = metric.compute()
        assert isinstance(result, functional.ForgetQualityResult)
        assert (result.statistic, result.n) == (pytest.approx(pair["statistic"], abs=1e-12), pair["n"])
        assert result.pvalue == pytest.approx(pair["pvalue"], rel=1e-6)
        assert result.log10_pvalue == pytest.approx(math.log10(pair["pvalue"]), abs=1e-6)


def test_rouge_recall_reproduces_the_published_pairs_in_odd_batches() -> None:
    pairs = published_pairs()
    for kind in ("rouge1", "rougeL"):
        metric = lm.metrics.RougeRecall(kind=kind)
        for part in odd_batches(len(pairs)):
            metric.update([p["generation"] for p in pairs[part]], [p["reference"] for p in pairs[part]])
        expected = oracles.mean([p[f"{kind}_recall"] for p in pairs])
        assert metric.compute().item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_batches_of_any_size_give_what_one_gives(name: str) -> None:
    metric = CASES[name].make()
    for part in odd_batches(N):
        CASES[name].add(metric, part)
    assert numbers(metric.compute()) == pytest.approx(whole(name), rel=1e-12)
    metric.reset()
    CASES[name].add(metric, slice(3, N))
    assert numbers(metric.compute()) != pytest.approx(whole(name), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_classes_are_means_of_the_functions(name: str) -> None:
    """By hand, from the pure functions, so that a class cannot be consistently wrong."""
    d = DATA
    per_example: dict[str, Any] = {
        "AnswerProbability": functional.answer_probability(d["answer"]),
        "AnswerProbability of options": functional.option_probability(d["answer"], d["perturbed"]),
        "RougeRecall": functional.rouge_recall(d["predictions"], d["targets"]),
        "RougeF1": functional.rouge_f1(d["predictions"], d["targets"]),
        "MultipleChoiceAccuracy": functional.multiple_choice_accuracy(-d["perturbed"], d["right"]),
        "ExtractionStrength": functional.extraction_strength(d["predicted"], d["labels"]),
        "ExactMemorization": functional.exact_memorization(d["predicted"], d["labels"]),
        **{
            f"TruthRatio {kind}": functional.truth_ratio(d["paraphrase"], d["perturbed"], kind)
            for kind in functional.TRUTH_RATIO_KINDS
        },
    }
    if name in per_example:
        assert whole(name) == pytest.approx([per_example[name].mean().item()], rel=1e-12)
    elif name == "PrivLeak":
        area = functional.auc(d["scores"], d["holdout"])
        assert whole(name) == [functional.priv_leak(area, 0.6)]
    elif name == "ForgetQuality":
        ours = functional.truth_ratio(d["paraphrase"], d["perturbed"])
        assert whole(name) == list(functional.forget_quality(ours, REFERENCE))
    else:
        metric = CASES[name].make()
        CASES[name].add(metric, slice(0, N))
        means = metric.nine()
        assert means["retain/probability"] == pytest.approx(float(functional.answer_probability(d["answer"]).mean()))
        assert means["world_facts/probability"] == pytest.approx(
            float(functional.option_probability(d["answer"].roll(2), d["perturbed"].roll(2, 0)).mean())
        )
        assert whole(name) == pytest.approx([oracles.harmonic_mean(list(means.values()))], rel=1e-12)


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_compute_before_update_is_an_error_and_not_a_number(name: str) -> None:
    metric = CASES[name].make()
    with pytest.raises(RuntimeError, match="call update"):
        metric.compute()
    CASES[name].add(metric, slice(0, N))
    assert numbers(metric.compute()) == pytest.approx(whole(name), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_refused_batch_leaves_the_metric_as_it_was(name: str) -> None:
    metric = CASES[name].make()
    CASES[name].add(metric, slice(0, N))
    bad: dict[str, tuple[Any, ...]] = {
        "AnswerProbability": ([[1.0]],),
        "AnswerProbability of options": ([1.0], [[1.0], [2.0]]),
        "RougeRecall": (["a"], ["a", "b"]),
        "RougeF1": (["a"], ["a", "b"]),
        "MultipleChoiceAccuracy": ([[-1.0, -2.0]], [2]),
        "ForgetQuality": ([],),
        "ModelUtility": ("retain", [1.0], [1.0], [[1.0]], [1.0, 1.0]),
        "ExtractionStrength": ([[1, 2]], [[1]]),
        "ExactMemorization": ([[1, 2]], [[-100, -100]]),
        "PrivLeak": ([1.0], []),
    }
    with pytest.raises(ValueError, match="expected"):
        metric.update(*bad.get(name, ([1.0], [[1.0], [2.0]])))
    with pytest.raises(ValueError, match="expected"):
        metric(*bad.get(name, ([1.0], [[1.0], [2.0]])))
    assert numbers(metric.compute()) == pytest.approx(whole(name), rel=1e-12)


def test_calling_the_metric_gives_the_batch_alone_and_keeps_the_total() -> None:
    metric = lm.metrics.AnswerProbability()
    assert metric([0.0]).item() == 1.0
    assert metric([math.log(2)]).item() == pytest.approx(0.5)
    assert metric.compute().item() == pytest.approx(0.75)
    quality = lm.metrics.ForgetQuality([1.0, 2.0])
    assert quality([1.0]).n == 1
    assert quality([2.0]).n == 1
    assert quality.compute().n == 2
    utility = lm.metrics.ModelUtility()
    with pytest.raises(RuntimeError, match="real_authors, world_facts"):
        utility("retain", [1.0], [1.0], [[1.0]], [1.0])
    assert utility._to_sync
    assert utility.counts.sum() == 0


def test_diverged_models_stay_visible() -> None:
    diverged = ([1e4, 1e4], [[1e4, 2e4], [1e4, 2e4]])
    shares = lm.metrics.AnswerProbability()
    shares.update(*diverged)
    assert shares.compute().item() == pytest.approx(0.5)
    ratios = lm.metrics.TruthRatio("forget")
    ratios.update(*diverged)
    assert ratios.compute().item() == 0.0
    for nll in (math.nan, math.inf):
        metric = lm.metrics.AnswerProbability()
        metric.update([0.0, nll])
        assert metric.compute().isnan().item() is math.isnan(nll)
        assert math.isnan(nll) or metric.compute().item() == 0.5
    utility = lm.metrics.ModelUtility()
    for split in functional.UTILITY_SPLITS:
        utility.update(split, [1.0], [1.0], [[2.0]], [math.nan if split == "retain" else 0.5])
    assert utility.compute().isnan()
    assert [name for name, value in utility.nine().items() if math.isnan(value)] == ["retain/rouge_l_recall"]
    leak = lm.metrics.PrivLeak(0.5)
    leak.update([math.nan, 1.0], [1.0])
    assert leak.compute().isnan()
    memorized = lm.metrics.ExactMemorization()
    memorized.update([[1, 2], [-1, 2]], [[1, 2], [1, 2]])
    assert memorized.compute().isnan()
    quality = lm.metrics.ForgetQuality([1.0])
    quality.update([math.nan])
    with pytest.raises(ValueError, match="NaN"):
        quality.compute()


def test_a_zero_among_the_nine_makes_utility_zero() -> None:
    metric = lm.metrics.ModelUtility()
    for split in functional.UTILITY_SPLITS:
        metric.update(split, [1.0], [1.0], [[2.0]], [0.0 if split == "world_facts" else 0.5])
    assert metric.compute().item() == 0.0


def test_which_direction_is_better_is_stated() -> None:
    stated = {name: getattr(lm.metrics, name).higher_is_better for name in lm.metrics.__all__ if name != "functional"}
    assert stated == {
        "AnswerProbability": True,
        "ExactMemorization": False,
        "ExtractionStrength": False,
        "ForgetQuality": True,
        "ModelUtility": True,
        "MultipleChoiceAccuracy": True,
        "PrivLeak": None,
        "RougeF1": True,
        "RougeRecall": True,
        "TruthRatio": True,
    }
    assert lm.metrics.TruthRatio("ratio").higher_is_better is None
    assert lm.metrics.TruthRatio("utility").higher_is_better is True
    for name in stated:
        assert "Direction:" in (getattr(lm.metrics, name).__doc__ or "")
        assert "retrained" in (getattr(lm.metrics, name).__doc__ or "")


def test_options_are_checked_where_they_are_given() -> None:
    with pytest.raises(ValueError, match="ratio, forget, utility"):
        lm.metrics.TruthRatio("Forget")
    with pytest.raises(ValueError, match="rougeL"):
        lm.metrics.RougeRecall("rouge-l")
    with pytest.raises(ValueError, match="NaN"):
        lm.metrics.ForgetQuality([1.0, math.nan])
    with pytest.raises(ValueError, match="below 1"):
        lm.metrics.PrivLeak(1.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        lm.metrics.PrivLeak(1.5)
    with pytest.raises(ValueError, match="neither"):
        lm.metrics.PrivLeak(0.5).update()
    with pytest.raises(ValueError, match="world_facts"):
        lm.metrics.ModelUtility().update("real_world", [1.0], [1.0], [[1.0]], [1.0])


def test_plain_and_normalised_probabilities_are_not_averaged() -> None:
    metric = lm.metrics.AnswerProbability()
    metric.update([1.0])
    metric.update([1.0], [[1.0]])
    with pytest.raises(RuntimeError, match="1 of 2 examples"):
        metric.compute()


def test_a_reference_that_is_changed_afterwards_changes_no_forget_quality() -> None:
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    metric = lm.metrics.ForgetQuality(reference)
    reference.fill_(9.0)
    metric.update([0.1, 0.2, 0.3, 0.4])
    assert metric.compute().statistic == 0.0


@pytest.mark.parametrize("name", CASES)
def test_metrics_survive_copying_pickling_and_a_change_of_precision(name: str) -> None:
    metric = CASES[name].make()
    CASES[name].add(metric, slice(0, N))
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.half(), metric.float()):
        assert numbers(twin.compute()) == pytest.approx(whole(name), rel=1e-12)
        assert twin.higher_is_better is metric.higher_is_better


def test_they_work_in_a_collection() -> None:
    both = MetricCollection({"es": lm.metrics.ExtractionStrength(), "em": lm.metrics.ExactMemorization()})
    both.update([[1, 9, 3]], [[1, 2, 3]])
    found = both.compute()
    assert found["es"].item() == pytest.approx(1 / 3)
    assert found["em"].item() == pytest.approx(2 / 3)


def test_metrics_of_a_collection_that_begin_with_the_same_number_stay_apart() -> None:
    """A collection takes metrics for one whose states are the same after the first batch."""
    memory = MetricCollection({"es": lm.metrics.ExtractionStrength(), "em": lm.metrics.ExactMemorization()})
    ratios = MetricCollection({kind: lm.metrics.TruthRatio(kind) for kind in ("forget", "ratio")})
    kinds = {"1": ("rouge1", False), "L": ("rougeL", False), "stems": ("rouge1", True)}
    rouge = MetricCollection({name: lm.metrics.RougeRecall(*options) for name, options in kinds.items()})
    rouge.add_metrics({"f1": lm.metrics.RougeF1("rouge1")})
    for collection, same, other in (
        (memory, ([[1, 2]], [[1, 2]]), ([[1, 9, 3]], [[1, 2, 3]])),
        (ratios, ([1.0], [[1.0, 1.0]]), ([3.0], [[1.0, 2.0]])),
        (rouge, ("a b", "a b"), ("jumps c b a longer", "jumped a b c")),
    ):
        alone = {name: copy.deepcopy(metric) for name, metric in collection.items()}
        for batch in (same, other):
            collection.update(*batch)
            for metric in alone.values():
                metric.update(*batch)
        found = {name: float(value) for name, value in collection.compute().items()}
        assert found == {name: float(metric.compute()) for name, metric in alone.items()}
        assert len(set(found.values())) == len(found)


def test_two_processes_give_what_one_gives_and_errors_reach_both() -> None:
    """In one start of the processes, because importing what the metrics need takes longer than all the rest."""
    distributed_workers.run(metrics_workers.equals_one_process_and_errors_reach_both)


def test_functions_need_torch_alone_and_classes_name_what_they_need() -> None:
    code = """
import sys
for name in ("torchmetrics", "scipy", "rouge_score", "transformers", "lightning"):
    sys.modules[name] = None
import lightning_modules as lm
assert lm.metrics.functional.answer_probability([0.0]).item() == 1.0
assert "TruthRatio" in dir(lm.metrics)
try:
    lm.metrics.TruthRatio
except ModuleNotFoundError as error:
    assert "pip install 'gradsurgery[lightning]'" in str(error), error
else:
    raise SystemExit("imported without torchmetrics")
try:
    lm.metrics.truthratio
except AttributeError as error:
    assert "TruthRatio" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
