"""What the model after still gives away of what it forgot: its words, and that it was trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_modules.report.run import Run, columns, number

GIVEN_BACK = {
    "exact_memorization": "Exact memorization is the share of an answer's tokens that are the model's first choice, given the right ones "
    "before them: lower is better on forget, where 0 means that nothing of the answer is reproduced, and higher on retain.",
    "extraction_strength": "Extraction strength is the share of an answer that the model completes by itself, given all before it: lower "
    "is better on forget, where 0 means that nothing of the answer is reproduced, and higher on retain.",
}
MEMBERSHIP = (
    "An attack's AUC is the chance that it finds a forget answer more familiar than a holdout answer, which no model has seen: 1 if it "
    "always does, .5 if it cannot tell them apart. The reference's is the goal, for the two sets differ in more than that; PrivLeak is "
    "the distance to it, relative to 1 minus it: 0 is best, and below 0 the forget set is still remembered."
)
ATTACKS = {"loss": "loss", "min_k": "Min-K", "min_k_plus_plus": "Min-K++", "zlib": "zlib"}
"""Name in metrics.json -> the one that people say."""


def given_back(run: Run) -> list[str]:
    """What the scores of reproduced text mean, for those that the run has."""
    return [GIVEN_BACK[column] for column, _ in columns(run) if column in GIVEN_BACK]


class Attack(NamedTuple):
    """The AUCs of a membership inference attack on each model, and PrivLeak in percent; None where there is no such number."""

    name: str
    before: float | None
    after: float | None
    reference: float | None
    privleak: float | None


def membership(run: Run) -> list[Attack]:
    """The attacks of metrics.json; none where they were not made."""
    keys = ("before_auc", "auc", "reference_auc", "privleak")
    attacks: Mapping[str, Mapping[str, Any]] = run.metrics.get("membership") or {}
    return [
        Attack(ATTACKS.get(name, name), *(number(found.get(key)) for key in keys)) for name, found in attacks.items()
    ]


def percent(value: float | None) -> str:
    """A PrivLeak with its sign; a dash for what was not measured.

    Example:
        >>> percent(-12.345), percent(None)
        ('-12.3 %', '-')
    """
    return "-" if value is None else "NaN" if value != value else f"{round(value, 1) + 0.0:+.1f} %"
