"""A run that is entered in a ledger: what is refused before it, what it protects, and its entry."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

import gradsurgery as gs
from lightning_modules.data.earlier import EarlierData
from lightning_modules.data.files import read_json, read_yaml
from lightning_modules.data.pairs import ForgetRetainDataModule, encoded_rows
from lightning_modules.data.tokenization import padding_id
from lightning_modules.evaluation.likelihood import on_gpu
from lightning_modules.evaluation.processes import processes_ahead
from lightning_modules.files import write_text
from lightning_modules.folder import CHECKPOINTS, CONFIG, METRICS, MODEL, REQUEST, write_config, write_json
from lightning_modules.ledger.chain import START, append, read_chain
from lightning_modules.ledger.criteria import Criteria, read_criteria
from lightning_modules.ledger.entry import contents, finite
from lightning_modules.ledger.hashes import file_hash, tensors_hash
from lightning_modules.ledger.place import CRITERIA, LEDGER, SKETCHES, TEXTS, check_place, held
from lightning_modules.ledger.refusals import FORGOTTEN, NOT_MEMORISED, check_model
from lightning_modules.ledger.request import Request, hashes_of, held_last, keep_rows, kept_texts, protected
from lightning_modules.ledger.sketch import request_gradient, save_sketch, share_kept, sketched
from lightning_modules.run.batch import batch_of, check_requests, check_same_batch, mean_known, name_of, said_of
from lightning_modules.run.loading import load_model, read_splits, start_name
from lightning_modules.run.measured import check_measured
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.options.names import NO_RULE
from lightning_modules.run.run import Run, Splits
from lightning_modules.run.saved import read_options
from lightning_modules.run.saving import save_model
from lightning_modules.run.scoring import contents_of_metrics, score
from lightning_modules.run.settling import USUAL_LEVEL
from lightning_modules.run.show import say, show_entry
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.probability import mean_probabilities
from lightning_modules.training.protecting import ProtectingModule


def ledger_of(options: UnlearnOptions) -> AbstractContextManager[None]:
    """Keeps other processes from the run's ledger as long as the block runs."""
    name = options.ledger.ledger
    return nullcontext() if name is None else held(Path(name))


def check_deletion(options: UnlearnOptions, splits: Splits) -> None:
    """Refuse what the ledger, the criteria or the rule do not allow, before a weight is loaded.

    Raises:
        ValueError: With one sentence for each case.
        FileNotFoundError: If there is no file of criteria.
        PermissionError: If the ledger cannot be written.
    """
    name = options.ledger.ledger
    if name is None:
        return
    if processes_ahead() > 1:
        raise ValueError(
            "--ledger: expected one process, found several; start the command once, without srun or torchrun"
        )
    if Path(name).resolve() == options.output.folder.resolve():
        raise ValueError(
            f"--ledger: expected another folder than --output, found {name} for both: give the ledger its own"
        )
    check_place(Path(name))
    entries = read_chain(Path(name) / LEDGER)
    check_requests(options, splits, entries)
    if (scored := options.evaluation.evaluation_examples) < (asked := len(splits["forget"])):
        raise ValueError(
            f"--evaluation-examples: expected {asked} or more, every row to forget, found {scored}: the entry speaks of all of them"
        )
    begun = _said_before(options) is not None
    if options.ledger.criteria is not None and not begun:
        check_measured(options, splits, read_criteria(options.ledger.criteria))
    texts, sketches = protected(Path(name), entries, options.ledger.ledger_rows)
    if sketches and options.training.lora_rank:
        raise ValueError(
            "--lora-rank: expected 0 with a ledger that keeps sketches, found "
            f"{options.training.lora_rank}: a sketch is a gradient of all weights, and protects no adapter; train all weights"
        )
    if options.method.rule == NO_RULE and (texts or sketches):
        raise ValueError(
            "--rule: expected one that protects rows, such as gru, with a ledger that has earlier requests, found none, which protects "
            "nothing"
        )
    rule: Any = options.method.bound_rule()
    count = 2 + len(texts) + len(sketches)
    try:
        rule([[]] * count if gs.elementwise.is_elementwise(rule) else torch.eye(count, dtype=torch.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--rule: expected one of several protected rows, such as gru, with a ledger that has earlier requests, found "
            f"{options.method.rule}: {error}"
        ) from error


def requested(options: UnlearnOptions, splits: Splits) -> Request | None:
    """The run's request, with what is protected beside retention; None without a ledger.

    It loads the model, to see that it is the ledger's last one and knows what it is to forget.

    Raises:
        ValueError: If it is another model, or the ledger or the rows are others since a run that is resumed.
        FileNotFoundError: If what was said before a run that is resumed is gone.
    """
    name = options.ledger.ledger
    if name is None:
        return None
    ledger = Path(name)
    entries = read_chain(ledger / LEDGER)
    texts, sketches = protected(ledger, entries, options.ledger.ledger_rows)
    held_before = held_last(entries)
    limits = {number: found for number, found in kept_texts(ledger, entries).items() if number in held_before}
    batch = batch_of(options, splits)
    last = entries[-1]["hash"] if entries else START
    if (path := _said_before(options)) is not None:
        said = read_json(path, "what was said before the run")
        _check_last(said, last)
        _check_same(said, splits)
        check_same_batch(said, batch)
        return Request(said, texts, sketches, limits)
    criteria = read_criteria(options.ledger.criteria) if options.ledger.criteria is not None else Criteria({})
    model, tokenizer = load_model(options, splits)
    found = _model_hash(options, splits, model, tokenizer)
    check_model(entries, found, start_name(options, splits))
    each = _probabilities(options, model, tokenizer, batch or {"forget": splits["forget"]})
    known = mean_known(batch, each)
    asked = criteria.limits.get("forget_probability", options.training.stop_below or None)
    level = USUAL_LEVEL if asked is None else asked
    hashes = hashes_of(splits["forget"])
    said: dict[str, Any] = {
        "id": name_of(options, splits, batch),
        "kind": NOT_MEMORISED if all(value <= level for value in each.values()) else FORGOTTEN,
        **hashes,
        "counts": {"forget": len(splits["forget"]), "retain": len(splits["retain"]), "known": known, "level": level},
        "asked": asked is not None,
        "begun": _now(),
        "ledger": str(ledger.resolve()),
        "previous": last,
        "model": found,
        "criteria": {"limits": dict(criteria.limits), "sha256": criteria.sha256, "text": criteria.text},
        "protected": {
            "texts": sum(map(len, texts.values())),
            "sketches": sum(map(len, sketches.values())),
            "rows": len(texts) + len(sketches),
        },
        **said_of(batch, each),
    }
    return Request(said, texts, sketches, limits)


def _said_before(options: UnlearnOptions) -> Path | None:
    """request.json of a run that is resumed; None if it has to be said now, because nothing was trained yet."""
    folder = options.output.folder
    if not options.training.resume:
        return None
    if not (folder / REQUEST).exists() and any((folder / name).exists() for name in (CHECKPOINTS, MODEL, METRICS)):
        raise _gone(folder)
    return folder / REQUEST if (folder / REQUEST).exists() else None


def _gone(folder: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"--ledger: expected {REQUEST} in {folder}, with what was said before the run, found none, without which it cannot be entered; "
        "put it back and go on with --resume, or begin the request again in another --output"
    )


def _check_last(said: Mapping[str, Any], last: str) -> None:
    if said["previous"] != last:
        raise ValueError(
            f"--ledger: expected the ledger as it was when this run began, found another last entry, {last[:12]}: another request was "
            "done since; begin this one again with the model that it left"
        )


def _check_same(said: Mapping[str, Any], splits: Splits) -> None:
    if (found := hashes_of(splits["forget"])["sha256"]) != said["sha256"]:
        raise ValueError(
            f"--ledger: expected the rows to forget that the run began with, whose hash is {said['sha256'][:12]}, found others, with "
            f"{found[:12]}; put the file back as it was, and go on with --resume"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _model_hash(options: UnlearnOptions, splits: Splits, model: nn.Module, tokenizer: Any) -> str:
    """Of the files of a folder; of any other model as it would be saved."""
    folder = Path(start_name(options, splits))
    whole = list(folder.glob("*.safetensors")) and not (folder / "adapter_config.json").exists()
    if whole and not options.model.scratch:
        return tensors_hash(folder)
    with tempfile.TemporaryDirectory() as place:
        save_model(model, tokenizer, Path(place))
        return tensors_hash(Path(place))


def _probabilities(
    options: UnlearnOptions, model: nn.Module, tokenizer: Any, splits: Mapping[str, Any]
) -> dict[str, float]:
    encoded = {name: encoded_rows(tokenizer, name, rows, options.data.max_length) for name, rows in splits.items()}
    size = options.evaluation.evaluation_batch_size
    with on_gpu(model):
        return mean_probabilities(model, encoded, pad_token_id=padding_id(tokenizer), batch_size=size)


def begin(run: Run[UnlearnOptions]) -> None:
    """Write down what was said before the run: request.json in its folder, the criteria in the ledger's; once.

    After config.yaml: a run that is killed in between is resumed, and says it then.
    """
    if run.request is None or (run.folder / REQUEST).exists():
        return
    said = run.request.said
    criteria = said["criteria"]
    if criteria["sha256"] is not None:
        write_text(Path(said["ledger"]) / CRITERIA / f"{criteria['sha256']}.yaml", criteria["text"])
    write_json(run.folder / REQUEST, said)


def protecting(
    run: Run[UnlearnOptions], data: ForgetRetainDataModule
) -> tuple[Callable[..., UnlearningModule] | None, L.LightningDataModule]:
    """What makes the module, None for the usual one, and its batches: with those of earlier requests, if any."""
    request = run.request
    if request is None or not (request.texts or request.sketches):
        return None, data
    longest, weight = run.options.data.max_length, run.options.ledger.ledger_weight
    rows = {
        name: [encoded_rows(run.tokenizer, "earlier", found, longest) for found in requests]
        for name, requests in request.texts.items()
    }
    gradients = request.gradients()

    def make(*arguments: Any, **options: Any) -> ProtectingModule:
        return ProtectingModule(*arguments, texts=list(rows), sketches=gradients, weight=weight, **options)

    return make, EarlierData(data, rows)


def nothing_done(options: UnlearnOptions, splits: Splits, request: Request) -> None:
    """Leave a run of a request that the model does not know: its scores, and no training."""
    folder = options.output.folder
    model, tokenizer = load_model(options, splits)
    run = Run(options, folder, splits, tokenizer, request=request)
    scores = score(run, model)
    found = contents_of_metrics(options.output.seed, scores, scores, None, {"train": 0.0, "evaluate": 0.0})
    write_config(folder, "unlearn", options.recorded())
    begin(run)
    (folder / CHECKPOINTS).mkdir(exist_ok=True)  # until it is entered, so that --resume enters it
    write_json(folder / METRICS, found)
    counts = request.said["counts"]
    say(
        f"Nothing is trained: the mean probability of the answers to forget is {counts['known']:.3g}, at most the limit of "
        f"{counts['level']:g}, so that they are not memorised; the ledger says so"
    )


def enter(folder: Path) -> None:
    """Append a run that is whole to its ledger, once. Only under the ledger's lock.

    Raises:
        FileNotFoundError: If what was said before the run is gone.
        ValueError: If the ledger went on without it, or is broken.
    """
    path = folder / REQUEST
    if read_yaml(folder / CONFIG, "the options of a run").get("ledger") is None:
        return
    if not path.exists():
        raise _gone(folder)
    said = read_json(path, "what was said before the run")
    ledger = Path(said["ledger"])
    entries = read_chain(ledger / LEDGER)
    if any(entry["evidence"].get(REQUEST) == file_hash(path) for entry in entries):
        return
    _check_last(said, entries[-1]["hash"] if entries else START)
    further = {"time": _now(), **_of_model(folder, said, ledger, entries)}
    entry = append(ledger / LEDGER, contents(folder, ledger, said, entries, further))
    show_entry(entry, ledger)


def _of_model(folder: Path, said: Mapping[str, Any], ledger: Path, entries: list[Any]) -> dict[str, Any]:
    """What only the model that is left can say: how earlier requests fare, and the sketch of this one."""
    options = UnlearnOptions.of(**read_options(folder / CONFIG))
    if said["kind"] != FORGOTTEN:
        return {"earlier": [], "kept": {}}
    splits = read_splits(options)
    if options.ledger.ledger_keep_text or options.ledger.ledger_sketch:
        _check_same(said, splits)  # the rows are read anew; what is kept is what was forgotten
        check_same_batch(said, batch_of(options, splits))
    model: Any = None
    tokenizer: Any = None
    texts = kept_texts(ledger, entries)
    if texts or options.ledger.ledger_sketch:
        model, tokenizer = load_model(_as_saved(options, folder), splits)
    values: dict[str, float] = {}
    for of, (requests, _) in texts.items():
        found = _probabilities(options, model, tokenizer, {str(at): rows for at, rows in enumerate(requests)})
        values[of] = max(found.values(), key=lambda value: (math.isnan(value), value))  # of a batch the highest, or NaN
    earlier = [
        {"number": int(of), "probability": finite(value), "limit": texts[of][1], "holds": value <= texts[of][1]}
        for of, value in values.items()
    ]
    kept: dict[str, Any] = {}
    place = f"{len(entries) + 1:04d}"
    if options.ledger.ledger_keep_text:
        path = ledger / TEXTS / f"{place}.jsonl"
        keep_rows(path, splits["forget"])
        kept["text"] = {"file": str(path.relative_to(ledger)), "sha256": file_hash(path)}
    if options.ledger.ledger_sketch:
        path, rank = ledger / SKETCHES / f"{place}.safetensors", options.ledger.ledger_sketch
        encoded = encoded_rows(tokenizer, "forget", splits["forget"], options.data.max_length)
        with on_gpu(model):
            gradient = request_gradient(model.float(), encoded, pad_token_id=padding_id(tokenizer))
        sketch = sketched(gradient, rank)
        save_sketch(path, sketch, rank=rank)
        kept["sketch"] = {
            "file": str(path.relative_to(ledger)),
            "sha256": file_hash(path),
            "rank": rank,
            "bytes": path.stat().st_size,
            "share": share_kept(gradient, sketch),
        }
    return {"earlier": earlier, "kept": kept}


def _as_saved(options: UnlearnOptions, folder: Path) -> UnlearnOptions:
    """The options with the model that the run left in place of the one that it began with."""
    return options.but(model=str(folder / MODEL), finetune_first=False)
