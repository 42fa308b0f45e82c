"""Rows of a CSV file that grows while a run goes on, without holes, doubles or half a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules.files import append_text, write_text


class GrowingRows:
    """A CSV file to which rows are added.

    The first write starts the file anew; every further one adds whole lines. A run that is resumed starts it anew with
    the rows that its checkpoint knows, so that those of steps that are done again do not stand there twice.

    Args:
        path: Of the file.

    Attributes:
        written: The number of rows in the file.
        begun: Whether the file is this run's; before, it may be that of the run that is to be resumed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.written = 0
        self.begun = False

    def restart(self) -> None:
        """Remove the file: the next write starts it anew."""
        self.written, self.begun = 0, True
        self.path.unlink(missing_ok=True)

    def write(self, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows.

        Args:
            columns: Names, in order, the same every time.
            rows: With these columns.

        Raises:
            OSError: In one sentence with the path, if the disk is full or cannot be written.
        """
        if not rows:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        if not self.written:
            writer.writeheader()
        writer.writerows(rows)
        if self.written:
            append_text(self.path, text.getvalue())
        else:
            write_text(self.path, text.getvalue())
        self.written += len(rows)


class StepRows(Callback):
    """A callback that keeps rows of numbers, one for a step, and writes them to a file that grows.

    A run that is resumed goes on with the rows of its checkpoint.

    Args:
        path: Of the file. Training starts it anew, and it grows every `flush_every` steps. None writes no file.
        flush_every: Steps between writes.

    Attributes:
        rows: So far; each has its `step`, the number of optimizer steps that came before it.
    """

    def __init__(self, path: str | Path | None = None, flush_every: int = 1) -> None:
        self.path, self.flush_every = None if path is None else Path(path), flush_every
        self.rows: list[dict[str, float]] = []
        self._file = None if path is None else GrowingRows(path)

    def add(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        """Keep the row of the step that was just taken."""
        self.rows.append(row)
        if len(self.rows) % self.flush_every == 0:
            self._write(trainer)

    def counted(self, step: int) -> bool:
        """Whether there is a row of this step already, or no step was taken yet."""
        return step == 0 or bool(self.rows and self.rows[-1]["step"] >= step)

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start the file anew, with the rows of the checkpoint that is resumed."""
        if trainer.is_global_zero and self._file is not None:
            self._file.restart()
            self._write(trainer)

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Drop the rows of an earlier fit by another trainer: this one's steps begin at 0 again."""
        step = trainer.global_step
        kept = [row for row in self.rows if row["step"] <= step] if step else []
        if len(kept) == len(self.rows):
            return
        self.rows = kept
        if self._file is not None and trainer.is_global_zero:
            self._file.restart()
            self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write what is left."""
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        """Write the steps that led to the exception."""
        with suppress(OSError):  # a full disk would hide the exception
            if self._file is not None and self._file.begun:
                self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write the rows of a run that is resumed after its last step: there is no `on_train_end` then."""
        self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, so that a resumed run goes on with them."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows."""
        self.rows = list(state_dict["rows"])

    def _write(self, trainer: L.Trainer) -> None:
        if self._file is not None and trainer.is_global_zero and self.rows:
            self._file.write(list(self.rows[0]), self.rows[self._file.written :])


def of_all(loss: Tensor, trainer: L.Trainer) -> float:
    """The mean over the processes: each divides by the mean count of tokens, so it is that over all tokens."""
    if trainer.world_size > 1:
        loss = cast("Tensor", trainer.strategy.reduce(loss.clone(), reduce_op="mean"))  # in place: others read it too
    return float(loss)
