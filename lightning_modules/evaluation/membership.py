"""Membership inference: whether the scores of the examples reveal which of them a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_modules.metrics.functional import auc, priv_leak

ATTACKS = ("loss", "min_k", "min_k_plus_plus", "zlib")
"""The attacks; the score of an example is its `<attack>_score`, from `memorization.memory_scores`."""

MEMBERS, HOLDOUT = "forget", "holdout"
"""The splits that an attack tries to tell apart: what was learned, and what no model has seen."""

Examples = Mapping[str, Sequence[Mapping[str, Any]]]


def attack_aucs(examples: Examples | None) -> dict[str, float] | None:
    """Returns the area under the ROC curve of every attack on one model: its forget against its holdout examples.

    An AUC by itself says little; `metrics.functional.auc` explains why, and what to compare it with.

    Args:
        examples: split -> scored examples, as in `Evaluation.examples`.

    Returns:
        attack -> AUC in [0, 1], NaN for a model that diverged. `None` without a split called "holdout" or one called
        "forget", or if one of their examples lacks a score because it was scored without memorization.
    """
    rows = {split: (examples or {}).get(split, ()) for split in (MEMBERS, HOLDOUT)}
    names = [f"{attack}_score" for attack in ATTACKS]
    if not all(rows.values()) or any(
        row.get(name) is None for split in rows.values() for row in split for name in names
    ):
        return None
    return {
        attack: auc([row[name] for row in rows[MEMBERS]], [row[name] for row in rows[HOLDOUT]])
        for attack, name in zip(ATTACKS, names, strict=True)
    }


def membership(
    before: Examples | None, after: Examples, reference: Examples | None
) -> dict[str, dict[str, float | None]] | None:
    """Returns how well each attack tells the forget set from the holdout set, for all models of a run.

    Args:
        before: split -> scored examples of the model before unlearning; `None` if it was not scored.
        after: the same of the unlearned model.
        reference: the same of the model that never saw the forget set; `None` if there is none.

    Returns:
        attack -> `{"auc", "privleak", "before_auc", "reference_auc"}`. `auc` is the unlearned model's. `privleak` is
        `metrics.functional.priv_leak` in percent: closest to 0 is best, below 0 the set is still remembered. An AUC is
        `None` if there is no such model or its examples lack scores. `privleak` is `None` if the reference AUC is, or
        if that is 1, where PrivLeak is not defined. The whole result is `None` if `attack_aucs(after)` is.
    """
    found, start, goal = attack_aucs(after), attack_aucs(before) or {}, attack_aucs(reference) or {}
    if found is None:
        return None
    return {attack: _against(area, start.get(attack), goal.get(attack)) for attack, area in found.items()}


def _against(area: float, before: float | None, reference: float | None) -> dict[str, float | None]:
    leak = None if reference is None or reference == 1.0 else priv_leak(area, reference)
    return {"auc": area, "privleak": leak, "before_auc": before, "reference_auc": reference}
