"""A model of a few thousand weights and a few examples on the disk: the whole command in a second or two."""

from __future__ import annotations

import json
from pathlib import Path

from tests.lightning_modules.evaluation.evaluation_workers import SPLITS, model_and_tokenizer


def small_run(folder: Path, *further: str) -> list[str]:
    """Arguments of `gradsurgery unlearn`; the files that they name are written into the folder."""
    model, tokenizer = model_and_tokenizer()
    for name in ("model", "reference"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("forget", "retain"):
        rows = [{**row, "paraphrased_answer": f"Surely {row['answer']}"} for row in SPLITS[name]]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    files = {name: str(folder / f"{name}.json") for name in ("forget", "retain")} | {"model": str(folder / "model")}
    small = {"epochs": "2", "batch-size": "2", "accumulate": "1", "max-new-tokens": "2", "lr": "1e-3"}
    flags = [text for name, value in (files | small).items() for text in (f"--{name}", value)]
    return ["unlearn", *flags, "--output", str(folder / "run"), *further]
