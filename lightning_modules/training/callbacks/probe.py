"""What the two probes share: when they run, and where the result goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_modules.folder import PROBES
from lightning_modules.training.callbacks.notes import note


class Probe(Callback):
    """Measures something of the trained model at the end of training, in one process.

    Args:
        folder: The run's folder, to write the result as `name` of `probes.json` for the report; None writes nothing.

    Attributes:
        name: Of the result in `probes.json`.
        result: What `measure` returned; None before the end.
    """

    name = ""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.result: dict[str, Any] | None = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Probe, in one process."""
        if trainer.is_global_zero:
            self.run(pl_module.get_submodule("model"))

    def run(self, model: nn.Module) -> dict[str, Any]:
        """Probe a model, without a trainer too, and write the result down."""
        self.result = self.measure(model)
        if self.folder is not None:
            note(self.folder / PROBES, self.name, self.result)
        return self.result

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """The result for a model, which is left as it is."""
        raise NotImplementedError
