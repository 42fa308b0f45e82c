"""What was chosen to compute, and why."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Backend:
    """What computes; as a context manager, for as long as the context lasts.

    Args:
        name: See the attributes.
        reason: See the attributes.
        restore: Called when the context ends.

    Attributes:
        name: "compiled", "eager" or "triton".
        reason: Why, in words.
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
