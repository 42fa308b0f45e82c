"""The two ways to unlearn: training the model with surgery, or training ULD's assistant beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from rich.console import Console
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_modules.data.examples import asked, evenly_spaced
from lightning_modules.data.pairs import VALIDATION_EXAMPLES, VALIDATION_SPLITS
from lightning_modules.data.tokenization import encode, padding_id
from lightning_modules.evaluation import processes
from lightning_modules.evaluation.evaluate import Evaluation
from lightning_modules.evaluation.processes import will_be_first
from lightning_modules.folder import CHECKPOINTS, CURVE, G_EFFECT, LAST_CHECKPOINT, SURGERY, write_config
from lightning_modules.run.assembly import adapted, make_module, make_trainer, start_model
from lightning_modules.run.finish import finish, kept_start
from lightning_modules.run.identity import examples_hash
from lightning_modules.run.loading import make_data
from lightning_modules.run.options import TrainingOptions, UnlearnOptions
from lightning_modules.run.plugins import make_callbacks, make_loggers
from lightning_modules.run.probing import probe_it
from lightning_modules.run.radius import with_radius, write_radius
from lightning_modules.run.run import Run
from lightning_modules.run.scoring import score
from lightning_modules.run.show import show_start
from lightning_modules.training.adapters import checked_targets
from lightning_modules.training.auto_radius import SameRadius
from lightning_modules.training.callbacks import (
    BestTradeoff,
    Checkpoints,
    CollapseAlarm,
    GEffectLogger,
    ProgressLines,
    SurgeryLogger,
    TradeoffCurve,
)
from lightning_modules.training.callbacks.checkpoints import FORMER
from lightning_modules.training.checkpoint_file import CheckpointFile
from lightning_modules.training.merging import merged


@dataclass(frozen=True)
class Unlearned:
    """What a method leaves.

    Attributes:
        model: The model that has forgotten, with its adapters merged unless they are to be kept.
        before: Scores of the model before; None in every process but the first.
        seconds: What training and scoring took, "train" and "evaluate".
        probe: What is still to be measured on the model, once it is saved and scored.
        together: Whether other processes hold the same model and can share the work of scoring it.
        whole: What is saved, where `model` is in shards: in the first process, which holds it in its host's memory.
        mesh: What `model` is sharded over; None if it is not.
        loggers: Of the training; they are told the scores too.
        steps: Optimizer steps that were taken.
    """

    model: Any
    before: Evaluation | None
    seconds: dict[str, float]
    probe: Callable[[], None] | None = None
    together: bool = False
    whole: Any = None
    mesh: DeviceMesh | None = None
    loggers: Sequence[Logger] = ()
    steps: int = 0


def by_surgery(run: Run[UnlearnOptions], model: nn.Module) -> Unlearned | None:
    """Train the model by two losses and surgery.

    surgery.csv grows by a line for each optimizer step, curve.csv for each score.

    Returns:
        The unlearned model; None in a process whose work is done: any but the first, unless they go on together.
    """
    options, training, first = run.options, run.options.training, will_be_first()
    data = make_data(options, run.tokenizer)
    model = adapted(model, training, data, options.output.seed)
    started_as, run = run, with_radius(run, model)
    options = run.options
    start = kept_start(model, options) if options.finish.finish_steps else None
    curve = make_curve(run)
    trainer = watched_trainer(run, curve)
    started = time.perf_counter()
    before = score(run, model) if first else None
    seconds = {"evaluate": time.perf_counter() - started}
    if before is not None:
        show_start(before)
    if first and not training.resume:
        # Only after everything that a wrong option can break, so that the corrected command finds the folder free; and
        # before any other file, so that a run that is killed can be resumed.
        write_config(run.folder, "unlearn", options.recorded())
        write_radius(started_as, run)
    reference = start_model(run, model, data)
    module = make_module(model, options.method, training, reference).train()
    seconds["train"] = fit(run, trainer, module, data)
    if start is not None:
        started = time.perf_counter()
        finish(run, module.model, start)
        seconds["train"] += time.perf_counter() - started
    together = processes.several()  # Lightning's processes live on after training, with the same weights
    if not (trainer.is_global_zero or together):
        return None
    unlearned = module.model if training.save == "adapter" else merged(module.model)
    probe = partial(probe_it, run, unlearned, curve) if training.probed else None
    return Unlearned(
        unlearned,
        before,
        seconds,
        probe,
        together,
        loggers=trainer.loggers,
        steps=trainer.global_step,
    )


def watched_trainer(run: Run[UnlearnOptions], curve: TradeoffCurve) -> L.Trainer:
    """The Trainer of a run with surgery, with every callback that writes into its folder or may stop it."""
    folder, training = run.folder, run.options.training
    logs = [SurgeryLogger(folder / SURGERY), GEffectLogger(folder / G_EFFECT)]
    callbacks = [SameRadius(), *logs, curve, *watching(training, folder, curve), _checkpoints(run)]
    return make_trainer(folder, training, callbacks, Console(stderr=True))


def fit(run: Run[UnlearnOptions], trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> float:
    """Train, from the last checkpoint where the run is resumed. Returns the seconds."""
    for logger in trainer.loggers:
        logger.log_hyperparams(run.options.recorded())
    started = time.perf_counter()
    trainer.fit(module, data, ckpt_path=_last_checkpoint(run), weights_only=True)
    return time.perf_counter() - started


def by_assistant(run: Run[UnlearnOptions], model: nn.Module) -> Unlearned:
    """ULD: train a small model whose logits are subtracted. There is no surgery, and so no surgery.csv.

    Raises:
        ValueError: If there are several processes.
    """
    from lightning_modules.training.uld import train_assistant

    options, training = run.options, run.options.training
    if not will_be_first():
        raise ValueError("--method uld: expected one process, found several; use --devices 1")
    checked_targets(model, training.lora_targets)
    started = time.perf_counter()
    before = score(run, model)
    show_start(before)
    evaluating = time.perf_counter() - started
    if not training.resume:
        write_config(run.folder, "unlearn", options.recorded())
    checkpoints = _checkpoints(run)
    started, loggers = time.perf_counter(), make_loggers(training, run.folder)
    unlearned = train_assistant(
        model,
        run.tokenizer,
        run.splits,
        options.uld_settings(),
        trainer={
            "precision": training.precision,
            "enable_progress_bar": Console(stderr=True).is_terminal,
            "logger": loggers,
            "log_every_n_steps": 1,
            "enable_checkpointing": True,
            "callbacks": [*make_callbacks(training), checkpoints, ProgressLines("Training ULD's assistant")],
            "plugins": [CheckpointFile()],
        },
        resume=_last_checkpoint(run),
    )
    seconds = {"train": time.perf_counter() - started, "evaluate": evaluating}
    return Unlearned(unlearned, before, seconds, loggers=loggers, steps=checkpoints.step)


def watching(training: TrainingOptions, folder: Path, curve: TradeoffCurve) -> list[Callback]:
    """What acts on the curve's points: an early stop if the model collapses, and the best weights at the end."""
    found: list[Callback] = []
    if training.collapse_below is not None:
        found.append(CollapseAlarm(curve, below=training.collapse_below, folder=folder))
    if training.best_below is not None:
        path = folder / CHECKPOINTS / "best.ckpt"
        found.append(BestTradeoff(curve, target=training.best_below, path=path, folder=folder))
    return found


def _checkpoints(run: Run[UnlearnOptions]) -> Checkpoints:
    """Saves the training, with the options that it is of."""
    options = {name: value for name, value in run.options.recorded().items() if name != "output"}
    options["the examples in these files"] = examples_hash(run.splits)[:12]
    every = run.options.training.checkpoint_every
    return Checkpoints(run.folder / LAST_CHECKPOINT, every_n_steps=every, run=options)


def _last_checkpoint(run: Run[UnlearnOptions]) -> Path | None:
    """Where to go on; None at the start."""
    if not run.options.training.resume:
        return None
    last = run.folder / LAST_CHECKPOINT
    return next((path for path in (last, last.with_name(FORMER)) if path.exists()), None)


def make_curve(run: Run[UnlearnOptions]) -> TradeoffCurve:
    """The scores while training, on a few examples of both sets."""
    training = run.options.training
    return TradeoffCurve(
        {
            split: [
                encode(run.tokenizer, asked(row), row["answer"], run.options.data.max_length)
                for row in evenly_spaced(run.splits[split], VALIDATION_EXAMPLES)
            ]
            for split in VALIDATION_SPLITS
        },
        pad_token_id=padding_id(run.tokenizer),
        every_n_steps=training.score_every,
        stop_below=training.stop_below,
        path=run.folder / CURVE,
    )
