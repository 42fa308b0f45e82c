"""What callbacks tell the report: entries of a JSON file in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_modules.folder import write_json


def note(path: Path, name: str, value: Mapping[str, Any]) -> None:
    """Set one entry of a JSON file and keep the others. A missing file or folder is created.

    Args:
        path: Of the file.
        name: Of the entry.
        value: Of the entry, for `folder.write_json`.

    Raises:
        ValueError: If the file exists and is not a JSON object.
    """
    entries: Any = {}
    if path.exists():
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: expected JSON that an earlier callback wrote, found something else: {error}"
            ) from error
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: expected a JSON object, found a {type(entries).__name__}; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**entries, name: value})
