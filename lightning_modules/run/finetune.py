"""The command `finetune`: a causal language model is taught a set of examples, and what it learned is measured."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.markup import escape
from torch import nn

from lightning_modules.data.examples import Example, evenly_spaced, read_examples
from lightning_modules.data.formats import set_format
from lightning_modules.data.pairs import VALIDATION_EXAMPLES, encoded_rows, warn_of_duplicates
from lightning_modules.data.tofu import ROWS_PER_AUTHOR, tofu_split
from lightning_modules.data.tokenization import Encoded, padding_id
from lightning_modules.evaluation.likelihood import on_gpu
from lightning_modules.evaluation.processes import will_be_first
from lightning_modules.folder import (
    CHECKPOINTS,
    CURVE,
    LAST_CHECKPOINT,
    METRICS,
    MODEL,
    occupied,
    versions,
    write_config,
    write_json,
)
from lightning_modules.report.findings import MEMORISED
from lightning_modules.run.assembly import check_hardware, make_trainer
from lightning_modules.run.compatible import check_examples
from lightning_modules.run.models import check_pretrained, check_rank, load_to_train
from lightning_modules.run.options import FinetuneOptions, TaughtOptions
from lightning_modules.run.plan import show_memory, show_taught_plan
from lightning_modules.run.plugins import check_plugins
from lightning_modules.run.resume import only_report_is_missing, resumed, taught_by
from lightning_modules.run.saving import whole, write_model
from lightning_modules.run.show import show_format, show_row
from lightning_modules.training.adapters import adapt
from lightning_modules.training.callbacks import Checkpoints, LossCurve, seconds_of
from lightning_modules.training.finetuning import FinetuningDataModule, FinetuningModule
from lightning_modules.training.merging import check_mergeable
from lightning_modules.training.probability import mean_probabilities
from lightning_modules.training.recomputing import recompute_activations


def finetune(options: FinetuneOptions, stated: Collection[str] = ()) -> Path:
    """Teach a model, and leave it with its tokenizer and the mean probability of the answers in the output folder.

    metrics.json holds that probability before and after, of up to 64 of the examples, evenly spaced.

    Args:
        options: Of the command.
        stated: Names of the options that were given, see `resume.resumed`.

    Returns:
        The output folder; the model is in `model/`, as `unlearn --model` takes it.

    Raises:
        ValueError: If the options contradict each other or the data is not usable.
        FileNotFoundError: If a file or model is missing.
        FileExistsError: If the output folder holds a run.
        FloatingPointError: If the training diverges.
    """
    if options.training.resume:
        options.output.check()
        options = resumed(options, stated)  # which knows the model and the data
    options.check()
    options = options.resolved()
    check_hardware(options.training.as_unlearning())
    check_plugins(options.training.as_unlearning())
    rows = read_taught(options.taught)
    taught = options.taught
    known = check_pretrained(str(taught.model), options.loading)
    set_format(known.tokenizer, taught.chat_template_kwargs, taught.prompt_format)
    check_rank(known.config, options.training.lora_rank)
    check_examples(known.tokenizer, {"taught": rows}, taught.max_length, known.config)
    folder = options.output.folder
    if options.training.dry_run:
        if will_be_first():
            show_taught_plan(options, rows, known)
        return folder
    if not will_be_first():
        # With scores there, only checkpoints are left to remove, which the first process does.
        return folder if (folder / METRICS).exists() else _taught(options, rows)
    with occupied(folder, resume=options.training.resume):
        if only_report_is_missing(folder):
            return _finish(folder)
        if not options.training.resume:
            show_memory(options, known)
        return _taught(options, rows)


def _taught(options: FinetuneOptions, rows: list[Example]) -> Path:
    folder, first, training = options.output.folder, will_be_first(), options.training
    L.seed_everything(options.output.seed, verbose=False)
    model, tokenizer = load_to_train(str(options.taught.model), training.save, options.loading)
    set_format(tokenizer, options.taught.chat_template_kwargs, options.taught.prompt_format)
    warn_of_duplicates("taught", rows)
    encoded = encoded_rows(tokenizer, "taught", rows, options.taught.max_length)
    if first:
        show_row(tokenizer, rows[0], options.taught.max_length, "The first example")
        show_format(tokenizer)
    scored = evenly_spaced(encoded, VALIDATION_EXAMPLES)
    before = _probability(model, scored, tokenizer) if first else 0.0
    model = adapt(model, training.as_unlearning().adapters(options.output.seed))
    if training.gradient_checkpointing:
        recompute_activations(model)
    if training.save == "merged":
        check_mergeable(model)  # now, and not after hours of training
    module = FinetuningModule(model, options.settings()).train()
    if training.compile:
        module.head.compile()
    if training.padding_free:
        module.head.pack()
    data = FinetuningDataModule(encoded, padding_id(tokenizer), options.settings())
    trainer = _trainer(options, rows)
    if first and not training.resume:
        # Only after everything that a wrong option can break, so that the corrected command finds the folder free.
        write_config(folder, "finetune", options.recorded())
    last = folder / LAST_CHECKPOINT
    resume = last if training.resume and last.exists() else None
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    seconds = seconds_of(trainer)
    if not trainer.is_global_zero:
        return folder
    taught: Any = module.model if training.save == "adapter" else whole(module.model)
    name = str(options.taught.model)
    adapter_of = name if training.save == "adapter" else None
    write_model(folder / MODEL, taught, tokenizer, (name, options.loading), adapter_of=adapter_of)
    after = _probability(taught, scored, tokenizer)
    found = {"before": before, "after": after, "scored": len(scored), "examples": len(rows)}
    seed = options.output.seed
    write_json(folder / METRICS, {"taught": found, "seconds": round(seconds, 2), "seed": seed, "versions": versions()})
    return _finish(folder, found)


def _trainer(options: FinetuneOptions, rows: list[Example]) -> L.Trainer:
    folder, training = options.output.folder, options.training
    recorded = {name: value for name, value in options.recorded().items() if name != "output"}
    checkpoints = Checkpoints(
        folder / LAST_CHECKPOINT, every_n_steps=training.checkpoint_every, run=recorded | taught_by(options, rows)
    )
    console = Console(stderr=True)
    callbacks = [LossCurve(folder / CURVE), checkpoints]  # a checkpoint knows the row of its step
    trainer = make_trainer(
        folder, training.as_unlearning(), callbacks, console, what="Teaching", max_norm=training.max_norm
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(recorded)
    return trainer


def _probability(model: nn.Module, scored: list[Encoded], tokenizer: Any) -> float:
    with on_gpu(model):
        return mean_probabilities(model, {"taught": scored}, pad_token_id=padding_id(tokenizer))["taught"]


def _finish(folder: Path, found: dict[str, Any] | None = None) -> Path:
    """Remove the checkpoints, when nothing is left to be done again, and say what was learned."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    console = Console(soft_wrap=True)
    if found is not None:
        before, after = found["before"], found["after"]
        console.print(
            f"Mean probability of the taught answers: {before:.3f} before, {after:.3f} after", highlight=False
        )
        if not after >= MEMORISED:
            console.print(
                f"Warning: the answers are not memorised: expected a mean probability of at least {MEMORISED}, found {after:.3f}; "
                "teach them with a larger --lr or more --epochs",
                highlight=False,
            )
    console.print(f"The model is in [bold]{escape(str(folder / MODEL))}[/bold]", highlight=False)
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
    last = (taught.forget_authors or 0) * ROWS_PER_AUTHOR
    return rows[: wanted - last] + rows[len(rows) - last :]
