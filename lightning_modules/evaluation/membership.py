"""Whether the scores of an evaluation's examples give away which of them a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_modules.metrics.functional import auc, priv_leak

ATTACKS = ("loss", "min_k", "min_k_plus_plus", "zlib")
"""The attacks; an example's score is its `<attack>_score`, which `memorization.memory_scores` makes."""

MEMBERS, HOLDOUT = "forget", "holdout"
"""The splits that an attack tries to tell apart: what was learned, and what neither model has seen."""

Examples = Mapping[str, Sequence[Mapping[str, Any]]]


def attack_aucs(examples: Examples | None) -> dict[str, float] | None:
    """The area under the curve of every attack on one model: its forget examples against its holdout examples.

    An AUC by itself says little: `metrics.functional.auc` says why, and what to compare it with.

    Args:
        examples: split -> scored examples, as in `Evaluation.examples`.

    Returns:
        attack -> AUC in [0, 1], NaN for a model that diverged; `None` where there is no split called "holdout", none
        called "forget", or where an example of them lacks a score (a log of an earlier version).
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
    """How well each attack tells what was forgotten from what was never seen, before and after, and beside the reference.

    Args:
        before: split -> scored examples of the model before unlearning, `None` where there was none.
        after: of the unlearned model.
        reference: of the model that never saw the forget set, `None` where there is none.

    Returns:
        attack -> `{"auc", "privleak", "before_auc", "reference_auc"}`; `auc` is the unlearned model's, `privleak` is
        `metrics.functional.priv_leak` in percent: nearest 0 is best, below it is still remembered. An AUC is `None`
        where there is no such model (or its log has no scores), `privleak` where there is no reference AUC, or where
        that is 1, relative to which nothing can be said. `None` altogether as for `attack_aucs` of the unlearned model.
    """
    found, start, goal = attack_aucs(after), attack_aucs(before) or {}, attack_aucs(reference) or {}
    if found is None:
        return None
    return {attack: _against(area, start.get(attack), goal.get(attack)) for attack, area in found.items()}


def _against(area: float, before: float | None, reference: float | None) -> dict[str, float | None]:
    leak = None if reference is None or reference == 1.0 else priv_leak(area, reference)
    return {"auc": area, "privleak": leak, "before_auc": before, "reference_auc": reference}
