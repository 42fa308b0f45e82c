"""From options to what trains: the module, its adapters, the model before unlearning, and the Trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console
from torch import nn

import gradsurgery as gs
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.tokenization import padding_id
from lightning_modules.evaluation.likelihood import device_of, on_gpu
from lightning_modules.evaluation.processes import will_be_first
from lightning_modules.folder import START_MODEL
from lightning_modules.run.options import MethodOptions, TrainingOptions, UnlearnOptions
from lightning_modules.run.run import Run
from lightning_modules.training import objectives
from lightning_modules.training.adapters import with_adapters
from lightning_modules.training.checkpoint_file import CheckpointFile
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.references import AdapterOff, Precomputed, Reference, SecondModel, precompute
from lightning_modules.training.trainer import trainer_options


def make_module(
    model: nn.Module, method: MethodOptions, training: TrainingOptions, reference: Reference | None
) -> UnlearningModule:
    """The module that trains a model by a method.

    Args:
        model: What is trained.
        method: Losses, rule and surgery.
        training: The base optimizer, its warm-up, clipping and accumulation.
        reference: From `start_model`.
    """
    return UnlearningModule(
        model,
        forget_loss=method.bound_loss(),
        retain_loss=objectives.by_name(method.retain_loss),
        optimizer=training.base_optimizer(),
        surgery=method.surgery(max_norm=training.max_norm, accumulate=training.accumulates),
        warmup_steps=training.warmup_steps,
        reference=reference,
        retain_inside=method.retain_inside,
        dual=gs.losses.DualVariable(**method.dual) if method.dual else None,
    )


def start_model(run: Run[UnlearnOptions], model: nn.Module, data: ForgetRetainDataModule) -> Reference | None:
    """How the losses know the model before unlearning; None if neither of them compares with it.

    Log-likelihoods that are computed ahead are written to the run's folder, by the first process.
    """
    method, training = run.options.method, run.options.training
    losses = objectives.by_name(method.forget_loss), objectives.by_name(method.retain_loss)
    if not any(objectives.needs_reference(loss) for loss in losses):
        return None
    kind = method.start_model
    if kind == "auto":
        if not any(objectives.needs_logits(loss) for loss in losses):
            kind = "precomputed"
        else:
            kind = "adapters_off" if training.lora_rank and training.lora_init == "default" else "copy"
    if kind == "copy":
        return SecondModel(copy.deepcopy(model))
    if kind == "adapters_off":
        return AdapterOff()
    path = run.folder / START_MODEL
    if will_be_first() and not (training.resume and path.exists()):
        data.setup()
        if data.dataset is None:
            raise RuntimeError("setup() left no dataset")
        with on_gpu(model):
            precompute(model, data.dataset, path, pad_token_id=padding_id(data.tokenizer))
    return Precomputed(path)


def make_trainer(training: TrainingOptions, callbacks: Sequence[Callback], console: Console) -> L.Trainer:
    """The Trainer that these options describe."""
    bar = [RichProgressBar()] if console.is_terminal else []
    return L.Trainer(
        **trainer_options(
            accelerator="auto",
            devices=training.devices if training.devices == "auto" else int(training.devices),
            strategy=training.strategy,
            precision=training.precision,
            max_epochs=training.epochs,
            accumulate_grad_batches=training.accumulate or 1,
            callbacks=[*callbacks, *bar],
            enable_checkpointing=True,
            plugins=[CheckpointFile()],
            enable_progress_bar=bool(bar),
        )
    )


def adapted(model: nn.Module, training: TrainingOptions, data: ForgetRetainDataModule, seed: int) -> nn.Module:
    """The model with the adapters that these options describe; without any, the model itself.

    FILA's Fisher information takes a backward pass for every batch of both sets, on the GPU if there is one.
    """
    if training.lora_init == "default" or not training.lora_rank:
        return with_adapters(model, rank=training.lora_rank, seed=seed)
    data.setup()
    with on_gpu(model):
        loader, device = data.train_dataloader(), device_of(model)

        def batches(name: str) -> Iterable[Mapping[str, torch.Tensor]]:
            return ({key: value.to(device) for key, value in batch[name].items()} for batch in loader)

        return with_adapters(
            model,
            rank=training.lora_rank,
            init="fila",
            forget_batches=batches("forget"),
            retain_batches=batches("retain"),
            seed=seed,
        )


def merged(model: nn.Module) -> Any:
    """The model with its adapters merged into its weights; without any, the model itself."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # pyright: ignore[reportCallIssue]
