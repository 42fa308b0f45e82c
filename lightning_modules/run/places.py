"""Where a model is: a folder, a model on the hub, or a GGUF file in either."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

GGUF = ".gguf"


def is_gguf(name: str) -> bool:
    """Whether the name is that of a GGUF file, on the disk or on the hub (`owner/model/file.gguf`)."""
    return name.lower().endswith(GGUF)


def place_of(name: str) -> tuple[str, dict[str, Any]]:
    """What Transformers calls the place of a model, and what else it has to be told to find it there.

    Example:
        >>> place_of("owner/model"), place_of("owner/model/q8.gguf")
        (('owner/model', {}), ('owner/model', {'gguf_file': 'q8.gguf'}))
    """
    if not is_gguf(name):
        return name, {}
    folder, file = os.path.split(name)
    return folder or ".", {"gguf_file": file}


def is_log(reference: str) -> bool:
    """Whether a reference is given as a log of scores: a file, and no model in one."""
    return Path(reference).is_file() and not is_gguf(reference)
