"""The scores of the model that never saw the forget set: from a log, from the cache, or computed and cached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from rich.console import Console
from torch import nn

import gradsurgery as gs
from lightning_modules import folder as outputs
from lightning_modules.data.examples import Example
from lightning_modules.evaluation.membership import HOLDOUT
from lightning_modules.evaluation.processes import every_process, from_first, is_first
from lightning_modules.run.assembly import first_process
from lightning_modules.run.loading import _texts, check_pretrained, load_reference
from lightning_modules.run.options import DataOptions
from lightning_modules.run.scoring import Rows, score, scored
from lightning_modules.training import scratch

_FORMAT = 1  # raise it when what is scored, or how, changes: old logs are then left alone

Splits = Mapping[str, Sequence[Example]]
T = TypeVar("T")


def rows_of_log(options: DataOptions, splits: Splits) -> Rows | None:
    """The scores in the log that is given as the reference, before any work is spent on what they are compared with.

    Standard error is told whose they are. Cost: reading the log. Of a model that is given the configuration and tokenizer are loaded, to
    see that there is one.

    Returns:
        Split -> rows in the order of the examples that are scored; `None` if the reference is a model, or if there is none.

    Raises:
        ValueError: if the log is none, or about other examples.
        FileNotFoundError: if there is no such log or model.
    """
    name = options.reference
    if name is None:
        return None
    if not Path(name).is_file():
        check_pretrained(name)
        return None
    model, log = outputs.read_evaluation(Path(name))
    rows = matching(log, scored(options, splits), name)
    if first_process():
        _say(f"Reference: the rows of {model!r} in {name}")
    return rows


def reference_rows(options: DataOptions, splits: Splits, *, across_processes: bool = False) -> Rows | None:
    """The reference's scores of the examples that are scored.

    A log that is given is read. A model's scores are computed once: they are kept in `$XDG_CACHE_HOME/gradsurgery/reference` under a
    hash of everything that determines them (`cache_path`), and a second run needs no model to score. (The probes load it all the same,
    as their control.) A failure to cache is no failure.

    Args:
        options: with `reference`, `reference_cache`, and how to score.
        splits: all examples; those of the retain split are what the reference of the model from scratch is trained on.
        across_processes: every process calls this, and they share the work, as in `evaluate`.

    Returns:
        Split -> rows in the order of `scored(options, splits)`; `None` if there is no reference.

    Raises:
        ValueError: if a log that is given is none, or about other examples.
        FileNotFoundError: if there is no such model.
        RuntimeError: across processes, if another process failed.
    """
    if options.reference is not None and Path(options.reference).is_file():
        return rows_of_log(options, splits)

    def first(work: Callable[[], T]) -> T:
        return from_first(work) if across_processes else work()

    path = first(lambda: cache_path(options, splits)) if options.reference_cache else None
    if path is not None:
        known = first(lambda: _cached(path, scored(options, splits)))
        if known is not None:
            return known
    loaded = _loaded_by_all(options, splits) if across_processes else load_reference(options, splits)
    if loaded is None:
        return None
    rows = score(options, splits, *loaded, across_processes=across_processes).examples
    if path is not None and (not across_processes or is_first()):
        _keep(path, rows)
    return rows


def _loaded_by_all(options: DataOptions, splits: Splits) -> tuple[nn.Module, Any] | None:
    """The first process goes ahead, so that a model from scratch is trained by one process and found by the others."""
    found: list[tuple[nn.Module, Any] | None] = []

    def load() -> None:
        found.append(load_reference(options, splits))

    from_first(load)
    every_process(lambda: None if is_first() else load())
    return found[0]


def matching(log: Mapping[str, Sequence[Mapping[str, Any]]], examples: Splits, name: str) -> Rows:
    """The log's rows about the same questions and answers, in the same order.

    A log of an earlier version will do: what its rows lack is None in the summary. A log without a holdout split gives none.

    Args:
        log: split -> scored examples.
        examples: what is scored here, by split, with the wrong answers that a truth ratio is made of.
        name: of the log, for the messages.

    Raises:
        ValueError: if it lacks examples, or scores another number of wrong answers of one.
    """
    found: Rows = {}
    for split, rows in examples.items():
        if split == HOLDOUT and split not in log:
            continue
        known = {(row["question"], row["answer"]): dict(row) for row in log.get(split, [])}
        missing = sum((row["question"], row["answer"]) not in known for row in rows)
        if missing:
            raise ValueError(
                f"--reference: expected {name} to hold every example of {split}, found {missing} of {len(rows)} missing; two models can "
                "be compared on the same questions only"
            )
        found[split] = [known[row["question"], row["answer"]] for row in rows]
        for ours, theirs in zip(rows, found[split], strict=True):
            wanted, there = (
                len(row.get(key) or ()) for row, key in ((ours, "perturbed_answer"), (theirs, "perturbed_nll"))
            )
            if wanted != there:
                raise ValueError(
                    f"--reference: expected {name} to score the same {wanted} perturbed answers of {ours['question']!r:.80} ({split}), "
                    f"found {there}; truth ratios can be compared with the same wrong answers only: score the reference on these files"
                )
    return found


def cache_path(options: DataOptions, splits: Splits) -> Path | None:
    """Where the scores of the reference are kept, or None where what determines them cannot be known.

    It is named by a hash of the reference's identity, the examples that are scored, the settings of the scoring, the kind of device, and
    the versions of torch and transformers. The identity is

    - of a folder: its path, and the name, size and time of change of every file in it;
    - of a model on the hub: its commit;
    - of the model from scratch: its examples, tokenizer texts, seed, and the default `ScratchSettings`.

    An adapter has none, because it names a base that may change without it.
    """
    identity = _identity(options, splits)
    if identity is None:
        return None
    determining = {
        "format": _FORMAT,
        "versions": [".".join(module.__version__.split(".")[:2]) for module in (torch, transformers)],
        "reference": identity,
        "splits": scored(options, splits),
        "settings": [options.max_new_tokens, options.max_length, options.evaluation_batch_size],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    key = hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "gradsurgery" / "reference" / f"{key}.jsonl"


def _identity(options: DataOptions, splits: Splits) -> object:
    name = options.reference
    if name is None:
        return _from_scratch(options, splits) if options.model == "scratch" else None
    if Path(name).is_dir():
        return _folder(Path(name))
    _ = gs.logit_difference.LogitDifferenceModel  # makes its configuration known
    try:
        commit = getattr(transformers.AutoConfig.from_pretrained(name), "_commit_hash", None)
        adapted = transformers.utils.find_adapter_config_file(name) is not None
    except (OSError, ValueError):  # loading the model says what is wrong
        return None
    return None if commit is None or adapted else {"hub": name, "commit": commit}


def _from_scratch(options: DataOptions, splits: Splits) -> object:
    settings = {name: str(value) for name, value in vars(scratch.ScratchSettings()).items()}
    return {
        "scratch": [scratch.FORMAT, scratch.VOCABULARY, settings, options.seed],
        "examples": [[row["question"], row["answer"]] for row in splits["retain"]],
        "texts": _texts(options, splits),
    }


def _folder(folder: Path) -> object:
    if (folder / "adapter_config.json").exists():
        return None
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        "folder": str(folder.resolve()),
        "files": [[str(path.relative_to(folder)), found.st_size, found.st_mtime_ns] for path, found in files],
    }


def _cached(path: Path, examples: Splits) -> Rows | None:
    try:
        rows = matching(outputs.read_evaluation(path)[1], examples, str(path)) if path.is_file() else None
    except (OSError, ValueError):  # not ours any more, or broken: compute anew and replace it
        return None
    if rows is not None:
        _say(f"Reference: scores from {path}")
    return rows


def _say(sentence: str) -> None:
    Console(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False)


def _keep(path: Path, rows: Rows) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        outputs.write_evaluation(path, {"reference": rows})
    except OSError as error:
        Console(stderr=True).print(
            f"The reference's scores could not be cached in {path.parent}: {error}", markup=False
        )
