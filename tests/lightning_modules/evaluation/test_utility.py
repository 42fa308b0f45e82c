"""Model utility from scored examples: against slow definitions, the metric class and the published logs."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from lightning_modules.evaluation.evaluate import Evaluation, summary
from lightning_modules.evaluation.utility import model_utilities, utility_inputs
from lightning_modules.metrics import ModelUtility
from lightning_modules.metrics.functional import UTILITY_NAMES, UTILITY_SPLITS, answer_probability, truth_ratio
from lightning_modules.run.options import EvaluateOptions
from lightning_modules.run.scoring import contents_of_metrics
from tests.reference import metrics as oracles
from tests.reference.published import LOGS, published


def scored(
    split: str, answer: float, paraphrase: float, perturbed: list[float], recall: float | None
) -> dict[str, Any]:
    """An example as the evaluation leaves it."""
    kind = "forget" if split == "forget" else "utility"
    return {
        "question": "?", "answer": "!", "generation": "", "nll": answer,
        "probability": answer_probability([answer]).item(), "rouge_l_recall": recall,
        "truth_ratio": truth_ratio([paraphrase], [perturbed], kind=kind).item(),
        "paraphrase_nll": paraphrase, "perturbed_nll": perturbed,
    }  # fmt: skip


def drawn(seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Splits of different sizes; retain has paraphrases, the others have not."""
    draw = random.Random(seed)
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, n in (("forget", 3), ("retain", 7), ("real_authors", 5), ("world_facts", 4)):
        for _ in range(n):
            answer = draw.uniform(0.1, 3)
            paraphrase = draw.uniform(0.1, 3) if split in ("forget", "retain") else answer
            perturbed = [draw.uniform(1, 5) for _ in range(draw.randint(2, 5))]
            splits.setdefault(split, []).append(scored(split, answer, paraphrase, perturbed, draw.random()))
    return splits


def test_the_nine_and_their_mean_are_the_slow_definitions() -> None:
    for seed in range(5):
        splits = drawn(seed)
        expected = oracles.nine_of_tofu(splits)
        assert utility_inputs(splits) == pytest.approx(dict(zip(UTILITY_NAMES, expected, strict=True)), rel=1e-9)
        found = model_utilities({"before": None, "after": splits, "reference": {"forget": splits["forget"]}})
        utility = pytest.approx(oracles.harmonic_mean(expected), rel=1e-9)
        assert found["model_utility"] == {"before": None, "after": utility, "reference": None}
        assert found["model_utility_inputs"] == {"before": None, "after": utility_inputs(splits), "reference": None}


@pytest.mark.parametrize("log", LOGS)
def test_the_published_logs_give_the_published_model_utility(log: str) -> None:
    data = published(log)
    splits, metric = {}, ModelUtility()
    for split in UTILITY_SPLITS:
        numbers = data["splits"][split]
        names = ("answer_nll", "paraphrase_nll", "perturbed_nll", "rougeL_recall")
        columns = [numbers[name] for name in names]
        splits[split] = [scored(split, *row) for row in zip(*columns, strict=True)]
        metric.update(split, *columns)
    found = model_utilities({"after": splits})
    assert found["model_utility_inputs"]["after"] == pytest.approx(metric.nine(), rel=1e-12)
    assert found["model_utility"]["after"] == pytest.approx(metric.compute().item(), rel=1e-12)
    expected = data["expected"]["tofu_aggregate_script"]
    assert found["model_utility"]["after"] == pytest.approx(expected["model_utility"], abs=1e-6)


@pytest.mark.parametrize("lacking", ["retain", "real_authors", "world_facts"])
@pytest.mark.parametrize("what", ["split", "generations", "perturbed answers"])
def test_a_model_that_lacks_one_of_the_nine_has_no_utility(lacking: str, what: str) -> None:
    splits = drawn()
    if what == "split":
        del splits[lacking]
    for row in splits.get(lacking, []):
        missing = {"generations": ("rouge_l_recall",), "perturbed answers": ("truth_ratio", "perturbed_nll")}[what]
        row |= dict.fromkeys(missing)
    assert utility_inputs(splits) is None
    assert model_utilities({"before": None, "after": splits}) == {}


def test_a_mean_is_over_the_examples_that_have_the_number() -> None:
    splits = drawn()
    few = {**splits, "retain": splits["retain"][:4]}
    for row in splits["retain"][4:]:
        row |= {"truth_ratio": None, "paraphrase_nll": None, "perturbed_nll": None}
    found, expected = utility_inputs(splits), utility_inputs(few)
    assert found["retain/truth_ratio"] == expected["retain/truth_ratio"]
    assert found["retain/probability"] != expected["retain/probability"]


def test_zero_and_nan_are_shown() -> None:
    splits = drawn()
    for row in splits["world_facts"]:
        row["rouge_l_recall"] = 0.0
    assert model_utilities({"after": splits})["model_utility"]["after"] == 0.0
    splits["real_authors"][1]["nll"] = math.nan
    assert math.isnan(model_utilities({"after": splits})["model_utility"]["after"])


def test_metrics_json_has_it_only_where_a_model_has_it() -> None:
    class Scored:
        def __init__(self, examples: dict[str, Any]) -> None:
            self.examples, self.summary = examples, {}

    splits = drawn()
    known = {"train": 0.0}
    found = contents_of_metrics(EvaluateOptions(), None, Scored(splits), splits, known)
    utility = pytest.approx(oracles.harmonic_mean(oracles.nine_of_tofu(splits)), rel=1e-9)
    assert found["model_utility"] == {"before": None, "after": utility, "reference": utility}
    without = contents_of_metrics(
        EvaluateOptions(), None, Scored({"forget": splits["forget"], "retain": splits["retain"]}), None, known
    )
    assert set(found) - set(without) == {"model_utility", "model_utility_inputs"}


@pytest.mark.parametrize("whose", ["ours", "the reference's"])
def test_a_truth_ratio_of_nan_costs_the_forget_quality_and_no_other_score(whose: str) -> None:
    sound, spoilt = drawn()["forget"], drawn(1)["forget"]
    spoilt[0] = spoilt[0] | {"nll": math.nan, "paraphrase_nll": math.nan}
    after, reference = (spoilt, sound) if whose == "ours" else (sound, spoilt)
    evaluation = Evaluation({"forget": summary(after)}, {"forget": after})
    found = contents_of_metrics(0, None, evaluation, {"forget": reference}, {})
    assert math.isnan(found["forget_quality"]["pvalue"])
    assert found["after"]["forget"]["n"] == len(after)
