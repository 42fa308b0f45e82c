"""Rows that are in two splits at once, of which no score says what it should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_modules.data.examples import Example
from lightning_modules.data.heldout import RETAIN_HELDOUT
from lightning_modules.evaluation.processes import will_be_first
from lightning_modules.run.show import say

_NAMED = 5


def check_overlap(splits: Mapping[str, Sequence[Example]]) -> None:
    """Warn about rows with the same question and answer in the forget and the retain set, and name them.

    Such a row pulls the weights both ways, and no score of either set says what it should.

    Args:
        splits: With "forget" and "retain".

    Raises:
        ValueError: If the retain set holds the whole forget set: then nothing is to be forgotten.
    """
    places: dict[Any, int] = {}
    for number, row in enumerate(splits["retain"], start=1):
        places.setdefault(_key(row), number)
    both = [
        (number, places[key]) for number, row in enumerate(splits["forget"], start=1) if (key := _key(row)) in places
    ]
    if not both:
        return
    named = ", ".join(f"{forget} (retain row {retain})" for forget, retain in both[:_NAMED])
    said = f"forget row{'s' * (len(both) > 1)} {named}{' and more' * (len(both) > _NAMED)}"
    if len(both) == len(splits["forget"]):
        raise ValueError(
            f"--forget, --retain: expected something to forget that is not to be kept, found all {len(both)} rows of the forget set in the "
            f"retain set too, {said}; take them out of the retain set"
        )
    if will_be_first():
        say(
            f"Warning: {len(both)} of {len(splits['forget'])} rows are to be forgotten and to be kept at once, {said}; take them out of "
            "one of the two sets"
        )


def check_heldout(splits: Mapping[str, Sequence[Example]]) -> None:
    """Refuse held-out rows that are trained on after all: their score would not be one of what training never saw.

    Args:
        splits: With "forget" and "retain", and perhaps "retain_heldout".

    Raises:
        ValueError: If a row of "retain_heldout" is in another split with the same question and answer.
    """
    for split in ("forget", "retain"):
        trained = {_key(row) for row in splits[split]}
        both = [number for number, row in enumerate(splits.get(RETAIN_HELDOUT, ()), start=1) if _key(row) in trained]
        if both:
            named = ", ".join(map(str, both[:_NAMED])) + " and more" * (len(both) > _NAMED)
            raise ValueError(
                f"--retain-heldout: expected examples that unlearning never sees, found {len(both)} of {len(splits[RETAIN_HELDOUT])} that "
                f"are in {split} too (held-out row{'s' * (len(both) > 1)} {named}); take them out of one of the two"
            )


def _key(row: Example) -> tuple[str, str]:
    return str(row["question"]).strip(), str(row["answer"]).strip()
