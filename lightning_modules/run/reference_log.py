"""The scores of a model that never saw the forget set: from a log, from the cache, or computed and then cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from rich.console import Console
from torch import nn

import gradsurgery as gs
from lightning_modules.evaluation.membership import HOLDOUT
from lightning_modules.evaluation.processes import every_process, from_first, is_first, will_be_first
from lightning_modules.folder import cache_folder, read_evaluation, write_evaluation
from lightning_modules.run.loading import NO_CODE, check_pretrained, load_reference, tokenizer_texts
from lightning_modules.run.options import EvaluationOptions, Options
from lightning_modules.run.run import Run, Splits
from lightning_modules.run.scoring import ScoredSplits, score, to_score
from lightning_modules.training import scratch

_FORMAT = 1  # raise it when what is scored, or how, changes, so that logs in the cache are not used any more

T = TypeVar("T")


def rows_of_log(evaluation: EvaluationOptions, splits: Splits) -> ScoredSplits | None:
    """The scores in the log that is given as the reference.

    Called before any work is done, so that a wrong reference costs nothing. It prints to standard error whose scores it
    took. Cost: reading the log; of a model that is given, its configuration and tokenizer are loaded, to see that it
    exists.

    Args:
        evaluation: Which reference, and how many examples are scored.
        splits: All examples by split.

    Returns:
        Split -> rows in the order of the examples that are scored; `None` if the reference is a model, or if there is
        none.

    Raises:
        ValueError: If the file is not a log, or is about other examples.
        FileNotFoundError: If there is no such log or model.
    """
    name = evaluation.reference
    if name is None:
        return None
    if not Path(name).is_file():
        check_pretrained(name)
        return None
    model, log = read_evaluation(Path(name))
    rows = matching(log, to_score(evaluation, splits), name)
    if will_be_first():
        _say(f"Reference: the rows of {model!r} in {name}")
    return rows


def reference_rows(options: Options, splits: Splits, *, across_processes: bool = False) -> ScoredSplits | None:
    """The reference's scores of the examples that are scored.

    If a log is given, it is read. A model is scored once: its scores are kept in
    `$XDG_CACHE_HOME/gradsurgery/reference` under a hash of everything that determines them (`cache_path`), and the next
    run does not score it again. (The probes still load it, as their control.) If the scores cannot be cached, a line
    says so and the run goes on.

    Args:
        options: Which reference, whether to cache, and how to score.
        splits: All examples; the reference of the model from scratch is trained on the retain split.
        across_processes: Every process calls this, and they share the work, as in `evaluate`.

    Returns:
        Split -> rows in the order of the examples that are scored; `None` if there is no reference.

    Raises:
        ValueError: If a log is given that is not one, or is about other examples.
        FileNotFoundError: If there is no such model.
        RuntimeError: Across processes, if another process failed.
    """
    evaluation = options.evaluation
    if evaluation.reference is not None and Path(evaluation.reference).is_file():
        return rows_of_log(evaluation, splits)

    def first(work: Callable[[], T]) -> T:
        return from_first(work) if across_processes else work()

    path = first(lambda: cache_path(options, splits)) if evaluation.reference_cache else None
    if path is not None:
        known = first(lambda: _cached(path, to_score(evaluation, splits)))
        if known is not None:
            return known
    loaded = _loaded_by_all(options, splits) if across_processes else load_reference(options, splits)
    if loaded is None:
        return None
    model, tokenizer = loaded
    run = Run(options, options.output.folder, splits, tokenizer)
    rows = score(run, model, across_processes=across_processes).examples
    if path is not None and (not across_processes or is_first()):
        _keep(path, rows)
    return rows


def _loaded_by_all(options: Options, splits: Splits) -> tuple[nn.Module, Any] | None:
    """The reference in every process. The first one loads it ahead, so that a model from scratch is trained once."""
    found: list[tuple[nn.Module, Any] | None] = []

    def load() -> None:
        found.append(load_reference(options, splits))

    from_first(load)
    every_process(lambda: None if is_first() else load())
    return found[0]


def matching(log: Mapping[str, Sequence[Mapping[str, Any]]], examples: Splits, name: str) -> ScoredSplits:
    """The log's rows about the same questions and answers, in the same order.

    A log without a holdout split is accepted; then the result has none either.

    Args:
        log: Split -> scored examples.
        examples: Split -> examples that are scored here, with their wrong answers, which the truth ratio compares.
        name: What the messages call the log.

    Raises:
        ValueError: If an example is missing in the log, or was scored with another number of wrong answers.
    """
    found: ScoredSplits = {}
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
            wanted, scores = (
                len(row.get(key) or ()) for row, key in ((ours, "perturbed_answer"), (theirs, "perturbed_nll"))
            )
            if wanted != scores:
                raise ValueError(
                    f"--reference: expected {name} to score the same {wanted} perturbed answers of {ours['question']!r:.80} ({split}), "
                    f"found {scores}; truth ratios can be compared with the same wrong answers only: score the reference on these files"
                )
    return found


def cache_path(options: Options, splits: Splits) -> Path | None:
    """Where the reference's scores are cached; None if not everything that determines them is known.

    The file's name is a hash of the reference's identity, the examples that are scored, the settings of the scoring,
    the kind of device, and the versions of torch and transformers. The identity is

    - of a folder: its path, and the name, size and time of change of every file in it;
    - of a model on the hub: its commit;
    - of the model from scratch: its examples, tokenizer texts, seed, and the default `ScratchSettings`.

    An adapter has no identity, because it names a base that may change without it.
    """
    identity = _identity(options, splits)
    if identity is None:
        return None
    evaluation = options.evaluation
    determining = {
        "format": _FORMAT,
        "versions": [".".join(module.__version__.split(".")[:2]) for module in (torch, transformers)],
        "reference": identity,
        "splits": to_score(evaluation, splits),
        "settings": [evaluation.max_new_tokens, options.data.max_length, evaluation.evaluation_batch_size],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    key = hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder("reference") / f"{key}.jsonl"


def _identity(options: Options, splits: Splits) -> object:
    """What distinguishes the reference from every other model, as JSON; None if that is not known."""
    name = options.evaluation.reference
    if name is None:
        return _from_scratch(options, splits) if options.model.scratch else None
    if Path(name).is_dir():
        return _folder(Path(name))
    _ = gs.logit_difference.LogitDifferenceModel  # importing it registers its configuration with Transformers
    try:
        commit = getattr(transformers.AutoConfig.from_pretrained(name, **NO_CODE), "_commit_hash", None)
        adapted = transformers.utils.find_adapter_config_file(name) is not None
    except (OSError, ValueError):  # raised again, with a sentence, when the model is loaded
        return None
    return None if commit is None or adapted else {"hub": name, "commit": commit}


def _from_scratch(options: Options, splits: Splits) -> object:
    settings = {name: str(value) for name, value in vars(scratch.ScratchSettings()).items()}
    return {
        "scratch": [scratch.FORMAT, scratch.VOCABULARY, settings, options.output.seed],
        "examples": [[row["question"], row["answer"]] for row in splits["retain"]],
        "texts": tokenizer_texts(options.data, splits),
    }


def _folder(folder: Path) -> object:
    if (folder / "adapter_config.json").exists():
        return None
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        "folder": str(folder.resolve()),
        "files": [[str(path.relative_to(folder)), found.st_size, found.st_mtime_ns] for path, found in files],
    }


def _cached(path: Path, examples: Splits) -> ScoredSplits | None:
    try:
        rows = matching(read_evaluation(path)[1], examples, str(path)) if path.is_file() else None
    except (OSError, ValueError):  # broken, or written by somebody else: it is computed again and replaced
        return None
    if rows is not None:
        _say(f"Reference: scores from {path}")
    return rows


def _say(sentence: str) -> None:
    Console(stderr=True, soft_wrap=True).print(sentence, markup=False, highlight=False)


def _keep(path: Path, rows: ScoredSplits) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_evaluation(path, {"reference": rows})
    except OSError as error:
        Console(stderr=True).print(
            f"The reference's scores could not be cached in {path.parent}: {error}", markup=False
        )
