"""Held-out retention: examples that are to be kept and that unlearning never sees, as the split "retain_heldout"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_modules.data.examples import Example

RETAIN_HELDOUT = "retain_heldout"
"""Name of the split. The start model knows its examples, as it knows those of "retain"; training takes only those."""


def to_keep(splits: Mapping[str, Sequence[Example]]) -> list[Example]:
    """All examples that are to be kept, those that are trained on first: what a reference knows."""
    return [*splits["retain"], *splits.get(RETAIN_HELDOUT, ())]


def held_out(retain: Sequence[Example], authors: int, per_author: int) -> dict[str, list[Example]]:
    """The examples to keep in two splits, "retain" and, with the last authors, "retain_heldout".

    They are the last ones, so that the two splits one after another are the examples as they were, and a model that is
    taught them is the same one.

    Args:
        retain: All examples to keep, author by author.
        authors: How many of them are held out; with 0 there is no second split.
        per_author: Examples of an author.

    Raises:
        ValueError: If none would be left to train on, or the number is negative.

    Example:
        >>> rows = [{"question": str(number), "answer": "Yes."} for number in range(6)]
        >>> {split: len(found) for split, found in held_out(rows, 1, 2).items()}
        {'retain': 4, 'retain_heldout': 2}
    """
    kept = len(retain) // per_author
    if not 0 <= authors < max(kept, 1):
        raise ValueError(
            f"--heldout-authors: expected less than the {kept} authors that are to be kept, so that some are trained on, found {authors}"
        )
    if not authors:
        return {"retain": list(retain)}
    first = len(retain) - authors * per_author
    return {"retain": list(retain[:first]), RETAIN_HELDOUT: list(retain[first:])}
