"""The command `evaluate`: the scores of one model."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import lightning as L
from rich.console import Console
from rich.markup import escape

from lightning_modules.evaluation.processes import will_be_first
from lightning_modules.folder import EVALUATION, METRICS, occupied, write_evaluation, write_json
from lightning_modules.run.loading import check_start, load_model, read_splits
from lightning_modules.run.options import EvaluateOptions
from lightning_modules.run.reference_log import reference_rows, rows_of_log
from lightning_modules.run.run import Run, Splits
from lightning_modules.run.scoring import ScoredSplits, contents_of_metrics, examples_by_model, score
from lightning_modules.run.show import show
from lightning_modules.training.scratch import one_thread


def evaluate_model(options: EvaluateOptions) -> Path:
    """Score a model on its splits, print the scores and write metrics.json.

    In it the model is "after", and "before" is null.

    Returns:
        The output folder.

    Raises:
        ValueError: If the options contradict each other, the data is not usable, or this is not the only process.
        FileNotFoundError: If a file or model is missing.
        FileExistsError: If the output folder holds a run.
    """
    options.check()
    if not will_be_first():
        raise ValueError(
            "evaluate: expected one process, found several; start the command once, without srun or torchrun"
        )
    with one_thread() if options.model.scratch else nullcontext():
        return _evaluate_model(options)


def _evaluate_model(options: EvaluateOptions) -> Path:
    folder = options.output.folder
    splits = read_splits(options)
    known = check_start(options, splits)
    log = rows_of_log(options.evaluation, splits, options.data, options.loading, known=known)
    with occupied(folder):
        return _scored(options, splits, log)


def _scored(options: EvaluateOptions, splits: Splits, log: ScoredSplits | None) -> Path:
    folder, seed = options.output.folder, options.output.seed
    L.seed_everything(seed, verbose=False)
    model, tokenizer = load_model(options, splits)
    started = time.perf_counter()
    after = score(Run(options, folder, splits, tokenizer), model)
    reference = log or reference_rows(options, splits)
    seconds = {"train": 0.0, "evaluate": time.perf_counter() - started}
    found = contents_of_metrics(seed, None, after, reference, seconds, options.evaluation.evaluation_precision)
    if options.output.log:
        write_evaluation(folder / EVALUATION, examples_by_model(None, after, reference))
    write_json(folder / METRICS, found)
    show(found)
    Console().print(f"Everything is in [bold]{escape(str(folder))}[/bold]")
    return folder
