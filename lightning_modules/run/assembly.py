"""From options to what trains: the module, its adapters, the model before unlearning, and the Trainer."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import nn

import gradsurgery as gs
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.tokenization import padding_id
from lightning_modules.evaluation import processes
from lightning_modules.evaluation.likelihood import device_of, on_gpu
from lightning_modules.evaluation.processes import will_be_first
from lightning_modules.folder import START_MODEL
from lightning_modules.progress import Stage
from lightning_modules.run.compiling import check_compiler
from lightning_modules.run.models import USUAL, load_pretrained
from lightning_modules.run.options import LoadingOptions, MethodOptions, TrainingOptions, UnlearnOptions
from lightning_modules.run.plugins import make_callbacks, make_loggers
from lightning_modules.run.run import Run
from lightning_modules.training import objectives
from lightning_modules.training.adapters import adapt
from lightning_modules.training.anchoring import anchored
from lightning_modules.training.callbacks import ProgressLines
from lightning_modules.training.checkpoint_file import CheckpointFile
from lightning_modules.training.merging import check_mergeable
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.noise import NoiseSettings
from lightning_modules.training.references import AdapterOff, Precomputed, Reference, SecondModel, precompute
from lightning_modules.training.trainer import trainer_options


def make_module(
    model: nn.Module,
    method: MethodOptions,
    training: TrainingOptions,
    reference: Reference | None,
    kind: Callable[..., UnlearningModule] | None = None,
    loading: LoadingOptions = USUAL,
) -> UnlearningModule:
    """The module that trains a model by a method.

    Args:
        model: What is trained.
        method: Losses, rule and surgery. Its teacher is loaded.
        training: The base optimizer, its warm-up, clipping and accumulation.
        reference: From `start_model`.
        kind: The class, or what makes it, with the arguments of `UnlearningModule`; None for that itself, without a
            retain loss where the method takes the forget gradient alone.
        loading: How the teacher is loaded.
    """
    forget_loss = method.bound_loss()
    if method.imitates:
        forget_loss = objectives.distillation(teacher(method, loading), forget_loss)
    if method.substitute_weight:
        forget_loss = objectives.with_substitutes(forget_loss, method.substitute_weight)
    retain_loss = None if kind is None and method.alone else objectives.by_name(method.retain_loss)
    module = (UnlearningModule if kind is None else kind)(
        model,
        forget_loss=forget_loss,
        retain_loss=retain_loss,
        optimizer=_base_optimizer(training),
        surgery=method.surgery(max_norm=training.max_norm, accumulate=training.accumulates),
        warmup_steps=training.warmup_steps if training.lr_schedule == "constant" else 0,
        schedule=training.schedule(),
        perturb=method.perturb(),
        noise=NoiseSettings(method.retain_noise) if method.retain_noise else None,
        reference=reference,
        retain_inside=method.retain_inside,
        dual=gs.losses.DualVariable(**method.dual) if method.dual else None,
    )
    if training.padding_free:
        module.head.pack()
    return module


def teacher(method: MethodOptions, loading: LoadingOptions) -> SecondModel:
    """The teacher, in memory of its own. It is loaded as a reference is."""
    return SecondModel(load_pretrained(str(method.teacher), loading.of_reference())[0])


def _base_optimizer(training: TrainingOptions) -> Callable[..., torch.optim.Optimizer]:
    """Parameters -> the base optimizer; called in every process, with the learning rate of the first.

    One that is found from trial steps is known there alone.
    """

    def make(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        rate: Any = processes.from_first(lambda: training.lr)
        return training.base_optimizer(rate)(named)

    return make


def start_model(run: Run[UnlearnOptions], model: nn.Module, data: ForgetRetainDataModule) -> Reference | None:
    """How the losses know the model before unlearning; None if neither of them compares with it.

    Log-likelihoods that are computed ahead are written to the run's folder by the first process. Another one reads
    them there if they are there already, as when Lightning starts it, and computes its own if not.
    """
    training = run.options.training
    kind = kind_of_start_model(run.options)
    if kind is None:
        return None
    if kind == "copy":
        return SecondModel(copy.deepcopy(model))
    if kind == "adapters_off":
        return AdapterOff()
    path = run.folder / START_MODEL
    if will_be_first():
        if not (training.resume and path.exists()):
            _precompute(model, data, path)
        return Precomputed(path)
    if path.exists():
        return Precomputed(path)
    # torchrun and srun start all processes at once. There is no group yet in which this one could wait for the first,
    # and on another machine the file may never appear: computing the numbers here takes as long as waiting.
    with tempfile.TemporaryDirectory() as folder:
        _precompute(model, data, Path(folder) / START_MODEL)
        return Precomputed(Path(folder) / START_MODEL)


def _precompute(model: nn.Module, data: ForgetRetainDataModule, path: Path) -> None:
    data.setup()
    if data.dataset is None:
        raise RuntimeError("setup() left no dataset")
    with on_gpu(model):
        precompute(model, data.dataset, path, pad_token_id=padding_id(data.tokenizer))


def kind_of_start_model(options: UnlearnOptions) -> str | None:
    """What --start-model says, with "auto" settled; None if neither loss compares with the model before unlearning."""
    method, training = options.method, options.training
    names = [] if method.imitates else [method.forget_loss]
    names += [] if method.alone else [method.retain_loss]
    losses = [objectives.by_name(name) for name in names]
    losses += [gs.losses.kl_divergence] if method.retain_noise else []
    if not any(objectives.needs_reference(loss) for loss in losses):
        return None
    if method.start_model != "auto":
        return method.start_model
    if not any(objectives.needs_logits(loss) for loss in losses):
        return "precomputed"
    return "adapters_off" if training.adapters_start_at_zero else "copy"


def make_trainer(
    folder: Path,
    training: TrainingOptions,
    callbacks: Sequence[Callback],
    console: Console,
    *,
    what: str = "Unlearning",
    max_norm: float | None = None,
) -> L.Trainer:
    """The Trainer that these options describe.

    Args:
        folder: Of the run.
        training: With the loggers and further callbacks that the user plugs in.
        callbacks: Our own, which come first.
        console: A bar is drawn if it is a terminal.
        what: What the lines of progress call it.
        max_norm: Lightning clips gradients to it; surgery clips its own.
    """
    bar = RichProgressBar() if console.is_terminal else ProgressLines(what)
    return L.Trainer(
        **trainer_options(
            **_hardware(training),
            max_epochs=training.epochs if training.steps is None else -1,
            max_steps=training.steps or -1,
            accumulate_grad_batches=training.accumulate or 1,
            gradient_clip_val=max_norm,
            callbacks=[*callbacks, *make_callbacks(training), bar],
            logger=make_loggers(training, folder),
            log_every_n_steps=1,
            enable_checkpointing=True,
            plugins=[] if training.sharded else [CheckpointFile()],  # shards are a folder, which Lightning writes
            enable_progress_bar=console.is_terminal,
        )
    )


def make_anchor(options: UnlearnOptions, model: nn.Module, data: ForgetRetainDataModule) -> gs.LayerAnchor | None:
    """What holds the layers of the model as it is now and has read the retain examples; None without --retain-anchor.

    Args:
        options: Of the run.
        model: With its adapters, before any step.
        data: With the retain examples.
    """
    if not options.method.retain_anchor:
        return None
    data.setup()
    if data.dataset is None:
        raise TypeError("expected the data of an unlearning run, found none")
    pad, size = padding_id(data.tokenizer), options.training.batch_size
    return anchored(model, options.method.retain_anchor, data.dataset.retain, pad_token_id=pad, batch_size=size)


def make_finishing_trainer(
    training: TrainingOptions, steps: int, console: Console, callbacks: Sequence[Callback] = ()
) -> L.Trainer:
    """The Trainer of the finish, which leaves no files and starts anew where a run is resumed."""
    return L.Trainer(
        **trainer_options(
            **_hardware(training),
            max_epochs=-1,
            max_steps=steps,
            callbacks=[*callbacks, RichProgressBar() if console.is_terminal else ProgressLines("Finishing")],
            enable_progress_bar=console.is_terminal,
        )
    )


def fsdp2(training: TrainingOptions) -> ModelParallelStrategy:
    """Lightning's strategy for a module that is sharded already, over all devices of all machines."""
    return ModelParallelStrategy(data_parallel_size=training.processes, tensor_parallel_size=1)


def check_hardware(training: TrainingOptions) -> None:
    """Let Lightning judge precision, strategy and devices, which takes it milliseconds, before any long work.

    Raises:
        ValueError: If it does not know one of them, this machine does not have it, another precision would be used, or
            `--compile` is asked for where nothing compiles.
    """
    asked = f"--precision {training.precision}, --strategy {training.strategy}, --devices {training.devices}"
    try:
        trainer = L.Trainer(**trainer_options(**_hardware(training)))
    except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
        known = ", ".join(("auto", *StrategyRegistry.available_strategies()))
        said = " ".join(str(error).split())
        raise ValueError(
            f"{asked}: expected what Lightning knows and this machine has, found: {said} (Its strategies are {known}.)"
        ) from error
    if training.compile:
        check_compiler(trainer.strategy.root_device.type)
    if str(training.precision).startswith("16") and str(trainer.precision).startswith("bf16"):
        raise ValueError(f"{asked}: expected a GPU for float16, found none; choose {trainer.precision} or 32-true")


def _hardware(training: TrainingOptions) -> dict[str, Any]:
    """What a Trainer is told about the machine."""
    return {
        "accelerator": "cpu" if torch.backends.mps.is_available() else "auto",  # surgery's sums need float64
        "devices": training.devices if training.devices == "auto" else int(training.devices),
        "num_nodes": training.num_nodes,
        "strategy": fsdp2(training) if training.sharded else training.strategy,
        "precision": "32-true" if training.sharded else training.precision,  # shards have a policy of their own
    }


def adapted(model: nn.Module, training: TrainingOptions, data: ForgetRetainDataModule, seed: int) -> nn.Module:
    """The model with the adapters that these options describe; without any, the model itself.

    FILA's Fisher information takes a backward pass for every batch of both sets, on the GPU if there is one.

    Raises:
        ValueError: If a target is unknown, or the adapters are to be merged at the end and cannot be.
    """
    found = _adapted(model, training, data, seed)
    if training.save == "merged" or training.probed:
        check_mergeable(found)  # now, and not after hours of training
    return found


def _adapted(model: nn.Module, training: TrainingOptions, data: ForgetRetainDataModule, seed: int) -> nn.Module:
    settings = training.adapters(seed)
    if settings.init == "default" or not settings.rank:
        return adapt(model, settings)
    data.setup()
    whole = copy.copy(data)  # the batches of all processes, each of which reads them in parts of its own size
    whole.batch_size *= training.processes
    with on_gpu(model):
        loader, device = whole.train_dataloader(), device_of(model)
        stage = Stage("Fisher information for FILA, batches", 2 * len(loader))

        def batches(name: str) -> Iterable[Mapping[str, torch.Tensor]]:
            for batch in loader:
                yield {key: value.to(device) for key, value in batch[name].items()}
                stage.advance()

        forget, retain = batches("forget"), batches("retain")
        return adapt(model, settings, forget_batches=forget, retain_batches=retain, parts=training.processes)
