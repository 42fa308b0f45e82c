"""How a checkpoint becomes a file and comes back: whole or not at all, and without running code."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_modules.files import replacing


class CheckpointFile(TorchCheckpointIO):
    """Lightning's plugin for checkpoint files: `L.Trainer(plugins=[CheckpointFile()])`.

    Lightning writes a checkpoint to the system's temporary folder and then moves it. Where that folder is on another
    disk, a process killed meanwhile leaves half a checkpoint in place of the last one. Here it is written beside its
    place, flushed to the disk and renamed. Loading never runs code (`torch.load(weights_only=True)`).

    A checkpoint holds weights as the optimizer knows them, its state and counters, which safetensors cannot; the model
    that a run leaves is safetensors.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint, or leave the former one whole.

        Raises:
            OSError: In one sentence with the path.
            TypeError: If there are storage options.
        """
        if storage_options is not None:
            raise TypeError("CheckpointFile: expected no storage_options, found some; it writes to a local folder")
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            watched: Any = _Watched(file)
            try:
                torch.save(checkpoint, watched)
            except RuntimeError as error:  # torch hides why it could not write
                raise watched.failed or error from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, _: storage,
        weights_only: bool | None = None,  # noqa: ARG002 (Lightning's signature; nothing else is ever done)
    ) -> dict[str, Any]:
        """Read a checkpoint of Lightning.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or no checkpoint of a training with Lightning.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected a checkpoint, found no file; start the training without it")
        try:
            found: Any = torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:  # whatever a damaged or malicious file makes of torch's reader
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"{file}: expected a whole checkpoint that holds tensors and numbers only, found another file, or half of one "
                f"({reason}); nothing in it was run: remove it to train from the start, or put a copy in its place"
            ) from error
        lacking = {"state_dict", "global_step", "loops"} - set(found if isinstance(found, dict) else ())
        if lacking:
            raise ValueError(
                f"{file}: expected a checkpoint of Lightning, found one without {', '.join(sorted(lacking))}; remove it to train from "
                "the start, or put a copy in its place"
            )
        return found


class _Watched:
    """A file that remembers why it could not be written."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file = file
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.failed = error
            raise
