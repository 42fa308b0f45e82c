"""Draws the report of a run's folder. The room `report` may not import the options, so it is given their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_modules import report
from lightning_modules.folder import check_links
from lightning_modules.report.changed import Defaults
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.options.data import AUTHORS
from lightning_modules.run.resume import settled

_KINDS = ("model", "method", "rule", "forget_loss", "muse", "wmdp", "ledger", "teacher")
"""Options on which the defaults of others depend."""


def draw(folder: Path, others: Sequence[Path] = ()) -> None:
    """Draw the report of a run of `unlearn`, which names the options that are not the default; see `report.draw`."""
    check_links(folder)
    report.draw(folder, others, defaults(folder))


def draw_again(folder: Path, others: Sequence[Path] = ()) -> None:
    """As `draw`, and say where the report is."""
    draw(folder, others)
    Console(soft_wrap=True).print(f"The report is {folder / 'report.html'}", markup=False, highlight=False)


def defaults(folder: Path | None = None) -> Defaults:
    """The defaults of `gradsurgery unlearn`.

    Args:
        folder: Of a run: what it settled itself is no option that somebody gave.
    """
    # Earlier versions, whose config.yaml does not say it, read batches with padding.
    plain = UnlearnOptions().flat() | {"padding_free": False}
    return Defaults(plain, partial(_usual, settled=() if folder is None else settled(folder)))


def _usual(config: Mapping[str, Any], settled: Sequence[str]) -> dict[str, Any]:
    plain = UnlearnOptions().flat()
    kinds: dict[str, Any] = {name: config[name] for name in _KINDS if name in config}
    usual = UnlearnOptions.of(**kinds).resolved().flat() | {name: plain[name] for name in kinds}
    usual |= {name: config[name] for name in settled if name in config}
    if isinstance(config.get("probes"), bool):  # as earlier versions wrote it
        usual["probes"] = usual["probes"] == "quick"
    if config.get("authors") == AUTHORS:  # earlier versions wrote it also where it had no effect
        usual["authors"] = AUTHORS
    # These defaults depend on the machine, and the report may be drawn on another one than the run's.
    usual["padding_free"] = config.get("padding_free", False)
    return usual | {"precision": "bf16-mixed" if config.get("precision") == "bf16-mixed" else "32-true"}
