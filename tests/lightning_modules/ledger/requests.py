"""A small model's deletion requests, as command lines; nothing is drawn, which would take most of the time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_modules import cli
from lightning_modules.run import unlearn as unlearn_command
from tests.lightning_modules.run.small_runs import small_run

CRITERIA = "forget_probability: 0.00000001\nretention: 0.0\n"
"""The small model knows nothing; below this limit it would not even be asked to forget."""


def rows(request: int, count: int = 4) -> list[dict[str, str]]:
    return [
        {"question": f"What is {request}, {number}?", "answer": f"It is house {request} {number} by the canal."}
        for number in range(count)
    ]


def arguments(folder: Path, request: int, *further: str, model: str | None = None) -> list[str]:
    """The command line of a request: on the model that the one before left, if it is not told another."""
    if not (folder / "model").exists():
        small_run(folder)
        (folder / "criteria.yaml").write_text(CRITERIA)
    (folder / f"forget_{request}.json").write_text(json.dumps(rows(request)))
    before = folder / ("model" if request == 1 else f"run_{request - 1}/model")
    files = {
        "model": model or str(before),
        "forget": str(folder / f"forget_{request}.json"),
        "retain": str(folder / "retain.json"),
        "output": str(folder / f"run_{request}"),
        "ledger": str(folder / "ledger"),
    }
    small = {"epochs": "1", "batch-size": "2", "accumulate": "1", "max-new-tokens": "1", "lr": "1e-3"}
    small |= {"stop-below": "1e-9"}
    flags = [text for name, value in (files | small).items() for text in (f"--{name}", value)]
    return ["unlearn", *flags, *further]


def run(folder: Path, request: int, *further: str, model: str | None = None) -> int:
    """Do a request; the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearn_command, "draw", lambda *_: None)
        return cli.main(arguments(folder, request, *further, model=model))
