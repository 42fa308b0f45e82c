"""What a command prints at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from lightning_modules.report.terminal import sentences, tables


def show(metrics: Mapping[str, Any]) -> None:
    """Print what metrics.json holds: the tables, and the sentences that explain them."""
    console = Console()
    for table in tables(metrics, console.width):
        console.print(table)
    for sentence in sentences(metrics):
        console.print(sentence)
