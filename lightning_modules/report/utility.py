"""TOFU's model utility in the reports and for a terminal: the number and the nine it is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_modules.metrics.functional import UTILITY_METRICS, UTILITY_SPLITS
from lightning_modules.report.finished import MODELS, number

_METRICS = {"probability": "probability", "rouge_l_recall": "ROUGE-L recall", "truth_ratio": "truth ratio"}


class UtilityRow(NamedTuple):
    """Model utility, or one of its nine inputs, of each model; None where a model has none."""

    name: str
    before: float | None
    after: float | None
    reference: float | None


def utility_rows(metrics: Mapping[str, Any]) -> list[UtilityRow]:
    """Returns model utility first and then its nine inputs; nothing where no model has one.

    Args:
        metrics: the contents of metrics.json.
    """
    utilities: Mapping[str, Any] = metrics.get("model_utility") or {}
    if all(utilities.get(model) is None for model in MODELS):
        return []
    rows = [UtilityRow("model utility", *(number(utilities.get(model)) for model in MODELS))]
    inputs: Mapping[str, Any] = metrics.get("model_utility_inputs") or {}
    for split in UTILITY_SPLITS:
        for metric in UTILITY_METRICS:
            values = [number((inputs.get(model) or {}).get(f"{split}/{metric}")) for model in MODELS]
            if any(value is not None for value in values):
                rows.append(UtilityRow(f"{split}: {_METRICS[metric]}", *values))
    return rows


def utility_explained(metrics: Mapping[str, Any]) -> list[str]:
    """Returns what model utility means; nothing where no model has one."""
    if not utility_rows(metrics):
        return []
    return [
        "Model utility (TOFU) is the harmonic mean of nine numbers, probability, ROUGE-L recall and truth ratio on retain, "
        "real_authors and world_facts; higher is better, and it is small as soon as one of the nine is. The probability of "
        "real_authors and world_facts is the answer's share among the options there, as TOFU defines it; in the other tables "
        "it is the answer's own."
    ]
