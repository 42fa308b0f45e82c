"""What benchmarks say, in the reports and for a terminal: one table, whatever the benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_modules.report.finished import MODELS, shown

_SCORES = {
    "rouge_l_f1": "ROUGE-L F1",
    "accuracy": "accuracy",
    "min_k_auc": "Min-40% AUC",
    "privleak": "PrivLeak, %",
}
_MEANINGS = {
    "rouge_l_f1": "ROUGE-L F1: how much of the right words, and of no others, the model says. Of what is to be forgotten less is better, "
    "down to what the reference says; of what is to be kept more is better.",
    "accuracy": "Accuracy: the share of multiple-choice questions whose right letter is the likeliest, with a 95 % interval; chance is "
    "0.25 with four. On what is to be forgotten lower is better, down to chance; on mmlu, general knowledge, higher is better.",
    "min_k_auc": "Min-40% AUC: the chance that a text of the forget set is more familiar to the model than one that no model has seen. The "
    "goal is the reference's, not 0.5.",
    "privleak": "PrivLeak: how far 1 - AUC is from the reference's, relative to the reference's: 0 is best, below 0 the texts are still "
    "remembered, above 0 they were unlearned too far.",
}


class BenchmarkRow(NamedTuple):
    """A score of a benchmark: its name, what each model has, as text, and over how many examples."""

    name: str
    before: str
    after: str
    reference: str
    n: str


def benchmark_rows(metrics: Mapping[str, Any]) -> list[BenchmarkRow]:
    """Returns the scores of benchmarks in metrics.json; an empty list where there are none."""
    found: Mapping[str, Mapping[str, Any]] = metrics.get("benchmarks") or {}
    rows: list[BenchmarkRow] = []
    for name, scores in found.items():
        split, _, score = name.partition("/")
        before, after, reference = (_cell(scores, model) for model in MODELS)
        rows.append(
            BenchmarkRow(f"{split}: {_SCORES.get(score, score)}", before, after, reference, f"{scores.get('n', 0):.0f}")
        )
    return rows


def benchmarks_explained(metrics: Mapping[str, Any]) -> list[str]:
    """Returns what the scores of `benchmark_rows` mean, a sentence for each kind."""
    kinds = dict.fromkeys(name.rpartition("/")[2] for name in metrics.get("benchmarks") or {})
    return [_MEANINGS[kind] for kind in kinds if kind in _MEANINGS]


def _cell(scores: Mapping[str, Any], model: str) -> str:
    low, high = scores.get(f"{model}_low"), scores.get(f"{model}_high")
    interval = "" if low is None or high is None else f" [{shown(low)}, {shown(high)}]"
    return f"{shown(scores.get(model))}{interval}"
