"""What probes of a trained model share: when they run, a copy that they may ruin, and where the result goes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_modules.folder import PROBES
from lightning_modules.training.callbacks.notes import note
from lightning_modules.training.merging import check_mergeable, merged

SHARDED = "expected a model that one process holds whole, found sharded weights; save it, and probe the saved model in one process"


class Probe(Callback):
    """Measures something of the trained model at the end of training, in one process.

    A probe of your own says its `name`, and what it measures in `measure`.

    Args:
        folder: The run's folder, to write the result into `probes.json` for the report; None writes nothing.

    Attributes:
        name: Of the entry in `probes.json`.
        result: What `measure` returned; None before the end of training.
    """

    name = ""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.result: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002 (Lightning's signature)
        """Refuse what cannot be copied now, in every process, and not after training: some adapters, sharded weights.

        Raises:
            RuntimeError: If the strategy shards the weights.
            ValueError: If the adapters cannot be merged.
        """
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise RuntimeError(SHARDED)
        check_mergeable(pl_module.get_submodule("model"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Probe in the first process; the others go on."""
        if trainer.is_global_zero:
            self.run(pl_module.get_submodule("model"))

    def run(self, model: nn.Module) -> dict[str, Any]:
        """Probe a model, with or without a trainer, and write the result down."""
        self.result = self.measure(model)
        if self.folder is not None:
            note(self.folder / PROBES, self.name, self.result)
        return self.result

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """The result for a model, which must be left as it is."""
        raise NotImplementedError


def check_whole(model: nn.Module) -> None:
    """Refuse a model that no process holds whole.

    Raises:
        RuntimeError: If the weights are sharded over processes.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RuntimeError(SHARDED)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of the model without gradients, with its adapters merged: what somebody who is given the model holds.

    Raises:
        RuntimeError: If the weights are sharded over processes.
        ValueError: If the adapters cannot be merged, see `merging.check_mergeable`.
    """
    check_whole(model)
    copied: nn.Module = merged(copy.deepcopy(model))
    for parameter in copied.parameters():
        parameter.grad = None
    return copied
