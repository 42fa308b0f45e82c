"""The command `finetune`: a causal language model is taught a set of examples, and what it learned is measured."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from lightning_modules.data.examples import Example, evenly_spaced, read_examples
from lightning_modules.data.pairs import VALIDATION_EXAMPLES
from lightning_modules.data.tofu import ROWS_PER_AUTHOR, tofu_split
from lightning_modules.data.tokenization import encode, padding_id
from lightning_modules.evaluation.likelihood import on_gpu
from lightning_modules.folder import METRICS, claim, versions, write_config, write_json
from lightning_modules.run.assembly import make_trainer, merged
from lightning_modules.run.loading import load_pretrained
from lightning_modules.run.options.finetune import FinetuneOptions, TaughtOptions
from lightning_modules.training.adapters import with_adapters
from lightning_modules.training.finetuning import FinetuningDataModule, FinetuningModule
from lightning_modules.training.probability import mean_probabilities

MEMORISED = 0.5
"""A mean answer probability below this is said at the end: a model that has learned so little has little to forget."""


def finetune(options: FinetuneOptions) -> Path:
    """Teach a model, and leave it with its tokenizer and the mean probability of the answers in the output folder.

    Returns:
        The output folder; the model is in `model/`.

    Raises:
        ValueError: If the options contradict each other or the data is not usable.
        FileNotFoundError: If a file or model is missing.
        FileExistsError: If the output folder holds a run.
    """
    options.check()
    options = options.resolved()
    folder, seed, training = options.output.folder, options.output.seed, options.training
    rows = read_taught(options.taught)
    claim(folder)
    L.seed_everything(seed, verbose=False)
    model, tokenizer = load_pretrained(str(options.taught.model))
    encoded = [encode(tokenizer, row["question"], row["answer"], options.taught.max_length) for row in rows]
    scored = {"taught": evenly_spaced(encoded, VALIDATION_EXAMPLES)}
    model = with_adapters(model, rank=training.lora_rank, seed=seed)
    module = FinetuningModule(model, options.settings()).train()
    data = FinetuningDataModule(encoded, padding_id(tokenizer), batch_size=training.batch_size, seed=seed)
    console = Console(stderr=True)
    trainer = make_trainer(folder, training, [], console, gradient_clip_val=training.max_norm)
    write_config(folder, "finetune", options.recorded())

    def probability(net: Any) -> float:
        with on_gpu(net):
            return mean_probabilities(net, scored, pad_token_id=padding_id(tokenizer))["taught"]

    before, started = probability(model), time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - started
    taught = merged(module.model)
    taught.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    after = probability(taught)
    found = {"before": before, "after": after, "examples": len(rows), "seconds": round(seconds, 2)}
    write_json(folder / METRICS, {"taught": found, "seed": seed, "versions": versions()})
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    Console().print(f"Mean probability of the taught answers: {before:.3f} before, {after:.3f} after")
    if not after >= MEMORISED:
        Console().print(
            f"The answers are not memorised: expected a probability above {MEMORISED}; raise --lr or --epochs"
        )
    Console().print(f"The model is in [bold]{folder / 'model'}[/bold]")
    return folder


def read_taught(taught: TaughtOptions) -> list[Example]:
    """The examples that the options name.

    Raises:
        ValueError: If TOFU's file has fewer authors.
        FileNotFoundError: If there is no such file.
    """
    if taught.data is not None:
        return read_examples(taught.data)
    rows = tofu_split(str(taught.tofu), taught.tofu_dir)
    wanted = len(rows) if taught.authors is None else taught.authors * ROWS_PER_AUTHOR
    if wanted > len(rows):
        raise ValueError(
            f"--authors: expected at most {len(rows) // ROWS_PER_AUTHOR}, which {taught.tofu} has, found {taught.authors}"
        )
    return rows[:wanted]
