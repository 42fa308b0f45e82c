"""What a command prints: the format of its examples before the work, and the scores at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from lightning_modules.data.chat import date_told
from lightning_modules.data.examples import Example, asked
from lightning_modules.data.tasks import apart
from lightning_modules.data.tokenization import encode, marked
from lightning_modules.evaluation.evaluate import Evaluation
from lightning_modules.report.findings import little_to_forget
from lightning_modules.report.terminal import sentences, tables
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.run import Run


def show_example(run: Run[UnlearnOptions]) -> None:
    """Print one example to standard error as the model reads it, with the tokens of the answer marked.

    A wrong chat template is seen there, and nowhere else before the scores are odd.
    """
    show_row(run.tokenizer, run.splits["forget"][0], run.options.data.max_length, "The first forget example")


def show_row(tokenizer: Any, row: Example, max_length: int, what: str) -> None:
    """Print an example as `show_example` does, by the name `what`."""
    console = Console(stderr=True, soft_wrap=True)
    text = marked(tokenizer, encode(tokenizer, asked(row), row["answer"], max_length))
    console.print(f"{what}, its answer between [[ and ]]: {text}", markup=False, highlight=False, emoji=False)
    day = date_told(tokenizer)
    if day is not None:
        console.print(
            f"The chat template asks for today's date and is told {day}, whatever the day; --chat-template-kwargs "
            "'{strftime_now: YYYY-MM-DD}' tells it another",
            markup=False,
            highlight=False,
        )


def show_start(before: Evaluation) -> None:
    """Say to standard error if the model hardly knows what it is to forget; before the training, which it may spare.

    With a benchmark it says nothing: that tells itself how much is known, and the probability of long texts does not.
    """
    said = None if apart(before.examples)[1] else little_to_forget(before.summary)
    if said is not None:
        Console(stderr=True, soft_wrap=True).print(f"Warning: {said}", markup=False, highlight=False)


def show(metrics: Mapping[str, Any]) -> None:
    """Print what metrics.json holds: the tables, and the sentences that explain them."""
    console = Console()
    for table in tables(metrics, console.width):
        console.print(table)
    for sentence in sentences(metrics):
        console.print(sentence)
