"""Rows of a CSV file that grows while a run goes on, without holes, doubles or half a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
