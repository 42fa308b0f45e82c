"""Numbers of a YAML file that count something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def whole(given: Mapping[str, float], counts: Sequence[str], who: str = "") -> dict[str, Any]:
    """The settings with whole numbers where something is counted, also where the file says 20.0.

    Args:
        given: Setting -> number.
        counts: The settings that count.
        who: Before the name in an error.

    Raises:
        ValueError: If one of these is no whole number.

    Example:
        >>> whole({"steps": 20.0, "lr": 1e-3}, ["steps"])
        {'steps': 20, 'lr': 0.001}
    """
    if wrong := [name for name in counts if name in given and given[name] != int(given[name])]:
        raise ValueError(f"{who}{wrong[0]}: expected a whole number, found {given[wrong[0]]}")
    return {name: int(value) if name in counts else value for name, value in given.items()}
