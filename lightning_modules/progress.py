"""Where long work stands, in a log: without a terminal, a plain line at least every half minute.

A terminal has the bars of those who do the work, and gets no lines. The loops that do the work drive it: there is no
thread, so a single step that takes minutes is silent until it is done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from lightning.pytorch.utilities import rank_zero_only

EVERY = 30.0
"""Seconds between two lines."""


class Log:
    """Where lines go, and when the last one was written.

    All stages of a process share one, so that many short stages after each other are not silent either.

    Args:
        clock: Seconds that only grow.
        write: Takes a line; by default it goes to standard error, in the first of several processes.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, write: Callable[[str], object] | None = None
    ) -> None:
        self.clock = clock
        self.write = _to_standard_error if write is None else write
        self.silent = False
        self._last = clock()

    def offer(self, line: Callable[[float], str]) -> None:
        """Write the line, made from the time of the clock, if the last one was written long enough ago."""
        now = self.clock()
        if not self.silent and now - self._last >= EVERY:
            self._last = now
            self.write(line(now))


def _to_standard_error(line: str) -> None:
    if getattr(rank_zero_only, "rank", 0) == 0 and not sys.stderr.isatty():
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


LOG = Log()
"""That of this process."""


class Stage:
    """A part of the work whose steps are counted.

    Args:
        what: It is called in the lines, for example "Scoring answers".
        total: Its steps, if they are known.
        done: Those done before, as in a run that is resumed.
        log: Where the lines go; by default `LOG`.

    Example:
        >>> seconds = iter(range(0, 1000, 20))
        >>> stage = Stage("Scoring answers", 8, log=Log(lambda: next(seconds), print))
        >>> for _ in range(4):
        ...     stage.advance(2)
        Scoring answers: 2 of 8 done in 20 s, about 1 min 0 s left
        Scoring answers: 6 of 8 done in 1 min 0 s, about 20 s left
    """

    def __init__(self, what: str, total: int | None, *, done: int = 0, log: Log | None = None) -> None:
        self.what, self.total, self.done = what, total, done
        self.log = LOG if log is None else log
        self._done_before, self._began = done, self.log.clock()

    def advance(self, steps: int = 1) -> None:
        """Count steps, and write a line if it is time; 0 steps only say that the work goes on."""
        self.done += steps
        self.log.offer(self._line)

    def _line(self, now: float) -> str:
        spent, done = now - self._began, self.done - self._done_before
        line = f"{self.what}: {self.done}{'' if self.total is None else f' of {self.total}'} done in {_duration(spent)}"
        if self.total is None or self.done >= self.total:
            return line
        left = f"about {_duration(spent / done * (self.total - self.done))}" if done else "nobody knows how much"
        return f"{line}, {left} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
