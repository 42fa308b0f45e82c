"""The command `unlearn`: a model forgets, and what it forgot and what it kept is measured."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.markup import escape

from lightning_modules.data.files import read_json
from lightning_modules.data.uld import uld_data
from lightning_modules.evaluation import processes
from lightning_modules.evaluation.processes import will_be_first
from lightning_modules.folder import (
    BASE,
    CHECKPOINTS,
    EVALUATION,
    METRICS,
    PROBES,
    occupied,
    write_evaluation,
    write_json,
)
from lightning_modules.ledger.request import Request
from lightning_modules.run.assembly import check_hardware
from lightning_modules.run.deletion import check_deletion, enter, ledger_of, nothing_done, requested
from lightning_modules.run.finish import substitute_answers
from lightning_modules.run.loading import check_start, load_model, read_splits, start_name
from lightning_modules.run.methods import Unlearned, by_assistant, by_surgery
from lightning_modules.run.options import LoadingOptions, UnlearnOptions, chosen, fitted
from lightning_modules.run.plan import show_memory, show_plan
from lightning_modules.run.plugins import check_plugins, scores_to_log
from lightning_modules.run.probing import check_probes
from lightning_modules.run.reference_log import reference_rows, rows_of_log
from lightning_modules.run.report import draw
from lightning_modules.run.resume import only_report_is_missing, resumed
from lightning_modules.run.run import Run, Splits
from lightning_modules.run.saving import write_model
from lightning_modules.run.scoring import ScoredSplits, contents_of_metrics, examples_by_model, score
from lightning_modules.run.sharded import by_shards
from lightning_modules.run.show import say, show, show_example, show_probes, show_recipe, show_warnings
from lightning_modules.run.teaching import teach_first
from lightning_modules.training.scratch import one_thread


def unlearn(options: UnlearnOptions, stated: Collection[str] = ()) -> Path:
    """Make a model forget: score it, train it, score it again, and leave everything in the output folder.

    Args:
        options: Of the command.
        stated: Names of the options that were given, see `resume.resumed`.

    Returns:
        The output folder.

    Raises:
        ValueError: If the options contradict each other or the data is not usable.
        FileNotFoundError: If a file or model is missing.
        FileExistsError: If the output folder holds a run.
    """
    if options.training.resume:
        options = resumed(options, stated)
    options.check()
    options.check_effect()
    check_hardware(options.resolved().training)
    check_plugins(options.training)
    if will_be_first() and not options.training.resume:
        show_recipe(options, stated)
    with one_thread() if options.model.scratch else nullcontext():
        return _unlearn(options)


def _unlearn(options: UnlearnOptions) -> Path:
    folder = options.output.folder
    splits = read_splits(options)
    given, options = options, fitted(options, len(splits["forget"])).resolved()
    own = chosen(given, options)
    known = check_start(options, splits)
    if options.method.method == "uld":
        uld_data(splits, perturbed_per_row=options.uld_settings().perturbed_per_row)  # raises where answers are missing
    taught = options.finish.finish_steps and options.method.teacher is None
    if taught or options.method.substitute_weight:
        substitute_answers(options, splits)  # raises where there are none
    if options.training.probed:
        check_probes(splits)
    if not (options.training.resume and only_report_is_missing(folder)):
        check_deletion(options, splits)
    sharded = options.training.sharded
    log = rows_of_log(options.evaluation, splits, options.data, options.loading, sharded=sharded, known=known)
    if options.training.dry_run:
        if will_be_first():
            show_plan(options, splits, known)
        return folder
    if not will_be_first():
        # The first one may have drawn the report meanwhile, and removed the checkpoints.
        return folder if (folder / METRICS).exists() else _trained(options, splits, log, own)
    with occupied(folder, resume=options.training.resume), ledger_of(options):
        if only_report_is_missing(folder):
            return _finish(folder)
        if not options.training.resume:
            show_memory(options, known)
        else:
            where = "its last checkpoint" if (folder / CHECKPOINTS).exists() else "its start"
            say(f"Going on with the run in {folder}, from {where}")
        teach_first(options, splits)
        request = requested(options, splits)
        if request is not None and not request.memorised:
            nothing_done(options, splits, request)
            return _finish(folder)
        return _trained(options, splits, log, own, request)


def _trained(
    options: UnlearnOptions,
    splits: Splits,
    log: ScoredSplits | None,
    own: tuple[str, ...],
    request: Request | None = None,
) -> Path:
    folder = options.output.folder
    L.seed_everything(options.output.seed, verbose=False)
    if options.training.sharded:
        run, unlearned = by_shards(options, folder, splits, log, own)
    else:
        model, tokenizer = load_model(options, splits)
        run = Run(options, folder, splits, tokenizer, own, request)
        if will_be_first() and not options.training.resume:
            show_example(run)
        unlearned = by_assistant(run, model) if options.method.method == "uld" else by_surgery(run, model, log)
    if unlearned is not None:
        _leave(run, unlearned, log)
    return folder


def _leave(run: Run[UnlearnOptions], unlearned: Unlearned, log: ScoredSplits | None) -> None:
    """Save the model, score it and the reference, and write everything that a run leaves.

    If the processes are still together, all of them score. The first one does the rest.
    """
    folder, together = run.folder, unlearned.together

    def save() -> None:
        whole = unlearned.model if unlearned.mesh is None else unlearned.whole
        adapter_of = _base(run) if run.options.training.save == "adapter" else None
        write_model(folder / "model", whole, run.tokenizer, _start(run), adapter_of=adapter_of)

    # First of all, so that the training is not lost if anything after it fails.
    if together:
        processes.from_first(save)
    else:
        save()
    started = time.perf_counter()
    mesh = unlearned.mesh
    # Processes with shards of one model run every batch together, so that each scores everything.
    after = score(run, unlearned.model, across_processes=together and mesh is None)
    reference = log or (processes.from_first(lambda: unlearned.reference) if together else unlearned.reference)
    if reference is None:
        reference = reference_rows(run.options, run.splits, across_processes=together, mesh=mesh)
    seconds = unlearned.seconds | {"evaluate": unlearned.seconds["evaluate"] + time.perf_counter() - started}
    if together and not processes.is_first():
        return
    if unlearned.probe is not None:
        unlearned.probe()
    before = unlearned.before
    seed, precision = run.options.output.seed, run.options.evaluation.evaluation_precision
    found = contents_of_metrics(seed, before, after, reference, seconds, precision)
    if unlearned.target is not None:
        found["target"] = dict(unlearned.target)
    write_evaluation(folder / EVALUATION, examples_by_model(before, after, reference))
    write_json(folder / METRICS, found)
    for logger in unlearned.loggers:
        logger.log_metrics(scores_to_log(found), unlearned.steps)
        logger.save()
        logger.finalize("success")
    show(found)
    if (folder / PROBES).exists():
        show_probes(read_json(folder / PROBES, "the results of probes"))
    _finish(folder)


def _finish(folder: Path) -> Path:
    """Draw the report, enter the run in its ledger, and remove the checkpoints: nothing is left to be done again."""
    draw(folder)
    show_warnings(folder)
    enter(folder)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    files = ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
    Console().print(f"Everything is in [bold]{escape(str(folder))}[/bold]: {escape(files)}")
    return folder


def _base(run: Run[UnlearnOptions]) -> str:
    """The model that a kept adapter is for: the one that was given, or a copy in base/ of one in a cache."""
    if run.options.model.model == start_name(run.options, run.splits) and not run.options.model.scratch:
        return run.options.model.model
    loaded: Any = load_model(run.options, run.splits)  # from the cache
    original, tokenizer = loaded
    write_model(run.folder / BASE, original, tokenizer, _start(run))
    return str(run.folder / BASE)


def _start(run: Run[UnlearnOptions]) -> tuple[str, LoadingOptions] | None:
    """Where the model before unlearning is from; None of a small Llama."""
    return None if run.options.model.scratch else (start_name(run.options, run.splits), run.options.loading)
