"""Training by surgery where no device can hold the model: every process holds a shard, while scoring too."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_modules.data.examples import Example
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.tokenization import padding_id
from lightning_modules.evaluation import processes
from lightning_modules.folder import START_MODEL
from lightning_modules.run.assembly import fsdp2, kind_of_start_model, make_module
from lightning_modules.run.loading import load_model, make_data
from lightning_modules.run.methods import Unlearned, ended, fit, make_curve, watched_trainer
from lightning_modules.run.options import TrainingOptions, UnlearnOptions
from lightning_modules.run.probing import probe_it
from lightning_modules.run.resume import write_options
from lightning_modules.run.run import Run
from lightning_modules.run.scoring import ScoredSplits, score
from lightning_modules.run.settling import settle_target
from lightning_modules.run.show import show_example
from lightning_modules.training.adapters import adapt
from lightning_modules.training.merging import check_mergeable, merged
from lightning_modules.training.references import AdapterOff, Precomputed, Reference, SecondModel, precompute
from lightning_modules.training.sharding import POLICIES, Distributed
from lightning_modules.training.trainer import trainer_options


def by_shards(
    options: UnlearnOptions,
    folder: Path,
    splits: Mapping[str, Sequence[Example]],
    log: ScoredSplits | None = None,
    own: tuple[str, ...] = (),
) -> tuple[Run[UnlearnOptions], Unlearned]:
    """As `methods.by_surgery`, with the model sharded over all processes by FSDP2.

    The processes are started before the model is loaded, and only the first one loads it. Scores before and
    after are those of float32 shards, so that they are the same as in one process; --evaluation-precision puts both
    under autocast. With --precision bf16-mixed the training, and the curve that watches it, gather bfloat16 weights.

    Returns:
        The run, and in every process what it leaves.

    Raises:
        ValueError: If two layers of the model share a weight.
    """
    training = options.training
    mesh = _start_processes(training)

    def load() -> tuple[nn.Module, Any]:
        model, tokenizer = load_model(options, splits)
        adapted = adapt(model, training.adapters(options.output.seed))
        check_mergeable(adapted)  # now, and not after hours of training
        return adapted, tokenizer

    model = Distributed(load)
    run = Run(options, folder, splits, model.known, own)
    if processes.is_first() and not training.resume:
        show_example(run)
    started = time.perf_counter()
    shards = model.sharded(mesh)
    before = score(run, shards)
    curve = make_curve(run)
    trainer = watched_trainer(run, curve)
    if processes.is_first() and not training.resume:
        write_options(run)
    run, scored = settle_target(run, before, log, mesh)
    curve.stop_below = run.options.training.stop_below
    if processes.is_first() and run.options != options:
        write_options(run)
    seconds = {"evaluate": time.perf_counter() - started}
    seconds["train"] = _train(run, model, shards, mesh, trainer)
    del shards
    _free()
    if processes.is_first():
        model.whole = merged(model.whole)
    # The trained weights in float32 and without adapters: what is saved is what is scored.
    finished = model.sharded(mesh)
    first = processes.is_first()
    return run, Unlearned(
        finished,
        before if first else None,
        seconds,
        partial(probe_it, run, model.whole, curve) if training.probed else None,
        together=processes.several(),
        whole=model.whole,
        mesh=mesh,
        loggers=trainer.loggers,
        steps=trainer.global_step,
        reference=scored,
        target=ended(run.options, trainer, curve),
    )


def _start_processes(training: TrainingOptions) -> DeviceMesh:
    """Let Lightning start the other processes of this machine, if nobody else did, and make their group."""
    strategy = fsdp2(training)
    devices = training.devices if training.devices == "auto" else int(training.devices)
    L.Trainer(**trainer_options(devices=devices, num_nodes=training.num_nodes, strategy=strategy))
    strategy.connect(L.LightningModule())  # it wants to tell a module about the mesh
    if strategy.launcher is None:
        strategy.setup_environment()
    else:
        strategy.launcher.launch(strategy.setup_environment)
    return strategy.device_mesh["data_parallel"]


def _train(
    run: Run[UnlearnOptions], model: Distributed, shards: nn.Module, mesh: DeviceMesh, trainer: L.Trainer
) -> float:
    """Train shards of the model and gather them. Returns the seconds."""
    options, training = run.options, run.options.training
    data = make_data(options, run.tokenizer)
    policy = POLICIES[training.precision or "32-true"]
    reference = _start_model(run, model, shards, data, mesh)
    if policy is not None:
        shards = model.sharded(mesh, policy)
    module = make_module(shards, options.method, training, reference)
    seconds = fit(run, trainer, module.train(), data)
    model.gather(shards)
    return seconds


def _start_model(
    run: Run[UnlearnOptions], model: Distributed, shards: nn.Module, data: ForgetRetainDataModule, mesh: DeviceMesh
) -> Reference | None:
    """As `assembly.start_model`, of shards."""
    training = run.options.training
    kind = kind_of_start_model(run.options)
    if kind is None:
        return None
    if kind == "copy":
        return SecondModel(model.sharded(mesh, POLICIES[training.precision or "32-true"]))
    if kind == "adapters_off":
        return AdapterOff()
    path = run.folder / START_MODEL
    if processes.from_first(lambda: not (training.resume and path.exists())):
        data.setup()
        if data.dataset is None:
            raise RuntimeError("setup() left no dataset")
        mine = path if processes.is_first() else None
        precompute(shards, data.dataset, mine, pad_token_id=padding_id(data.tokenizer))
        processes.from_first(lambda: None)  # the others wait for the file
    return Precomputed(path)


def _free() -> None:
    """Give the memory of what is gone back: a Trainer and its module know each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
