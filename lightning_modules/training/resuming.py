"""What a checkpoint needs beside Lightning's own entries, so that a resumed run is the uninterrupted one bit for bit.

Lightning saves weights, optimizer, schedulers, callbacks and counters. It does not save random numbers (of dropout),
and a checkpoint in the middle of an accumulation window counts batches whose gradients it does not hold.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.evaluation.processes import every_process

_ENTRY = "gradsurgery_resuming"


class Resuming:
    """Kept by a module: it adds the random state to a checkpoint, and takes an unfinished window out of it.

    A checkpoint that is saved in the middle of an accumulation window becomes one of the window's start: weights and
    optimizer have not changed since, and the window is done again. So no gradient is saved. The model must have no
    buffer that forward passes change.

    The random states of torch's CPU and current CUDA generator and of Python's `random` are saved for every process.
    """

    def __init__(self) -> None:
        self._window: dict[str, Any] | None = None
        self._saved: dict[str, Any] | None = None

    def train_starts(self, module: L.LightningModule) -> None:
        """Restore random numbers where an epoch begins: before its loader draws from them."""
        self._window = None
        if self._saved is not None and not self._saved["inside_epoch"]:
            self._restore(module)

    def batch_starts(self, module: L.LightningModule) -> None:
        """Restore random numbers inside an epoch: after the loader drew. Remember where a window begins."""
        if self._saved is not None:
            self._restore(module)
        trainer = module.trainer
        if self._window is None or self._window["step"] != trainer.global_step or trainer.fit_loop.batch_idx == 0:
            batches = trainer.fit_loop.total_batch_idx  # of the whole training, those before this one
            self._window = {"step": trainer.global_step, "batches": batches, "random": random_state(module.device)}

    def save(self, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random state, and go back to the start of a window that is not finished.

        Every process calls it. A checkpoint of weights only stays as it is.
        """
        if "optimizer_states" not in checkpoint:
            return
        trainer, window = module.trainer, self._window
        state = random_state(module.device)
        fit = checkpoint["loops"]["fit_loop"]
        batches, epochs = fit["epoch_loop.batch_progress"], fit["epoch_progress"]["current"]
        over = batches["is_last_batch"] or epochs["processed"] > epochs["completed"]
        inside = not over and batches["current"]["ready"] > 0
        if window is not None and window["step"] == trainer.global_step:
            begun = batches["total"]["ready"] - window["batches"]
            if begun > 0:
                state, inside = window["random"], True
                _go_back(fit, begun)
        checkpoint[_ENTRY] = {"random": every_process(lambda: state), "inside_epoch": inside}

    def load(self, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the checkpoint's random state until training starts; `load_from_checkpoint` goes on with no training."""
        self._saved = None if getattr(module, "_trainer", None) is None else checkpoint.get(_ENTRY)
        if self._saved is not None and len(self._saved["random"]) != module.trainer.world_size:
            rank_zero_warn(
                f"the checkpoint was saved by {len(self._saved['random'])} processes and is resumed by {module.trainer.world_size}: "
                "random numbers, which dropout uses, start anew"
            )
            self._saved = None

    def _restore(self, module: L.LightningModule) -> None:
        if self._saved is not None:
            set_random_state(self._saved["random"][module.global_rank], module.device)
        self._saved = None


class ResumableModule(L.LightningModule):
    """A module whose resumed training is the uninterrupted one bit for bit, see `Resuming`.

    A module with hooks of its own calls those here, by `super()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resuming = Resuming()

    def on_train_start(self) -> None:
        """Go on from where a resumed training was."""
        self._resuming.train_starts(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002 (Lightning's signature)
        """Know where a resumed training has to go on."""
        self._resuming.batch_starts(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed training needs."""
        self._resuming.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what `on_save_checkpoint` added.

        Raises:
            ValueError: If the checkpoint is of another model.
        """
        refuse_other_model(self, checkpoint)
        self._resuming.load(self, checkpoint)


def refuse_other_model(module: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Raise ValueError in one sentence where torch would list every tensor of a checkpoint that does not fit."""
    found: Mapping[str, Any] = checkpoint.get("state_dict") or {}
    expected = module.state_dict()
    if not found or not module.strict_loading:
        return
    other = sorted({*expected} ^ {*found})
    shapes = [name for name, value in found.items() if _shape(value) != _shape(expected.get(name, value))]
    if other or shapes:
        what = f"{len(other)} names in one of them only" if other else "the same names"
        shown = [*other, *shapes][0]
        raise ValueError(
            f"expected a checkpoint of this model with its {len(expected)} entries, found one with {len(found)}, {what} and "
            f"{len(shapes)} tensors of other shapes, such as {shown}; resume with the model, adapters and losses that it was saved with"
        )


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)  # a dual variable's entry is a dictionary


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators of this process, in types that `torch.load(weights_only=True)` accepts."""
    state: dict[str, Any] = {"python": random.getstate(), "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo what was drawn since `random_state`. A state of another kind of device is left out."""
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _go_back(fit: dict[str, Any], begun: int) -> None:
    """Take the batches that have begun, of a window that is not finished, out of the state of Lightning's fit loop."""
    batches = fit["epoch_loop.batch_progress"]
    for scope in ("total", "current"):
        before = batches[scope]["ready"] - begun
        batches[scope].update(dict.fromkeys(batches[scope], before))
    batches["is_last_batch"] = False
    for loader in fit["state_dict"].get("combined_loader", []):
        if "batches" in loader:
            loader["batches"] = batches["current"]["ready"]
