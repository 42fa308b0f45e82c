"""The run that is under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning_modules.data.examples import Example
from lightning_modules.ledger.request import Request
from lightning_modules.run.options import Options

OptionsT_co = TypeVar("OptionsT_co", bound=Options, covariant=True)
Splits = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Run(Generic[OptionsT_co]):
    """What stays the same from the first score to the report, and is handed down as one thing.

    Attributes:
        options: Of the command, resolved.
        folder: Where the run leaves its files.
        splits: All examples by split.
        tokenizer: Of the model that is to forget.
        chosen: Names of the options that nobody gave and the run chose.
        request: What a ledger is to say of the run, and what it protects; None without a ledger.
    """

    options: OptionsT_co
    folder: Path
    splits: Splits
    tokenizer: Any
    chosen: tuple[str, ...] = ()
    request: Request | None = None
