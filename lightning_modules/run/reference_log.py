"""The scores of a model that never saw the forget set: from a log, from the cache, or computed and then cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_modules.data.formats import set_format
from lightning_modules.data.heldout import to_keep
from lightning_modules.evaluation.processes import every_process, from_first, is_first, will_be_first
from lightning_modules.folder import read_evaluation
from lightning_modules.run.identity import model_identity
from lightning_modules.run.kept_scores import keep, kept, matching, path_of, say, scored_here, small_identity
from lightning_modules.run.loading import load_reference, reference_name
from lightning_modules.run.models import Pretrained, check_pretrained
from lightning_modules.run.options import DataOptions, EvaluationOptions, LoadingOptions, Options
from lightning_modules.run.options.loading import USUAL
from lightning_modules.run.places import is_log
from lightning_modules.run.run import Run, Splits
from lightning_modules.run.scoring import ScoredSplits, score, to_score
from lightning_modules.training.sharding import Distributed

T = TypeVar("T")
_DATA = DataOptions()


def rows_of_log(
    evaluation: EvaluationOptions,
    splits: Splits,
    data: DataOptions = _DATA,
    loading: LoadingOptions = USUAL,
    *,
    sharded: bool = False,
    known: Pretrained | None = None,
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
        known: Of the model that is scored here: with its tokens, a log's are compared.

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
        reference = check_pretrained(name, loading.of_reference(), sharded=sharded)
        set_format(reference.tokenizer, data.chat_template_kwargs, data.prompt_format)
        return None
    model, log = read_evaluation(Path(name))
    examples = to_score(evaluation, splits)
    rows = matching(log, examples, name, scored_here(evaluation, data, known, examples))
    if will_be_first():
        say(f"Reference: the rows of {model!r} in {name}")
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
        known = first(lambda: kept(path, to_score(evaluation, splits), "Reference"))
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
        keep(path, rows)
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


def cache_path(options: Options, splits: Splits) -> Path | None:
    """Where the reference's scores are kept, see `kept_scores.path_of`; None if it is not known what decides them.

    The identity is that of `identity.model_identity`, and of the model from scratch what `kept_scores.small_identity`
    has.
    """
    name = reference_name(options, splits)
    if name is None and not options.model.scratch:
        return None
    loading = options.loading.of_reference()
    identity = small_identity(options, splits, to_keep(splits)) if name is None else model_identity(name, loading)
    return None if identity is None else path_of(options, splits, identity, None if name is None else (name, loading))
