"""What a command prints: the format of its examples before the work, and the scores at its end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_modules.data.asked_words import without_asked_words
from lightning_modules.data.chat import date_told, has_template, written_before_answers
from lightning_modules.data.examples import Example, asked
from lightning_modules.data.formats import format_of
from lightning_modules.data.tasks import apart
from lightning_modules.data.tokenization import IGNORED, Encoded, encode_example, marked
from lightning_modules.evaluation.evaluate import Evaluation
from lightning_modules.ledger.batch import PARTS
from lightning_modules.report.attacks import attack_table
from lightning_modules.report.attacks import sentences as attack_sentences
from lightning_modules.report.findings import little_to_forget, warnings
from lightning_modules.report.finished import read
from lightning_modules.report.target import nothing_to_forget
from lightning_modules.report.terminal import sentences, tables
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.options.flat import flag
from lightning_modules.run.options.recipes import unasked
from lightning_modules.run.run import Run


def say(sentence: str) -> None:
    """Write a sentence to standard error, as it is."""
    Console(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False, emoji=False)


def show_recipe(options: UnlearnOptions, stated: Collection[str]) -> None:
    """Say to standard error what a recipe that nobody named has set, which is the case with --model.

    Args:
        options: Of the run.
        stated: Names of the options that were given.
    """
    values = options.flat()
    if brought := unasked({name: values[name] for name in stated if name in values}):
        flags = " ".join(f"{flag(name)} {str(value).lower()}" for name, value in brought.items())
        say(f"Recipe {options.recipe.recipe}, as no --recipe was given: {flags}; --recipe paper leaves them out")


def row_said(tokenizer: Any, row: Example, example: Encoded, keeps: bool) -> str:
    """An example as the model reads it, and what of it is trained on.

    Args:
        tokenizer: Of the model.
        row: The example.
        example: The same, tokenized.
        keeps: Whether the words of its question are left alone.
    """
    if not keeps:
        return f"its answer between [[ and ]]: {marked(tokenizer, example)}"
    example = without_asked_words(tokenizer, example, asked(row))
    return f"what is to be forgotten of its answer between [[ and ]]: {marked(tokenizer, example)}"


def show_example(run: Run[UnlearnOptions]) -> None:
    """Print one example to standard error as the model reads it, with the tokens of the answer marked.

    A wrong chat template is seen there, and nowhere else before the scores are odd.
    """
    keeps = run.options.method.keep_asked_words
    show_row(run.tokenizer, run.splits["forget"][0], run.options.data.max_length, "The first forget example", keeps)
    if not run.options.model.scratch:
        show_format(run.tokenizer)
    method = run.options.method
    if method.method == "surgery" and method.forget_loss == "ceu" and not run.options.data.cuts_texts:
        _show_short(run)


def _show_short(run: Run[UnlearnOptions]) -> None:
    """Say if CE-U, which leaves out each answer's first token, as in its paper, leaves nothing of some answers."""
    rows, tokenizer = run.splits["forget"], run.tokenizer
    special = {
        IGNORED,
        *tokenizer.all_special_ids,
        *tokenizer.get_added_vocab().values(),
    }  # an end of turn may be no special one
    examples = [encode_example(tokenizer, row, run.options.data.max_length) for row in rows]
    short = sum(sum(label not in special for label in example.labels) <= 1 for example in examples)
    if short:
        say(
            f"Warning: ceu leaves out the first token of each answer, as in its paper, and {short} of {len(rows)} forget answers have no "
            "other: --forget-loss unlikelihood, which has the same gradient, leaves none out"
        )


def show_format(tokenizer: Any) -> None:
    """Print what `format_said` says."""
    for sentence in format_said(tokenizer):
        say(sentence)


def show_row(tokenizer: Any, row: Example, max_length: int, what: str, keeps: bool = False) -> None:
    """Print an example as `show_example` does, by the name `what`."""
    say(f"{what}, {row_said(tokenizer, row, encode_example(tokenizer, row, max_length), keeps)}")
    day = date_told(tokenizer)
    if day is not None:
        say(
            f"The chat template asks for today's date and is told {day}, whatever the day; --chat-template-kwargs "
            "'{strftime_now: YYYY-MM-DD}' tells it another"
        )


def format_said(tokenizer: Any) -> list[str]:
    """Sentences about what a model from elsewhere lacks for questions and answers, and what takes its place."""
    said: list[str] = []
    if not has_template(tokenizer) and format_of(tokenizer) is None:
        said.append(
            "The tokenizer has no chat template: questions and answers are written as Q: and A:, which --prompt-format changes"
        )
    if format_of(tokenizer) is None and (written := written_before_answers(tokenizer)).strip():
        said.append(
            f"The chat template writes {written!r} before every answer, which is trained on and scored as a part of it; "
            "--chat-template-kwargs can put a thought into the prompt: '{enable_thinking: false}'"
        )
    if tokenizer.pad_token is None:
        said.append(f"The tokenizer has no pad token, and needs none: {tokenizer.eos_token} fills up shorter rows")
    return said


def show_start(before: Evaluation, level: float | None = None, of: str = "asked") -> None:
    """Say to standard error if the model hardly knows what it is to forget; before the training, which it may spare.

    Args:
        before: Scores of the model before unlearning.
        level: The forget probability at which training ends; None or 0 where there is none.
        of: Whose it is, see `report.target.nothing_to_forget`.

    With a benchmark it says nothing: that tells itself how much is known, and the probability of long texts does not.
    """
    if apart(before.examples)[1]:
        return
    said = nothing_to_forget(before.summary, level, of) or little_to_forget(before.summary)
    if said is not None:
        say(f"Warning: {said}")


def show(metrics: Mapping[str, Any]) -> None:
    """Print what metrics.json holds: the tables, and the sentences that explain them."""
    console = Console()
    for table in tables(metrics, console.width):
        console.print(table)
    for sentence in sentences(metrics):
        console.print(sentence)


def show_warnings(folder: Path) -> None:
    """Print what the report of a run's folder begins with: what a reader must know before the numbers."""
    for warning in warnings(read(folder)):
        Console(soft_wrap=True).print(f"Warning: {warning}", markup=False, highlight=False)


def show_probes(probes: Mapping[str, Any]) -> None:
    """Print what probes.json holds: the attacks beside the reference's, and a sentence for each."""
    console = Console()
    if table := attack_table(probes):
        console.print(table)
    for sentence in attack_sentences(probes):
        console.print(sentence, markup=False)


def show_entry(entry: Mapping[str, Any], ledger: Path) -> None:
    """Print what a run was entered with: its criteria, the earlier requests that came back, and its sketch."""
    console = Console(soft_wrap=True)
    said = [f"Entry {entry['number']} of {ledger}: {entry['request']['id']}, {entry['kind']}; hash {entry['hash']}"]
    for verdict in entry["verdicts"]:
        found = "not measured" if verdict["found"] is None else f"{verdict['found']:.3g}"
        word = "holds" if verdict["holds"] else "does not hold"
        said.append(f"  {verdict['criterion']}: {found}, {verdict['rule']} {verdict['limit']:g}: {word}")
    for part in entry.get(PARTS, ()):
        before, after = ("no number" if part[of] is None else f"{part[of]:.3g}" for of in ("before", "after"))
        word = "holds" if part["holds"] else "does not hold"
        said.append(f"  {part['id']}: {before} before, {after} now, at most {part['limit']:g}: {word}")
    for one in entry["earlier"]:
        if not one["holds"]:
            found = "no number" if one["probability"] is None else f"{one['probability']:.3g}"
            said.append(f"  entry {one['number']} is at {found}, not at or below its limit of {one['limit']:g}")
    if "sketch" in entry["kept"]:
        sketch = entry["kept"]["sketch"]
        said.append(
            f"  a sketch of rank {sketch['rank']} is kept: {sketch['bytes']:,} bytes, {sketch['share']:.0%} of its gradient"
        )
    for line in said:
        console.print(line, markup=False, highlight=False)
