"""All unfinished runs of a grid, several at a time where there are devices; then the table and the picture."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_modules import progress
from lightning_modules.ablation.depth_figure import draw_depth
from lightning_modules.ablation.figure import draw_tradeoff
from lightning_modules.ablation.grid import Grid, Run, plain
from lightning_modules.ablation.options import AblateOptions
from lightning_modules.ablation.reading import read_grid
from lightning_modules.ablation.results import read_results, write_csv
from lightning_modules.ablation.run import RUNS, content, execute, models_file, prepare, read_result, refuse_other
from lightning_modules.ablation.table import write_table
from lightning_modules.files import write_text
from lightning_modules.folder import check_writable, versions, write_json
from lightning_modules.progress import Stage
from lightning_modules.report.findings import little_to_forget
from lightning_modules.run.assembly import check_hardware
from lightning_modules.run.quiet import quiet

GRID, RESULTS, TABLE, FIGURE, DEPTH = "grid.yaml", "results.csv", "table.md", "tradeoff.png", "depth.png"
_SHOWN = 5  # reasons in the error message; a grid that is wrong fails in every run
T = TypeVar("T")
Task = Callable[[Run, Path], "tuple[str, str | None]"]


def ablate(options: AblateOptions) -> Path | None:
    """Do every unfinished run of the grid, and draw the table again; or only list the runs, or do one of them.

    Returns:
        The output folder; None if the runs were only listed.

    Raises:
        ValueError: If the grid or an option is not valid, or a finished run was made with other settings.
        FileNotFoundError: If there is no such grid, or no such data.
        RuntimeError: If a run failed. It is raised after all others are done. The file of a failed run says why, and
            the same command tries it again.
    """
    options.check()
    grid = read_grid(options.config, options.tofu_dir)
    runs, folder = grid.runs(), Path(options.output)
    if options.list:
        Console().print(
            "\n".join(f"{index} {run.id}" for index, run in enumerate(runs)), highlight=False, soft_wrap=True
        )
        return None
    check_hardware(runs[0].options().training)
    chosen = _chosen(runs, options)
    there = content(grid) if (folder / RUNS).exists() else {}
    pending = [run for run in chosen if not finished(run, folder, there)]
    check_writable(folder)
    started = time.perf_counter()
    failed = _do(pending, folder, options)
    if options.only is None and options.index is None:
        _draw(grid, folder)
        Console(stderr=True).print(
            f"{len(runs)} runs, {len(pending)} of them now, in {time.perf_counter() - started:.0f} s. "
            f"Everything is in [bold]{escape(str(folder))}[/bold]: {TABLE}, {RESULTS}, {FIGURE}, "
            f"{f'{DEPTH}, ' if (folder / DEPTH).exists() else ''}{RUNS}/"
        )
    if failed:
        said = "\n".join(f"  {name}: {reason}" for name, reason in list(failed.items())[:_SHOWN])
        raise RuntimeError(
            f"{len(failed)} of {len(pending)} runs failed; the same command tries them again; {folder / RUNS} says why:\n{said}"
        )
    return folder


def finished(run: Run, folder: Path, found_now: Mapping[str, Any]) -> bool:
    """Whether the run has a result; a run that failed has none.

    Args:
        run: The run.
        folder: Of the grid.
        found_now: The `content` of the grid, as it is now.

    Raises:
        ValueError: If its result was made with other settings, of other examples or models, or by other versions.
    """
    path = folder / RUNS / f"{run.id}.json"
    if not path.exists():
        return False
    found = read_result(path, "status")
    refuse_other(path, found["config"], run.config)
    if found["status"] != "finished":
        return False
    refuse_other(path, found.get("content") or {}, found_now)
    return True


def _chosen(runs: Sequence[Run], options: AblateOptions) -> list[Run]:
    if options.index is not None:
        if not 0 <= options.index < len(runs):
            raise ValueError(f"--index: expected a run between 0 and {len(runs) - 1}, found {options.index}")
        return [runs[options.index]]
    chosen = [run for run in runs if options.only in (None, run.id)]
    if not chosen:
        raise ValueError(f"--only: expected the id of a run, found {options.only!r}; --list prints them all")
    return chosen


def _do(pending: Sequence[Run], folder: Path, options: AblateOptions) -> dict[str, str]:
    """Do the runs; returns run id -> reason of those that failed."""
    jobs = options.jobs or torch.cuda.device_count() or 1
    console = Console(stderr=True)
    failed: dict[str, str] = {}
    first_of_model = {run.model_seed: run for run in reversed(pending)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _mapped(min(jobs, len(pending)), options.threads) as do:
        # Every start model once, before the runs. Otherwise two processes could train the same one at the same time.
        for name, reason in do(_prepare, list(first_of_model.values()), folder):
            if reason is not None:
                raise RuntimeError(f"the models of {name} could not be made: {reason}")
        for run in first_of_model.values():
            _warn_of_ignorance(run, folder, console)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("Runs", total=len(pending))
            for number, (name, reason) in enumerate(do(_execute, pending, folder), start=1):
                bar.update(task, advance=1, description=name)
                if not console.is_terminal:
                    console.print(
                        f"[{number}/{len(pending)}] {name}" + (": failed" if reason else ""),
                        markup=False,
                        highlight=False,
                    )
                if reason is not None:
                    failed[name] = reason
    return failed


def _warn_of_ignorance(run: Run, folder: Path, console: Console) -> None:
    start = read_result(models_file(folder, run.model_seed), "start")["start"]
    if said := little_to_forget({"forget": {"probability": start["forget_probability"]}}):
        console.print(f"Warning, model seed {run.model_seed}: {said}", markup=False, highlight=False, soft_wrap=True)


def _prepare(run: Run, folder: Path) -> tuple[str, str | None]:
    try:
        prepare(run, folder)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        return run.id, f"{type(error).__name__}: {error}"
    return run.id, None


def _execute(run: Run, folder: Path) -> tuple[str, str | None]:
    """Do a run. If it fails, that is its result, so that a wrong row does not cost the others."""
    try:
        execute(run, folder)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        seeds = {"data_seed": run.data_seed, "model_seed": run.model_seed}
        told = {"status": "failed", "reason": reason, "traceback": traceback.format_exc()}
        result = {
            "id": run.id,
            "method": run.method.name,
            **seeds,
            **told,
            "config": run.config,
            "versions": versions(),
        }
        write_json(folder / RUNS / f"{run.id}.json", result)
        return run.id, reason
    return run.id, None


@contextmanager
def _mapped(
    jobs: int, threads: int
) -> Generator[Callable[[Task, Sequence[Run], Path], Iterator[tuple[str, str | None]]]]:
    """A function that does a task for many runs, in this process or in several, and yields results as they come."""
    if jobs <= 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield lambda task, runs, folder: (task(run, folder) for run in runs)
        finally:
            torch.set_num_threads(before)
        return
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    devices: Any = context.SimpleQueue()
    for number in range(jobs):
        devices.put(number)
    pool = ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(devices, threads))

    def do(task: Task, runs: Sequence[Run], folder: Path) -> Iterator[tuple[str, str | None]]:
        try:
            yield from as_they_come([pool.submit(task, run, folder) for run in runs])
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process was killed (out of memory?); the runs that are done are kept, and the same command goes on: try fewer --jobs"
            ) from error

    try:
        yield do
    finally:
        pool.shutdown(cancel_futures=True)


def as_they_come(futures: Sequence[Future[T]]) -> Iterator[T]:
    """The results in the order in which they are there, and a line now and then while none is."""
    stage, waiting = Stage("Runs", len(futures)), set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=progress.EVERY, return_when=FIRST_COMPLETED)
        stage.advance(len(done))
        for future in done:
            yield future.result()


def _start_worker(devices: Any, threads: int) -> None:
    quiet()
    progress.LOG.silent = True  # the process that waits for all of them says how many are done
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(devices.get() % torch.cuda.device_count())


def _draw(grid: Grid, folder: Path) -> None:
    results = read_results(grid, folder)
    values = plain(asdict(grid))
    said = f"# gradsurgery ablate --config {GRID} --output ANOTHER_FOLDER repeats this.\n"
    write_text(folder / GRID, said + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    write_csv(results, folder / RESULTS)
    write_table(grid, results, folder, folder / TABLE)
    draw_tradeoff(grid, results, folder / FIGURE)
    draw_depth(grid, results, folder, folder / DEPTH)
