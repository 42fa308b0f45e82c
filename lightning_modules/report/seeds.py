"""Reads runs of one configuration with different seeds together, and refuses runs that differ in more."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning_modules.folder import CONFIG
from lightning_modules.report.finished import FinishedRun, read

# What a run finds out itself, as training.json calls it -> the options in which two such runs may differ.
_SETTLED = {"learning_rate": ("lr", "finish_lr"), "target": ("stop_below",), "radius": ("radius",)}
# Options in which the runs may differ, see read_seeds.
_FREE = ("muse_dir", "output", "probes", "reference_cache", "resume", "seed", "tofu_dir", "wmdp_dir")


def read_seeds(folder: Path, others: Sequence[Path], defaults: Mapping[str, Any] = MappingProxyType({})) -> FinishedRun:
    """Returns the run in a folder; its `others` are the same configuration's runs with other seeds, ordered by seed.

    Besides the seed, runs may differ in options that change no score: `output`; `resume`; `probes`, which use copies
    after everything is scored; `reference_cache`, which keeps the same scores; and `tofu_dir`, `muse_dir` and
    `wmdp_dir`, because the scored examples themselves are compared. A learning rate, target or radius that both runs
    found out themselves may differ too. They may not differ in `evaluation_batch_size`,
    `start_model` or `devices`, which change the rounding.

    Args:
        folder: The folder of the run that the report is about.
        others: The folders of the other runs.
        defaults: Option -> default, for options that a config.yaml lacks. A default of None stands for "it depends",
            and only None is the same.

    Raises:
        FileNotFoundError: If a folder holds no metrics.json.
        ValueError: If a folder is not that of a run; or, with others, if one has no readable config.yaml, an option
            differs that changes a score, other examples were scored, or two runs have the same seed.
    """
    run = read(folder)
    if not others:
        return run
    runs = [(folder, run), *((other, read(other)) for other in others)]
    for path, found in runs:
        _check_config(path, found)
    for path, other in runs[1:]:
        _check_options((folder, run), (path, other), defaults)
        _check_examples(folder, run, path, other)
    seen: dict[int, Path] = {}
    for path, found in runs:
        seed = found.config["seed"]
        if seed in seen:
            raise ValueError(
                f"report: expected runs with different seeds, found seed {seed} in {seen[seed]} and in {path}; the same seed again is no "
                "independent evidence, leave one of them out"
            )
        seen[seed] = path
    run.others = sorted((other for _, other in runs[1:]), key=lambda other: other.config["seed"])
    return run


def _check_config(folder: Path, run: FinishedRun) -> None:
    seed = run.config.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        why = next((text for text in run.missing if text.startswith(CONFIG)), f"{CONFIG} has no whole number as seed.")
        raise ValueError(
            f"report: expected a {CONFIG} with a seed in {folder}, to tell whether the runs are of one configuration, found none: {why} "
            "Leave the folder out, or draw its own report"
        )
    if run.metrics["seed"] != seed:
        raise ValueError(
            f"report: expected one seed in {folder}, found {seed} in {CONFIG} and {run.metrics['seed']} in metrics.json; the files are of "
            "two runs"
        )


def _check_options(this: tuple[Path, FinishedRun], that: tuple[Path, FinishedRun], defaults: Mapping[str, Any]) -> None:
    (folder, run), (path, other) = this, that
    ours, theirs = {**defaults, **run.config}, {**defaults, **other.config}
    both = [name for name in _SETTLED if name in run.training and name in other.training]
    free = {*_FREE, *(option for name in both for option in _SETTLED[name])}
    differing = [
        f"--{str(name).replace('_', '-')} {_told(other.config, name)} (not {_told(run.config, name)})"
        for name in {**run.config, **other.config}
        if name not in free and _told(ours, name) != _told(theirs, name)
    ]
    if differing:
        raise ValueError(
            f"report: expected runs that differ in --seed and in what changes no score, found in {path} other options than in {folder}: "
            f"{', '.join(differing)}; make one with `gradsurgery unlearn --config {folder / CONFIG} --seed ANOTHER --output FOLDER`, or "
            "compare configurations with `gradsurgery ablate`"
        )


def _told(config: Mapping[str, Any], name: str) -> str:
    return json.dumps(config[name], default=str, sort_keys=True) if name in config else "missing"


def _check_examples(folder: Path, run: FinishedRun, path: Path, other: FinishedRun) -> None:
    """Compares the scored examples: the options only name the data files, which may have changed between the runs."""
    counts, theirs = (
        {split: scores.get("n") for split, scores in found.metrics["after"].items()} for found in (run, other)
    )
    known = [
        [[(row["question"], row["answer"]) for row in found.rows("after", split)] for found in (run, other)]
        for split in counts
    ]
    if counts != theirs or any(ours and their and ours != their for ours, their in known):
        raise ValueError(
            f"report: expected the same examples scored in every run, found {_counted(theirs)} in {path} and "
            f"{_counted(counts)}{'' if counts != theirs else ', with other texts,'} in {folder}; the data has changed between the runs"
        )


def _counted(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} of {split}" for split, n in counts.items())
