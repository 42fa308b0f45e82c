"""Many small groups of options inside, one flat table outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, field, fields, replace
from typing import Any, Self

AUTO = "auto"
"""The value of an option that the run finds out itself: a learning rate or a radius."""
NO_PART = ("resume", "dry_run")
"""Options that are no part of what a run is: they say what is done with it now."""
NAMES = "names"
"""Key in a field's metadata: the values that the option can have, where they are the keys of a table in the code.

A `Literal` would repeat the table.
"""


class Flat:
    """Base of a dataclass whose fields are groups of options, each a dataclass of its own.

    A function inside is given the group that it needs. On the command line and in config.yaml there are no groups:
    every option stands by its own name, in the order of the groups and of their fields.
    """

    @classmethod
    def groups(cls) -> list[type]:
        """The groups' classes, in order."""
        return [entry.default_factory for entry in fields(cls)]  # pyright: ignore[reportArgumentType, reportReturnType]

    @classmethod
    def names(cls) -> list[str]:
        """The options' names, in order."""
        return [option.name for group in cls.groups() for option in fields(group)]

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Options by name; those that are not given have their defaults.

        Raises:
            TypeError: If no group has an option of that name.
        """
        return cls().but(**values)

    def but(self, **changes: Any) -> Self:
        """A copy in which some options, given by name, have other values.

        Raises:
            TypeError: If no group has an option of that name.
        """
        groups: dict[str, Any] = {}
        for entry in fields(self):  # pyright: ignore[reportArgumentType] (a subclass is a dataclass)
            group = getattr(self, entry.name)
            own = {option.name: changes.pop(option.name) for option in fields(group) if option.name in changes}
            groups[entry.name] = replace(group, **own)
        if changes:
            raise TypeError(f"{type(self).__name__}: expected options, found {', '.join(changes)}, which is none")
        return type(self)(**groups)

    def flat(self) -> dict[str, Any]:
        """Option -> value, in the order of the command line."""
        groups = (getattr(self, entry.name) for entry in fields(self))  # pyright: ignore[reportArgumentType]
        return {name: value for group in groups for name, value in asdict(group).items()}

    def recorded(self) -> dict[str, Any]:
        """What config.yaml holds: every option but those that are no part of what the run is."""
        return {name: value for name, value in self.flat().items() if name not in NO_PART}


def one_of(names: Sequence[str], default: str) -> Any:
    """A field of a group that can have these values only; the command line refuses any other."""
    return field(default=default, metadata={NAMES: tuple(names)})


def flag(name: str) -> str:
    """The flag of an option.

    Example:
        >>> flag("lora_rank")
        '--lora-rank'
    """
    return f"--{name.replace('_', '-')}"


def check_finite(options: Flat) -> None:
    """Raise ValueError if a number is NaN or infinite: YAML can spell both, and no comparison notices NaN."""
    for name, value in options.flat().items():
        for entry, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{flag(name)}{entry and f', {entry}'}: expected a finite number, found {number}")


def not_negative(group: Any, *names: str) -> None:
    """Raise ValueError if one of these options is below 0."""
    for name in names:
        if getattr(group, name) < 0:
            raise ValueError(f"expected {flag(name)} >= 0, found {getattr(group, name)}")


def at_least_one(group: Any, *names: str) -> None:
    """Raise ValueError if one of these options is given and below 1."""
    for name in names:
        value = getattr(group, name)
        if value is not None and value < 1:
            raise ValueError(f"expected {flag(name)} >= 1, found {value}")
