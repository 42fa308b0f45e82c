"""What a run would do, before it does anything: --dry-run."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from lightning_modules.data.examples import Example
from lightning_modules.data.tokenization import encode_example
from lightning_modules.folder import check_free
from lightning_modules.ledger.request import row_counts
from lightning_modules.run.assembly import kind_of_start_model
from lightning_modules.run.first import SPLITS, is_taught, lesson
from lightning_modules.run.held import held_by_teaching, held_by_unlearning, lines
from lightning_modules.run.models import Pretrained
from lightning_modules.run.options import FinetuneOptions, TrainingOptions, UnlearnOptions
from lightning_modules.run.options.fitted import most_steps
from lightning_modules.run.show import format_said, row_said
from lightning_modules.training.adapters import adapt
from lightning_modules.training.scratch import ScratchSettings


def show_plan(options: UnlearnOptions, splits: Mapping[str, Sequence[Example]], known: Pretrained | None) -> None:
    """Print what `unlearn` would do with these options, and in how much memory. Nothing is written.

    Args:
        options: Resolved and checked.
        splits: All examples.
        known: Of the model; None of the small Llama.

    Raises:
        FileExistsError: If the output folder holds a run.
    """
    check_place(options.output.folder)
    training, method = options.training, options.method
    said = [f"Model: {_model(options.model.model, known, options.loading.dtype)}"]
    said += [_count(split, rows, options.evaluation.evaluation_examples) for split, rows in splits.items()]
    said.append(f"Scores: computed with --evaluation-precision {options.evaluation.evaluation_precision}")
    if known is not None:
        said += _example(known.tokenizer, splits["forget"][0], options.data.max_length, method.keep_asked_words)
    said += _first(options, splits)
    if method.method == "uld":
        said.append(f"Method: ULD, whose assistant is trained by AdamW with adapters of rank {training.lora_rank}")
    else:
        said += _objectives(options)
        steps = most_steps(training, len(splits["forget"]))
        shown = "examples" if method.alone else "and as many retain examples"
        said.append(
            f"Steps: {'' if training.stop_below == 0.0 else 'at most '}{steps}, each of {training.accumulate or 1} x "
            f"{training.batch_size} forget {shown} on each of {training.processes} devices; {training.optimizer}, "
            f"{_rate(training.lr)}"
        )
        if options.finish.finish_steps:
            said.append(
                f"Finish: {options.finish.finish_steps} further steps, {_rate(options.finish.finish_lr)}{_taught_by(method.teacher)}"
            )
    said += _memory(options, known)
    said += _ledger(options)
    said.append(f"Output: {options.output.folder}")
    _print(said, Console(soft_wrap=True))


def check_place(folder: Path) -> None:
    """Refuse a folder that a run would refuse. Nothing is created, so that its nearest parent is looked at.

    Raises:
        FileExistsError: If it holds a run.
        PermissionError: If it cannot be a folder that is written to.
    """
    check_free(folder)
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK):
        found = "a folder that cannot be written to" if there.is_dir() else "a file"
        raise PermissionError(
            f"--output: expected a folder that can be written, found {folder}: {there} is {found}; choose another"
        )


def show_taught_plan(options: FinetuneOptions, rows: Sequence[Example], known: Pretrained) -> None:
    """As `show_plan`, for `finetune`."""
    check_place(options.output.folder)
    training = options.training
    said = [
        f"Model: {_model(str(options.taught.model), known, options.loading.dtype)}",
        _count("taught", rows, None),
        *_example(known.tokenizer, rows[0], options.taught.max_length),
        f"Steps: {most_steps(training.as_unlearning(), len(rows))}, each of {training.accumulate} x {training.batch_size} "
        f"examples on each of {training.processes} devices; AdamW, highest lr {training.lr:g}",
    ]
    said += _memory(options, known)
    said.append(f"Output: {options.output.folder}")
    _print(said, Console(soft_wrap=True))


def _ledger(options: UnlearnOptions) -> list[str]:
    ledger = options.ledger
    if ledger.ledger is None:
        return []
    rows, sketches = row_counts(ledger.ledger, ledger.ledger_rows)
    return [f"Ledger: {ledger.ledger}; earlier requests are protected in {rows} rows, {sketches} sketches among them"]


def show_memory(options: UnlearnOptions | FinetuneOptions, known: Pretrained | None) -> None:
    """Say to standard error what the training will hold, in which type, before anything is loaded."""
    _print(_memory(options, known), Console(stderr=True, soft_wrap=True))


def _taught_by(teacher: str | None) -> str:
    return "" if teacher is None else f", from the teacher {teacher}"


def _rate(lr: float | str | None) -> str:
    return f"lr {lr:g}" if isinstance(lr, (int, float)) else "lr found from trial steps"


def _memory(options: UnlearnOptions | FinetuneOptions, known: Pretrained | None) -> list[str]:
    """The lines about memory; none of ULD, which trains a small part, nor where a model needs its files to be made."""
    if known is None or known.empty is None:
        return []
    before: list[str] = []
    if isinstance(options, FinetuneOptions):
        training = options.training.as_unlearning()
        parts = held_by_teaching(_adapted(known.empty, training, options.output.seed))
    else:
        training = options.training
        if options.method.method == "uld":
            return []
        parts = held_by_unlearning(_adapted(known.empty, training, options.output.seed), options)
        if options.first.finetune_first:
            taught = held_by_teaching(copy.deepcopy(known.empty).float())
            before = ["Memory while target and reference are taught first, on one device:", *lines(taught)]
    return [*before, f"Memory of each device, with --precision {training.precision}:", *lines(parts)]


def _adapted(empty: nn.Module, training: TrainingOptions, seed: int) -> nn.Module:
    settings = replace(training.adapters(seed), init="default")  # FILA's adapters are as large, and need numbers
    return adapt(copy.deepcopy(empty), settings)


def _objectives(options: UnlearnOptions) -> list[str]:
    method = options.method
    extra = {
        "--retain-weight": method.retain_weight or None,
        "--ema-decay": None if method.alone else method.ema_decay,
        "--guard": None if method.guard == "none" else method.guard,
        "--scope": None if method.scope == "global" else method.scope,
        "--metric": None if method.metric == "euclidean" else method.metric,
        "--radius": method.radius or None,
        "--retain-noise": method.retain_noise or None,
        "--retain-anchor": method.retain_anchor or None,
        "--substitute-weight": method.substitute_weight or None,
        "--keep-asked-words": "true" if method.keep_asked_words else None,
    }
    further = "".join(f", {name} {value}" for name, value in extra.items() if value is not None)
    kind = kind_of_start_model(options) or ("for the finish" if options.finish.finish_steps else "not needed")
    teacher = "" if not method.imitates else f" from the teacher {method.teacher}"
    retain = " alone" if method.alone else f", retain by {method.retain_loss}"
    return [
        f"Objectives: forget by {method.forget_loss}{teacher}{retain}; the model before unlearning: {kind}",
        f"Rule: {method.rule}{further}",
    ]


def _first(options: UnlearnOptions, splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """What is trained before."""
    if options.model.scratch:
        return [
            f"First: a small Llama is trained for {ScratchSettings().epochs} epochs on everything, if the cache lacks it"
        ]
    said: list[str] = []
    for part in SPLITS:
        found = lesson(options, splits, part)
        if found is not None:
            done = "in the cache" if is_taught(found.folder) else "to be taught"
            said.append(
                f"First: the {part}, {len(found.encoded)} examples, {found.settings.epochs} epochs, {done}: {found.folder}"
            )
    return said


def _model(name: str, known: Pretrained | None, dtype: str) -> str:
    if known is None:
        return "a small Llama from scratch"
    if known.empty is None:
        return name
    numbers = sum(weight.numel() for weight in known.empty.parameters())
    return f"{name}, {type(known.empty).__name__} of {numbers:,} numbers, held in {dtype}"


def _count(split: str, rows: Sequence[Example], scored: int | None) -> str:
    part = "" if scored is None else f", {min(len(rows), scored)} of them scored"
    return f"Split {split}: {len(rows)} examples{part}"


def _example(tokenizer: Any, row: Example, max_length: int, keeps: bool = False) -> list[str]:
    example = encode_example(tokenizer, row, max_length)
    return [
        f"The first example, {len(example.input_ids)} tokens, {row_said(tokenizer, row, example, keeps)}",
        *format_said(tokenizer),
    ]


def _print(said: Sequence[str], console: Console) -> None:
    for line in said:
        console.print(line, markup=False, highlight=False, emoji=False)
