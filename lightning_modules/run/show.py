"""What a command prints: the format of its examples before the work, and the scores at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from lightning_modules.data.chat import date_told
from lightning_modules.data.examples import asked
from lightning_modules.data.tokenization import encode, marked
from lightning_modules.report.terminal import sentences, tables
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.run import Run


def show_example(run: Run[UnlearnOptions]) -> None:
    """Print one example to standard error as the model reads it, with the tokens of the answer marked.

    A wrong chat template is seen there, and nowhere else before the scores are odd.
    """
    row, tokenizer = run.splits["forget"][0], run.tokenizer
    console = Console(stderr=True, soft_wrap=True)
    text = marked(tokenizer, encode(tokenizer, asked(row), row["answer"], run.options.data.max_length))
    console.print(
        f"The first forget example, its answer between [[ and ]]: {text}", markup=False, highlight=False, emoji=False
    )
    day = date_told(tokenizer)
    if day is not None:
        console.print(
            f"The chat template asks for today's date and is told {day}, whatever the day; --chat-template-kwargs "
            "'{strftime_now: YYYY-MM-DD}' tells it another",
            markup=False,
            highlight=False,
        )


def show(metrics: Mapping[str, Any]) -> None:
    """Print what metrics.json holds: the tables, and the sentences that explain them."""
    console = Console()
    for table in tables(metrics, console.width):
        console.print(table)
    for sentence in sentences(metrics):
        console.print(sentence)
