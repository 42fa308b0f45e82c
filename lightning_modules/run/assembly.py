"""From options to what trains: module, adapters, the model before unlearning, and the Trainer."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from rich.console import Console
from torch import nn

import gradsurgery as gs
from lightning_modules import folder as outputs
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.tokenization import padding_id
from lightning_modules.evaluation.likelihood import device_of
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.training import objectives
from lightning_modules.training.adapters import with_adapters
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.references import AdapterOff, Precomputed, Reference, SecondModel, precompute


def first_process() -> bool:
    """Lightning starts the other processes of a run with this same command: they train and score, and write nothing."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def make_module(model: nn.Module, options: UnlearnOptions, reference: Reference | None) -> UnlearningModule:
    """The module that these options describe."""
    return UnlearningModule(
        model,
        forget_loss=options.bound_loss(),
        retain_loss=objectives.by_name(options.retain_loss),
        optimizer=partial(options.optimizer_class(), lr=options.lr, weight_decay=options.weight_decay),
        surgery=options.surgery(),
        warmup_steps=options.warmup_steps,
        reference=reference,
        retain_inside=options.retain_inside,
        dual=gs.losses.DualVariable(**options.dual) if options.dual else None,
    )


def start_model(
    model: nn.Module, options: UnlearnOptions, data: ForgetRetainDataModule, folder: Path
) -> Reference | None:
    """What a loss that compares with the model before unlearning compares with."""
    losses = objectives.by_name(options.forget_loss), objectives.by_name(options.retain_loss)
    if not any(objectives.needs_reference(loss) for loss in losses):
        return None
    kind = options.start_model
    if kind == "auto":
        few = not any(objectives.needs_logits(loss) for loss in losses)
        kind = (
            "precomputed" if few else "adapters_off" if options.lora_rank and options.lora_init == "default" else "copy"
        )
    if kind == "copy":
        return SecondModel(copy.deepcopy(model))
    if kind == "adapters_off":
        return AdapterOff()
    path = folder / outputs.START_MODEL
    if first_process() and not (options.resume and path.exists()):  # another process finds it there
        data.setup()
        if data.dataset is None:
            raise RuntimeError("setup() left no dataset")
        home = device_of(model)
        if home.type == "cpu" and torch.cuda.is_available():
            model.to("cuda")
        precompute(model, data.dataset, path, pad_token_id=padding_id(data.tokenizer))
        model.to(home)
    return Precomputed(path)


def make_trainer(folder: Path, options: UnlearnOptions, callbacks: Sequence[Callback], console: Console) -> L.Trainer:
    """The Trainer that these options describe; it writes a checkpoint every epoch."""
    # With save_top_k=0 nothing is written before training ends, whatever save_last says (Lightning 2.6).
    checkpoint = ModelCheckpoint(folder / "checkpoints", filename="last", save_top_k=1, enable_version_counter=False)
    bar = [RichProgressBar()] if console.is_terminal else []
    devices: Any = options.devices if options.devices == "auto" else int(options.devices)
    return L.Trainer(
        accelerator="auto",
        devices=devices,
        strategy=options.strategy,
        precision=options.precision,  # pyright: ignore[reportArgumentType] (Lightning checks the name)
        max_epochs=options.epochs,
        accumulate_grad_batches=options.accumulate or 1,
        callbacks=[*callbacks, checkpoint, *bar],
        logger=False,
        enable_progress_bar=bool(bar),
        enable_model_summary=False,
        use_distributed_sampler=False,  # PairSampler divides the pairs itself
        num_sanity_val_steps=0,
    )


def adapted(model: nn.Module, options: UnlearnOptions, data: ForgetRetainDataModule) -> nn.Module:
    """The model with the adapters that these options describe, or as it is without any."""
    if options.lora_init == "default" or not options.lora_rank:
        return with_adapters(model, rank=options.lora_rank, seed=options.seed)
    data.setup()
    home = device_of(model)
    if home.type == "cpu" and torch.cuda.is_available():
        model.to("cuda")  # a backward pass for every batch of both sets
    loader, device = data.train_dataloader(), device_of(model)

    def batches(name: str) -> Iterable[Mapping[str, torch.Tensor]]:
        return ({key: value.to(device) for key, value in batch[name].items()} for batch in loader)

    model = with_adapters(
        model,
        rank=options.lora_rank,
        init="fila",
        forget_batches=batches("forget"),
        retain_batches=batches("retain"),
        seed=options.seed,
    )
    return model.to(home)


def merged(model: nn.Module) -> Any:
    """The model with its adapters in its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # pyright: ignore[reportCallIssue]
