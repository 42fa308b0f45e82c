"""What the unlearned model still reveals: the text that it should have forgotten, and that it was trained on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_modules.report.finished import FinishedRun, columns, number

GIVEN_BACK = {
    "exact_memorization": "Exact memorization is the share of an answer's tokens that are the model's first choice, given the right ones "
    "before them: on forget lower means that less is reproduced, and a model that never saw the answers guesses some too; on retain "
    "higher is better.",
    "extraction_strength": "Extraction strength is the share of an answer that the model completes by itself, given all before it: on "
    "forget lower means that less is reproduced, down to what a model completes that never saw the answers; on retain higher is better.",
}
ATTACKS = {"loss": "loss", "min_k": "Min-K", "min_k_plus_plus": "Min-K++", "zlib": "zlib"}
"""An attack's name in metrics.json -> its usual name."""


def given_back(run: FinishedRun) -> list[str]:
    """Returns what the scores of reproduced text mean, for those scores that the run has."""
    return [GIVEN_BACK[column] for column, _ in columns(run) if column in GIVEN_BACK]


class Attack(NamedTuple):
    """A membership inference attack: its AUC on each model, and PrivLeak in percent; None where a number is missing."""

    name: str
    before: float | None
    after: float | None
    reference: float | None
    privleak: float | None


def membership(metrics: Mapping[str, Any]) -> list[Attack]:
    """Returns the attacks of metrics.json; an empty list if none was run."""
    keys = ("before_auc", "auc", "reference_auc", "privleak")
    attacks: Mapping[str, Mapping[str, Any]] = metrics.get("membership") or {}
    return [
        Attack(ATTACKS.get(name, name), *(number(found.get(key)) for key in keys)) for name, found in attacks.items()
    ]


def explained(metrics: Mapping[str, Any]) -> list[str]:
    """Returns what the numbers of `membership` mean, and why PrivLeak is missing if it is; nothing without attacks."""
    attacks = membership(metrics)
    if not attacks:
        return []
    compared = any(attack.reference is not None for attack in attacks)
    said = [
        "Membership: an attack's AUC is the chance that it finds a forget answer more familiar than a holdout answer, which no model has "
        "seen: 1 if it always does, 0.5 if it cannot tell them apart. The two sets may differ in more than what was trained on, so "
        + ("the goal is the reference's AUC, not 0.5." if compared else "0.5 need not be the goal.")
    ]
    perfect = [attack.name for attack in attacks if attack.reference == 1.0]
    if any(attack.privleak is not None for attack in attacks):
        said.append(
            "PrivLeak is how far 1 - AUC is from the reference's, relative to the reference's: 0 is best, below 0 the forget set is still "
            "remembered, above 0 it was unlearned too far."
        )
    elif not perfect:
        why = "its log has no scores of a holdout" if metrics["reference"] else "there is none"
        said.append(f"PrivLeak is not computed: it needs the AUCs of a reference, and {why}.")
    if perfect:
        said.append(
            f"PrivLeak is not defined for {', '.join(perfect)}: the reference tells the two sets apart perfectly (AUC 1), so either "
            "it was trained on the forget set or the holdout is of another kind."
        )
    return said


def percent(value: float | None) -> str:
    """Returns a PrivLeak with its sign; a dash for None.

    Example:
        >>> percent(-12.345), percent(None)
        ('-12.3 %', '-')
    """
    return "-" if value is None else "NaN" if value != value else f"{round(value, 1) + 0.0:+.1f} %"
