"""Numbers of published evaluation logs; README.md beside this file says whose they are and what was taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOGS = ("tiny.json", "tofu_llama2-7b_full.json", "tofu_llama2-7b_retain90.json")


def published(name: str) -> dict[str, Any]:
    """The numbers of one file."""
    return json.loads((Path(__file__).parent / name).read_text())
