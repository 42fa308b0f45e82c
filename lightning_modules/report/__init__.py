"""The report of a run: for a terminal, as report.md with curves.png, and as report.html, from what the run left in its folder."""

from __future__ import annotations

from lightning_modules.report.drawing import draw
from lightning_modules.report.intervals import Interval, mean_interval
from lightning_modules.report.terminal import sentences, table

__all__ = ["Interval", "draw", "mean_interval", "sentences", "table"]
