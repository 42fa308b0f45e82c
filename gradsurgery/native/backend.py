"""What computes, a kernel or plain PyTorch: the choice for the whole process, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple


class Backend:
    """What computes; as a context manager, for as long as the context lasts.

    Args:
        name: "compiled", "eager" or "triton".
        reason: Why, in words.
        restore: Called when the context ends.
    """

    def __init__(self, name: str, reason: str, restore: Callable[[], None]) -> None:
        self.name, self.reason = name, reason
        self._restore = restore

    def __enter__(self) -> Backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def __repr__(self) -> str:
        return f"{self.name}: {self.reason}"


class Needs(NamedTuple):
    """What a backend needs.

    Attributes:
        what: In words.
        lacking: Its result says why it is not there, where it is a string.
        otherwise: What can be chosen then.
    """

    what: str
    lacking: Callable[[], object]
    otherwise: str


class Chosen:
    """A choice for the whole process, "auto" from the start on.

    Args:
        names: What can be chosen, with what it needs.

    Attributes:
        name: What is chosen.
    """

    def __init__(self, names: Mapping[str, Needs | None]) -> None:
        self._names = names
        self.name = "auto"

    def compiles(self, numbers: int, smallest: int) -> bool:
        """Whether a compiled kernel may take so many numbers: with "auto" the smallest that are worth it, or more."""
        return (self.name == "auto" and numbers >= smallest) or (self.name == "compiled" and numbers > 0)

    def choose(self, name: str | None) -> Callable[[], None]:
        """Choose, unless the name is None. Returns what restores the choice before.

        Raises:
            ValueError: If there is no such backend.
            RuntimeError: If it cannot run; nothing is changed.
        """
        restore = functools.partial(setattr, self, "name", self.name)
        if name is None:
            return restore
        if name not in self._names:
            raise ValueError(f"backend: expected one of {', '.join(map(repr, self._names))}, or None, found {name!r}")
        needs = self._names[name]
        if needs is not None and isinstance(found := needs.lacking(), str):
            raise RuntimeError(f"backend: expected {needs.what}, found that {found}; or choose {needs.otherwise!r}")
        self.name = name
        return restore
