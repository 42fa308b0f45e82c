"""The report of a run, from the files in its folder: for a terminal, as Markdown and as HTML."""

from __future__ import annotations

from lightning_modules.evaluation.intervals import Interval, mean_interval
from lightning_modules.report.drawing import draw
from lightning_modules.report.terminal import sentences, table

__all__ = ["Interval", "draw", "mean_interval", "sentences", "table"]
