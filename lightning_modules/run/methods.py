"""The two ways to unlearn: training the model with surgery, or training ULD's assistant beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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

import gradsurgery as gs
from lightning_modules.data.examples import evenly_spaced
from lightning_modules.data.pairs import VALIDATION_EXAMPLES, VALIDATION_SPLITS
from lightning_modules.data.tokenization import encode_example, padding_id
from lightning_modules.evaluation import processes
from lightning_modules.evaluation.evaluate import Evaluation
from lightning_modules.evaluation.likelihood import on_gpu
from lightning_modules.evaluation.processes import will_be_first
from lightning_modules.folder import CHECKPOINTS, CURVE, G_EFFECT, LAST_CHECKPOINT, SURGERY
from lightning_modules.run.assembly import adapted, make_anchor, make_module, make_trainer, start_model
from lightning_modules.run.batch import held_down
from lightning_modules.run.deletion import begin, protecting
from lightning_modules.run.finish import finish, kept_start
from lightning_modules.run.kept_scores import scores_before
from lightning_modules.run.loading import make_data
from lightning_modules.run.options import AUTO, TrainingOptions, UnlearnOptions
from lightning_modules.run.plugins import make_callbacks, make_loggers
from lightning_modules.run.probing import probe_it
from lightning_modules.run.radius import with_radius, write_radius
from lightning_modules.run.resume import read_by, write_options
from lightning_modules.run.run import Run
from lightning_modules.run.saving import whole
from lightning_modules.run.scoring import ScoredSplits
from lightning_modules.run.settling import settle_rate, settle_target
from lightning_modules.run.show import show_start
from lightning_modules.training.adapters import checked_targets
from lightning_modules.training.auto_radius import SameRadius
from lightning_modules.training.callbacks import (
    AnchorPull,
    BestTradeoff,
    Checkpoints,
    CollapseAlarm,
    GEffectLogger,
    ProgressLines,
    SurgeryLogger,
    TradeoffCurve,
    seconds_of,
)
from lightning_modules.training.callbacks.checkpoints import FORMER
from lightning_modules.training.checkpoint_file import CheckpointFile
from lightning_modules.training.probability import mean_probabilities
from lightning_modules.training.recomputing import recompute_activations


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
        reference: The scores of the reference in the first process, if they were needed before the training.
        target: The forget probability at which the training was to end, and whether it did; None if it had no target.
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
    reference: ScoredSplits | None = None
    target: Mapping[str, Any] | None = None


def by_surgery(run: Run[UnlearnOptions], model: nn.Module, log: ScoredSplits | None = None) -> Unlearned | None:
    """Train the model by two losses and surgery.

    surgery.csv grows by a line for each optimizer step, curve.csv for each score.

    Args:
        run: Its options may leave the target and the learning rate to be settled, see `settling`.
        model: That is to forget.
        log: The scores of a reference whose log was given.

    Returns:
        The unlearned model; None in a process whose work is done: any but the first, unless they go on together.
    """
    options, training, first = run.options, run.options.training, will_be_first()
    data = make_data(options, run.tokenizer)
    model = adapted(model, training, data, options.output.seed)
    if training.gradient_checkpointing:
        recompute_activations(model)
    started_as, run = run, with_radius(run, model)
    options = run.options
    start = kept_start(model, options) if options.finish.finish_steps else None
    anchor = make_anchor(options, model, data)
    curve = make_curve(run)
    trainer = watched_trainer(run, curve, anchor)
    started = time.perf_counter()
    before = scores_before(run, model) if first else None
    if first and not training.resume:
        # Only after everything that a wrong option can break, so that the corrected command finds the folder free; and
        # before any other file, so that a run that is killed can be resumed.
        write_options(run)
        write_radius(started_as, run)
    if first:
        begin(run)
    scored: ScoredSplits | None = None
    if before is not None:
        run, scored = settle_target(run, before, log)
        curve.stop_below = run.options.training.stop_below
    seconds = {"evaluate": time.perf_counter() - started}
    started = time.perf_counter()
    reference = start_model(run, model, data)
    if first:
        run = settle_rate(run, model, reference, curve, anchor)
        if run.options != options:
            write_options(run)
    seconds["train"] = time.perf_counter() - started
    kind, batches = protecting(run, data)
    module = make_module(model, options.method, run.options.training, reference, kind, options.loading).train()
    if training.compile:
        module.head.compile()
    seconds["train"] += fit(run, trainer, module, batches)
    if start is not None:
        started = time.perf_counter()
        finish(run, module.model, start, anchor)
        seconds["train"] += time.perf_counter() - started
    together = processes.several()  # Lightning's processes live on after training, with the same weights
    if not (trainer.is_global_zero or together):
        return None
    unlearned = module.model if training.save == "adapter" else whole(module.model)
    probe = partial(probe_it, run, unlearned, curve) if training.probed else None
    return Unlearned(
        unlearned,
        before,
        seconds,
        probe,
        together,
        loggers=trainer.loggers,
        steps=trainer.global_step,
        reference=scored,
        target=ended(run.options, trainer, curve, None if start is None else unlearned),
    )


def ended(
    options: UnlearnOptions, trainer: L.Trainer, curve: TradeoffCurve, finished: nn.Module | None = None
) -> dict[str, Any] | None:
    """What metrics.json says about the target of a training that is over; None if it had none.

    Args:
        options: Of the run.
        trainer: That has trained.
        curve: That has scored.
        finished: The model after a finish, which is scored once more; None if there was none.
    """
    level = options.training.stop_below
    if not level or not curve.points:
        return None
    trained, steps = curve.points[-1]["forget"], trainer.global_step
    found, option = trained, ""
    callbacks: list[Callback] = vars(trainer)["callbacks"]  # which Lightning's types do not know
    for callback in callbacks:
        if isinstance(callback, BestTradeoff) and callback.best is not None and callback.restored:
            found, option = callback.best["forget"], "--best-below"
    if finished is not None:
        found, option = _forget_probability(finished, curve), "--finish-steps"
    further: dict[str, Any] = {"above": list(curve.above)} if curve.above else {}
    if found != trained:
        further |= {"trained": trained, "changed_by": option}
    if options.method.keep_asked_words:
        further["keep_asked_words"] = True
    return {
        "forget_probability": level,
        "found": found,
        "reached": found < level and not curve.above,
        "steps": steps,
        "stopped_early": steps < trainer.estimated_stepping_batches,
        **further,
    }


def _forget_probability(model: nn.Module, curve: TradeoffCurve) -> float:
    with on_gpu(model):
        scored = {"forget": curve.encoded["forget"]}
        return mean_probabilities(model, scored, pad_token_id=curve.pad_token_id, batch_size=curve.batch_size)["forget"]


def watched_trainer(run: Run[UnlearnOptions], curve: TradeoffCurve, anchor: gs.LayerAnchor | None = None) -> L.Trainer:
    """The Trainer of a run with surgery, with every callback that writes into its folder or may stop it."""
    folder, training = run.folder, run.options.training
    logs: list[Callback] = [SurgeryLogger(folder / SURGERY)]
    if not run.options.method.alone:  # with one gradient there is no conflict by layer
        logs.append(GEffectLogger(folder / G_EFFECT))
    held = [] if anchor is None else [AnchorPull(anchor)]  # before what scores and saves
    callbacks = [SameRadius(), *held, *logs, curve, *watching(training, folder, curve), _checkpoints(run)]
    return make_trainer(folder, training, callbacks, Console(stderr=True))


def fit(run: Run[UnlearnOptions], trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> float:
    """Train, from the last checkpoint where the run is resumed. Returns the seconds, those before it included."""
    for logger in trainer.loggers:
        logger.log_hyperparams(run.options.recorded())
    trainer.fit(module, data, ckpt_path=_last_checkpoint(run), weights_only=True)
    return seconds_of(trainer)


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
    before = scores_before(run, model)
    show_start(before)
    evaluating = time.perf_counter() - started
    if not training.resume:
        write_options(run)
    checkpoints = _checkpoints(run)
    loggers = make_loggers(training, run.folder)
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
    seconds = {"train": checkpoints.seconds, "evaluate": evaluating}
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
    # What is settled only before the training is no number yet; the weights and the optimizer hold what it came to.
    options = {name: value for name, value in run.options.recorded().items() if name != "output"}
    for name in ("lr", "stop_below", "finish_lr"):
        if options[name] in (None, AUTO):
            del options[name]
    options |= read_by(run)
    every = run.options.training.checkpoint_every
    return Checkpoints(run.folder / LAST_CHECKPOINT, every_n_steps=every, run=options)


def _last_checkpoint(run: Run[UnlearnOptions]) -> Path | None:
    """Where to go on; None at the start."""
    if not run.options.training.resume:
        return None
    last = run.folder / LAST_CHECKPOINT
    return next((path for path in (last, last.with_name(FORMER)) if path.exists()), None)


def make_curve(run: Run[UnlearnOptions]) -> TradeoffCurve:
    """The scores while training, on a few examples of both sets; with a ledger also of what `held_down` says."""
    training = run.options.training
    return TradeoffCurve(
        {
            split: [
                encode_example(run.tokenizer, row, run.options.data.max_length)
                for row in evenly_spaced(run.splits[split], VALIDATION_EXAMPLES)
            ]
            for split in VALIDATION_SPLITS
        },
        pad_token_id=padding_id(run.tokenizer),
        every_n_steps=training.score_every,
        stop_below=training.stop_below,
        at_most=held_down(run),
        path=run.folder / CURVE,
    )
