"""What a run leaves behind while it trains: the record of every step, and forgetting against retention over the steps."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_modules.likelihood import answer_nll
from lightning_modules.module import UnlearningModule
from lightning_modules.tokenization import Encoded


class SurgeryLogger(Callback):
    """One row of a CSV file for every optimizer step, from its `gradsurgery.Record`.

    Columns: step, loss_<objective>, norm_<objective>, update_norm, cosine (of the first two rows), coefficient_<objective>, conflict,
    predicted_change_<objective> (per unit of learning rate), and with a guard actual_change_<protected objective>. With several blocks
    norms are over all of them, and cosine and coefficients are means; an elementwise rule has no coefficients. Losses are those of the step's last batch on this process.

    Args:
        path: The file; it is written anew at the start and every `flush_every` steps.
        flush_every: Steps between writes.
    """

    def __init__(self, path: str | Path, flush_every: int = 20) -> None:
        self.path, self.flush_every = Path(path), flush_every
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Add a row if this batch ended with a step."""
        step = trainer.global_step
        if not isinstance(pl_module, UnlearningModule) or (self.rows and self.rows[-1]["step"] >= step) or step == 0:
            return
        record = pl_module.surgery.record
        if record is None or not record.applied:
            return  # a GradScaler skipped it
        names, gram = record.objectives, record.gram if record.blocks is None else record.gram.sum(0)
        coefficients = record.coefficients  # None: the rule is elementwise
        if coefficients is not None and record.blocks is not None:
            coefficients = coefficients.mean(0)
        row: dict[str, float] = {"step": step}
        row |= {f"loss_{name}": float(pl_module.losses[name]) for name in names}
        row |= {f"norm_{name}": value for name, value in zip(names, gram.diagonal().sqrt().tolist(), strict=True)}
        row |= {"update_norm": float(record.update_norm), "cosine": float(record.cosines[..., 0, 1].mean())}
        if coefficients is not None:
            row |= {f"coefficient_{name}": value for name, value in zip(names, coefficients.tolist(), strict=True)}
        row["conflict"] = float(record.conflict)
        row |= {f"predicted_change_{n}": v for n, v in zip(names, record.predicted_change.tolist(), strict=True)}
        if record.actual_change is not None:
            row |= {f"actual_change_{n}": v for n, v in zip(names[1:], record.actual_change.tolist(), strict=True)}
        self.rows.append(row)
        if len(self.rows) % self.flush_every == 0:
            self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002 (Lightning's signature)
        """Write what is left."""
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:  # noqa: ARG002 (so)
        """Write what led there."""
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The rows, so that a resumed run goes on where the checkpoint was made."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows."""
        self.rows = list(state_dict["rows"])

    def _write(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero or not self.rows:
            return
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


class TradeoffCurve(Callback):
    """Mean answer probability on forget and retain examples while training, and a stop once enough is forgotten.

    Args:
        encoded: Split -> tokenized examples to score.
        pad_token_id: Of the tokenizer.
        every_n_steps: Optimizer steps between scores; the start and the end are scored too.
        stop_below: Stop training when the probability of the split "forget" falls below this.
        batch_size: Examples a forward pass.
    """

    def __init__(
        self,
        encoded: Mapping[str, Sequence[Encoded]],
        *,
        pad_token_id: int,
        every_n_steps: int,
        stop_below: float | None = None,
        batch_size: int = 32,
    ) -> None:
        self.encoded = dict(encoded)
        self.pad_token_id, self.every_n_steps = pad_token_id, every_n_steps
        self.stop_below, self.batch_size = stop_below, batch_size
        self.points: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the start; a resumed run may have forgotten enough already."""
        self._score(trainer, pl_module)
        self._stop(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Score every so many steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._score(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the end."""
        self._score(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The points so far."""
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the points."""
        self.points = list(state_dict["points"])

    def _score(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if self.points and self.points[-1]["step"] >= step:
            return
        model = pl_module.get_submodule("model")
        point: dict[str, float] = {"step": step}
        for split, encoded in self.encoded.items():
            nll = answer_nll(model, encoded, pad_token_id=self.pad_token_id, batch_size=self.batch_size)
            point[split] = float(torch.exp(-nll).mean())
        self.points.append(point)
        self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        if self.stop_below is not None and self.points[-1].get("forget", 1.0) < self.stop_below:
            trainer.should_stop = True
