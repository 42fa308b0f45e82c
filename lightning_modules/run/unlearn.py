"""What the command line runs: functions of options that leave files behind."""

from __future__ import annotations

import csv
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import nn

from lightning_modules import folder as outputs
from lightning_modules.data.examples import Example
from lightning_modules.data.tokenization import encode, padding_id
from lightning_modules.evaluation import processes
from lightning_modules.evaluation.evaluate import Evaluation
from lightning_modules.report.terminal import sentences, tables
from lightning_modules.run.assembly import adapted, first_process, make_module, make_trainer, merged, start_model
from lightning_modules.run.loading import load_model, load_reference, make_data, read_splits
from lightning_modules.run.options import EvaluateOptions, UnlearnOptions
from lightning_modules.run.reference_log import reference_rows, rows_of_log
from lightning_modules.run.report import draw
from lightning_modules.run.scoring import Rows, metrics, score
from lightning_modules.training.callbacks import (
    BestTradeoff,
    CollapseAlarm,
    GEffectLogger,
    QuantizationProbe,
    RelearnProbe,
    SurgeryLogger,
    TradeoffCurve,
)
from lightning_modules.training.scratch import one_thread

# Scored while training: enough for a smooth curve, few enough to cost little.
_CURVE_EXAMPLES = 64
_CURVE_POINTS = 25


def unlearn(options: UnlearnOptions) -> Path:
    """Make a model forget: score it, train it with surgery, score it again, and leave everything in `options.output`.

    Returns:
        The output folder.

    Raises:
        ValueError: If the options contradict each other or the data is not usable.
        FileNotFoundError: If a file or model is missing.
        FileExistsError: If the output folder holds a run.
    """
    options.check()
    if options.resume:
        options = _resumed(options)
    options.check()
    options = options.resolved()
    with one_thread() if options.model == "scratch" else nullcontext():
        return _unlearn(options)


def _unlearn(options: UnlearnOptions) -> Path:
    folder, console = Path(options.output), Console(stderr=True)
    first = first_process()
    splits = read_splits(options)
    log = rows_of_log(options, splits)
    if first and not options.resume:
        outputs.claim(folder)
    L.seed_everything(options.seed, verbose=False)
    model, tokenizer = load_model(options, splits)
    if options.method == "uld":
        return _unlearn_by_assistant(options, splits, log, model, tokenizer)
    data = make_data(options, tokenizer, options.batch_size)
    model = adapted(model, options, data)
    reference = start_model(model, options, data, folder)
    module = make_module(model, options, reference).train()
    steps = -(-len(splits["forget"]) // (options.batch_size * (options.accumulate or 1))) * (options.epochs or 1)
    surgery_log = SurgeryLogger(folder / outputs.SURGERY)
    layers_log = GEffectLogger(folder / outputs.G_EFFECT)
    curve = TradeoffCurve(
        {
            split: [
                encode(tokenizer, row["question"], row["answer"], options.max_length) for row in _spread(splits[split])
            ]
            for split in ("forget", "retain")
        },
        pad_token_id=padding_id(tokenizer),
        every_n_steps=options.score_every or max(1, steps // _CURVE_POINTS),
        stop_below=options.stop_below,
    )
    trainer = make_trainer(folder, options, [surgery_log, layers_log, curve, *_watching(options, curve)], console)
    started = time.perf_counter()
    before = score(options, splits, model, tokenizer) if first else None
    evaluating = time.perf_counter() - started
    if first and not options.resume:
        # Not before everything that a wrong option can break: the corrected command shall find the folder free.
        outputs.write_config(folder, "unlearn", options)

    last = folder / "checkpoints" / "last.ckpt"
    started = time.perf_counter()
    trainer.fit(module, data, ckpt_path=str(last) if options.resume and last.exists() else None)
    training = time.perf_counter() - started
    together = processes.several()  # Lightning's processes are still there, with the same weights
    if not (trainer.is_global_zero or together):
        return folder
    if trainer.is_global_zero:
        _write_rows(folder / outputs.CURVE, curve.points)
    seconds = {"train": training, "evaluate": evaluating}
    unlearned = merged(module.model)
    probe = partial(_probe, options, splits, unlearned, tokenizer, curve) if options.probes else None
    return _leave(options, splits, log, before, unlearned, tokenizer, seconds, probe=probe, together=together)


def _watching(options: UnlearnOptions, curve: TradeoffCurve) -> list[Callback]:
    """What acts on the curve's points: a stop at a collapse, and the best weights at the end."""
    folder = Path(options.output)
    found: list[Callback] = []
    if options.collapse_below is not None:
        found.append(CollapseAlarm(curve, below=options.collapse_below, folder=folder))
    if options.best_below is not None:
        path = folder / "checkpoints" / "best.ckpt"
        found.append(BestTradeoff(curve, target=options.best_below, path=path, folder=folder))
    return found


def _probe(
    options: UnlearnOptions,
    splits: Mapping[str, Sequence[Example]],
    model: nn.Module,
    tokenizer: Any,
    curve: TradeoffCurve,
) -> None:
    """How well the forgetting holds, on the examples of the curve; a reference with the same tokenizer is the control."""

    def control() -> nn.Module | None:
        if options.reference is not None and Path(options.reference).is_file():
            return None
        loaded = load_reference(options, splits)
        return loaded[0] if loaded is not None and loaded[1].get_vocab() == tokenizer.get_vocab() else None

    common: dict[str, Any] = {"pad_token_id": curve.pad_token_id, "folder": options.output}
    QuantizationProbe(curve.encoded, **common).run(model)
    settings: dict[str, Any] = {"lr": options.lr, "batch_size": options.batch_size, "seed": options.seed}
    RelearnProbe(curve.encoded["forget"], curve.encoded["retain"], control=control, **common, **settings).run(model)


def _unlearn_by_assistant(
    options: UnlearnOptions, splits: Mapping[str, Sequence[Example]], log: Rows | None, model: nn.Module, tokenizer: Any
) -> Path:
    """ULD: train a small model whose logits are subtracted; there is no surgery, and so no surgery.csv."""
    from lightning_modules.training.uld import train_assistant

    folder = Path(options.output)
    if not first_process():
        raise ValueError("--method uld: expected one process, found several; use --devices 1")
    started = time.perf_counter()
    before = score(options, splits, model, tokenizer)
    evaluating = time.perf_counter() - started
    outputs.write_config(folder, "unlearn", options)
    started = time.perf_counter()
    unlearned = train_assistant(
        model,
        tokenizer,
        splits,
        options.uld_settings(),
        trainer={"precision": options.precision, "enable_progress_bar": Console(stderr=True).is_terminal},
    )
    seconds = {"train": time.perf_counter() - started, "evaluate": evaluating}
    return _leave(options, splits, log, before, unlearned, tokenizer, seconds)


def _leave(
    options: UnlearnOptions,
    splits: Mapping[str, Sequence[Example]],
    log: Rows | None,
    before: Evaluation | None,
    model: Any,
    tokenizer: Any,
    seconds: dict[str, float],
    *,
    probe: Callable[[], None] | None = None,
    together: bool = False,
) -> Path:
    """Save the model, score it beside the reference, and write everything that a run leaves.

    Together, all processes of the run score, and then the first does the rest by itself.
    """
    folder = Path(options.output)

    def save() -> None:  # first of all: whatever breaks after it, the training was not for nothing
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")

    if together:
        processes.from_first(save)
    else:
        save()
    started = time.perf_counter()
    after = score(options, splits, model, tokenizer, across_processes=together)
    reference = log or reference_rows(options, splits, across_processes=together)
    seconds["evaluate"] += time.perf_counter() - started
    if together and not processes.is_first():
        return folder
    if probe is not None:
        probe()
    found = metrics(options, before, after, reference, seconds)
    named = {"before": None if before is None else before.examples, "after": after.examples, "reference": reference}
    outputs.write_evaluation(folder / outputs.EVALUATION, named)
    outputs.write_json(folder / outputs.METRICS, found)
    draw(folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    _show(found)
    there = ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
    Console().print(f"Everything is in [bold]{folder}[/bold]: {there}")
    return folder


def evaluate_model(options: EvaluateOptions) -> Path:
    """Score a model on its splits and write metrics.json; the model is "after" in it, and "before" is null."""
    options.check()
    with one_thread() if options.model == "scratch" else nullcontext():
        return _evaluate_model(options)


def _evaluate_model(options: EvaluateOptions) -> Path:
    folder = Path(options.output)
    splits = read_splits(options)
    log = rows_of_log(options, splits)
    outputs.claim(folder)
    L.seed_everything(options.seed, verbose=False)
    model, tokenizer = load_model(options, splits)
    started = time.perf_counter()
    after = score(options, splits, model, tokenizer)
    reference = log or reference_rows(options, splits)
    found = metrics(options, None, after, reference, {"train": 0.0, "evaluate": time.perf_counter() - started})
    if options.log:
        outputs.write_evaluation(folder / outputs.EVALUATION, {"after": after.examples, "reference": reference})
    outputs.write_json(folder / outputs.METRICS, found)
    _show(found)
    return folder


def _show(found: Mapping[str, Any]) -> None:
    console = Console()
    for table in tables(found, console.width):
        console.print(table)
    for sentence in sentences(found):
        console.print(sentence)


def _resumed(given: UnlearnOptions) -> UnlearnOptions:
    """The options of the interrupted run, which those given now must not contradict."""
    folder = Path(given.output)
    config = folder / outputs.CONFIG
    if not config.exists():
        raise FileNotFoundError(
            f"--resume: expected a run in {folder}, found no {outputs.CONFIG}; start it without --resume"
        )
    if (folder / outputs.METRICS).exists():
        raise FileExistsError(
            f"--resume: expected an interrupted run, found a finished one in {folder}; choose another --output, or draw its report "
            f"again with `gradsurgery report {folder}`"
        )
    values: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    names = {entry.name for entry in fields(UnlearnOptions)}
    saved = replace(
        UnlearnOptions(**{name: value for name, value in values.items() if name in names}), output=given.output
    )
    default = replace(UnlearnOptions(), output=given.output, resume=True)
    changed = [
        f"--{name.replace('_', '-')}"
        for name in sorted(names - {"resume"})
        if getattr(given, name) not in (getattr(default, name), getattr(saved, name))
    ]
    if changed:
        raise ValueError(
            f"--resume: expected the options of {config}, found others for {', '.join(changed)}; leave them out, or start a new run"
        )
    return replace(saved, resume=True)


def _spread(rows: Sequence[Example]) -> list[Example]:
    """So many of the rows, evenly spread over them."""
    count = min(_CURVE_EXAMPLES, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
