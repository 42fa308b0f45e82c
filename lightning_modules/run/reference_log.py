"""The scores of a model that never saw the forget set: from a log, from the cache, or computed and then cached."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_modules.data.examples import numbered
from lightning_modules.data.formats import set_format
from lightning_modules.data.heldout import to_keep
from lightning_modules.data.tasks import apart, prefix_ids
from lightning_modules.evaluation.membership import HOLDOUT
from lightning_modules.evaluation.processes import every_process, from_first, is_first, will_be_first
from lightning_modules.evaluation.texts import texts_of
from lightning_modules.folder import cache_folder, read_evaluation, write_evaluation
from lightning_modules.run.identity import content_versions, hashed, model_identity
from lightning_modules.run.loading import load_reference, reference_name, tokenizer_texts
from lightning_modules.run.models import check_pretrained, load_tokenizer
from lightning_modules.run.options import DataOptions, EvaluationOptions, LoadingOptions, Options
from lightning_modules.run.options.loading import USUAL
from lightning_modules.run.places import is_log
from lightning_modules.run.run import Run, Splits
from lightning_modules.run.scoring import ScoredSplits, score, to_score
from lightning_modules.training import scratch
from lightning_modules.training.sharding import Distributed

_FORMAT = 2  # raise it when what is scored, or how, changes, so that logs in the cache are not used any more

T = TypeVar("T")
_DATA = DataOptions()


def rows_of_log(
    evaluation: EvaluationOptions,
    splits: Splits,
    data: DataOptions = _DATA,
    loading: LoadingOptions = USUAL,
    *,
    sharded: bool = False,
) -> ScoredSplits | None:
    """The scores in the log that is given as the reference.

    Called before any work is done, so that a wrong reference costs nothing. It prints to standard error whose scores it
    took. Cost: reading the log; of a model that is given, its configuration and tokenizer are loaded, to see that it
    exists.

    Args:
        evaluation: Which reference, and how many examples are scored.
        splits: All examples by split.
        data: How a model's tokenizer writes examples, to see that it can.
        loading: How a model is loaded.
        sharded: Whether several devices share its weights.

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
    if not is_log(name):
        known = check_pretrained(name, loading.of_reference(), sharded=sharded)
        set_format(known.tokenizer, data.chat_template_kwargs, data.prompt_format)
        return None
    model, log = read_evaluation(Path(name))
    rows = matching(log, to_score(evaluation, splits), name)
    if will_be_first():
        _say(f"Reference: the rows of {model!r} in {name}")
    return rows


def reference_rows(
    options: Options, splits: Splits, *, across_processes: bool = False, mesh: DeviceMesh | None = None
) -> ScoredSplits | None:
    """The reference's scores of the examples that are scored.

    If a log is given, it is read. A model is scored once: its scores are kept in
    `$XDG_CACHE_HOME/gradsurgery/reference` under a hash of everything that determines them (`cache_path`), and the next
    run does not score it again. (The probes still load it, as their control.) If the scores cannot be cached, a line
    says so and the run goes on.

    Args:
        options: Which reference, whether to cache, and how to score.
        splits: All examples; the reference of the model from scratch is trained on the retain split.
        across_processes: Every process calls this, and they share the work, as in `evaluate`.
        mesh: Every process calls this, and the reference is sharded over the mesh, as one that no device holds must be.

    Returns:
        Split -> rows in the order of the examples that are scored; `None` if there is no reference.

    Raises:
        ValueError: If a log is given that is not one, or is about other examples.
        FileNotFoundError: If there is no such model.
        RuntimeError: Across processes, if another process failed.
    """
    evaluation = options.evaluation
    if evaluation.reference is not None and is_log(evaluation.reference):
        return rows_of_log(evaluation, splits)

    def first(work: Callable[[], T]) -> T:
        return from_first(work) if across_processes else work()

    path = first(lambda: cache_path(options, splits)) if evaluation.reference_cache else None
    if path is not None:
        known = first(lambda: _cached(path, to_score(evaluation, splits)))
        if known is not None:
            return known
    if mesh is not None:
        loaded = _sharded(options, splits, mesh)
    else:
        loaded = _loaded_by_all(options, splits) if across_processes else load_reference(options, splits)
    if loaded is None:
        return None
    model, tokenizer = loaded
    run = Run(options, options.output.folder, splits, tokenizer)
    rows = score(run, model, across_processes=across_processes and mesh is None).examples
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


def _sharded(options: Options, splits: Splits, mesh: DeviceMesh) -> tuple[nn.Module, Any] | None:
    """The reference in shards, and its tokenizer."""
    if reference_name(options, splits) is None and not options.model.scratch:
        return None

    def load() -> tuple[nn.Module, Any]:
        loaded = load_reference(options, splits)
        if loaded is None:
            raise RuntimeError("expected a reference, found none")
        return loaded

    reference = Distributed(load)
    return reference.sharded(mesh), reference.known


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
        # The same question and answer may occur twice with other wrong answers, so the first one is the first there.
        known = dict(zip(numbered(log.get(split, [])), map(dict, log.get(split, [])), strict=True))
        keys = numbered(rows)
        missing = sum(key not in known for key in keys)
        if missing:
            raise ValueError(
                f"--reference: expected {name} to hold every example of {split}, found {missing} of {len(rows)} missing; two models can "
                "be compared on the same questions only"
            )
        found[split] = [known[key] for key in keys]
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

    The file's name is a hash of the reference's identity, the examples that are scored and the tokens that its
    tokenizer makes of them, the settings of the scoring, the kind of device, and the versions of gradsurgery, torch and
    transformers. The identity is that of `identity.model_identity`, and of the model from scratch its examples,
    tokenizer texts, seed, and the default `ScratchSettings`.
    """
    name, evaluation = reference_name(options, splits), options.evaluation
    if name is None and not options.model.scratch:
        return None
    identity = _from_scratch(options, splits) if name is None else model_identity(name, options.loading.of_reference())
    if identity is None:
        return None
    examples = to_score(evaluation, splits)
    determining = {
        "format": _FORMAT,
        "versions": content_versions(),
        "reference": identity,
        "splits": examples,
        "tokens": None if name is None else _tokens(name, options, examples),
        "settings": [
            evaluation.max_new_tokens,
            options.data.max_length,
            evaluation.evaluation_batch_size,
            evaluation.evaluation_batch_tokens,
        ],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    return cache_folder("reference") / f"{hashed(determining)[:24]}.jsonl"


def _tokens(name: str, options: Options, examples: Splits) -> str | None:
    """A hash of all tokens that the reference is scored on; None if its tokenizer cannot be loaded.

    They depend on more than the texts and the tokenizer's files: on the options of its chat template, and on our code.
    """
    try:
        tokenizer = load_tokenizer(name, options.loading.of_reference())
    except (OSError, ValueError):  # raised again, with a sentence, when the model is loaded
        return None
    set_format(tokenizer, options.data.chat_template_kwargs, options.data.prompt_format)
    usual, tasks = apart(examples)
    prompts = [[prefix_ids(tokenizer, row.get("prompt", row["answer"])) for row in rows] for rows in tasks.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that are cut; it is said when they are scored
        found = texts_of(
            tokenizer,
            usual,
            max_length=options.data.max_length,
            max_new_tokens=options.evaluation.max_new_tokens,
        )
    return hashed([found.encoded, found.prompts, *prompts])


def _from_scratch(options: Options, splits: Splits) -> object:
    settings = {name: str(value) for name, value in vars(scratch.ScratchSettings()).items()}
    return {
        "scratch": [scratch.FORMAT, scratch.VOCABULARY, settings, options.output.seed],
        "examples": [[row["question"], row["answer"]] for row in to_keep(splits)],
        "texts": tokenizer_texts(options.data, splits),
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
