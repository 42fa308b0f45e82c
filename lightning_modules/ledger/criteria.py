"""Criteria: what a deletion has to reach, said before it, and whether it did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lightning_modules.data.files import existing_file, read_yaml
from lightning_modules.ledger.hashes import sha256


@dataclass(frozen=True)
class Kind:
    """A criterion that there is.

    Attributes:
        at_most: Whether its number may be at most the limit; otherwise at least.
        lowest: The lowest limit that makes sense.
        highest: The highest one.
        words: What its number is, for the report.
    """

    at_most: bool
    lowest: float
    highest: float
    words: str


KINDS = {
    "forget_probability": Kind(True, 0.0, 1.0, "mean probability of the answers to forget"),
    "forget_quality": Kind(False, 0.0, 1.0, "p-value: truth ratios as those of a model that never saw the answers"),
    "relearning_gap": Kind(True, -1.0, 1.0, "probability that relearning brings back, above the reference's"),
    "retention": Kind(
        False, 0.0, 2.0, "probability of the answers to keep, as a share of that before the first request"
    ),
    "model_utility": Kind(False, 0.0, 1.0, "TOFU's model utility"),
}
"""The criteria by name."""


@dataclass(frozen=True)
class Criteria:
    """What a run has to reach.

    Attributes:
        limits: Criterion -> limit.
        sha256: Of the file that says it; None without one.
        text: Of that file.
    """

    limits: Mapping[str, float]
    sha256: str | None = None
    text: str | None = None


def read_criteria(name: str) -> Criteria:
    """The criteria of a YAML file, one `name: limit` a line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no criterion, one that there is not, or a limit that is no number or makes no sense.
    """
    path = existing_file(name, "a YAML file of criteria")
    values = read_yaml(path, "criteria, one `name: limit` a line")
    if not isinstance(values, Mapping) or not values:
        found = "nothing" if not values else type(values).__name__
        raise ValueError(f"--criteria {path}: expected one or more of {', '.join(KINDS)}, found {found}")
    limits: dict[str, float] = {}
    for key, limit in values.items():
        if key not in KINDS:
            near = get_close_matches(str(key), KINDS)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"--criteria {path}: expected one of {', '.join(KINDS)}, found {str(key)!r:.80}{hint}")
        kind = KINDS[key]
        number = not isinstance(limit, bool) and isinstance(limit, (int, float)) and math.isfinite(limit)
        if not number or not kind.lowest <= limit <= kind.highest:
            raise ValueError(
                f"--criteria {path}, {key}: expected a number between {kind.lowest:g} and {kind.highest:g}, found {limit!r:.80}"
            )
        limits[key] = float(limit)
    data = path.read_bytes()  # with its line ends: what is kept has the hash
    return Criteria(limits, sha256(data), data.decode("utf-8"))


def verdicts(criteria: Mapping[str, float], found: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Criterion by criterion what was found, and whether it holds: not, where nothing was found.

    Example:
        >>> verdicts({"retention": 0.98}, {"retention": 0.99})
        [{'criterion': 'retention', 'limit': 0.98, 'rule': 'at least', 'found': 0.99, 'holds': True}]
    """
    said: list[dict[str, Any]] = []
    for name, limit in criteria.items():
        value, kind = found.get(name), KINDS[name]
        value = value if value is not None and math.isfinite(value) else None
        holds = value is not None and (value <= limit if kind.at_most else value >= limit)
        said.append(
            {
                "criterion": name,
                "limit": limit,
                "rule": "at most" if kind.at_most else "at least",
                "found": value,
                "holds": holds,
            }
        )
    return said
