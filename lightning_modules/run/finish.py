"""The finish of a run: after the forgetting, a short training on substitute answers."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import lightning as L
from rich.console import Console
from torch import nn

import gradsurgery as gs
from lightning_modules.data.examples import Example, read_examples
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.substitutes import other_answers
from lightning_modules.evaluation import processes
from lightning_modules.run.assembly import make_finishing_trainer, teacher
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.run import Run, Splits
from lightning_modules.training.callbacks import AnchorPull
from lightning_modules.training.finish import FinishSettings, finishing_module
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.noise import NoiseSettings
from lightning_modules.training.references import AdapterOff, Reference, SecondModel


def substitute_answers(options: UnlearnOptions, splits: Splits) -> list[Example]:
    """The forget questions with other answers: those of --substitutes, or of similar retain questions.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its answers are not those of the forget questions, or there is no question.
    """
    file = options.finish.substitutes
    given = None if file is None else read_examples(file)
    try:
        return list(chain(*other_answers(splits["forget"], splits["retain"], given)))
    except ValueError as error:
        if file is None:
            raise
        raise ValueError(f"--substitutes {file}: {error}") from error


def kept_start(model: nn.Module, options: UnlearnOptions) -> Reference:
    """How the finish knows the model before unlearning, to be called before it: its adapters off, or a copy."""
    start = AdapterOff() if options.training.adapters_start_at_zero else SecondModel(copy.deepcopy(model))
    start.prepare(model)
    return start


def finish(run: Run[UnlearnOptions], model: nn.Module, start: Reference, anchor: gs.LayerAnchor | None = None) -> None:
    """Train the model in place. The random numbers start anew, so that a resumed run finishes as any other.

    Args:
        run: With the options of the finish.
        model: That has forgotten.
        start: From `kept_start`.
        anchor: That held the layers in the forgetting, and does so here.
    """
    options = run.options
    callbacks = [] if anchor is None else [AnchorPull(anchor)]
    L.seed_everything(options.output.seed, verbose=False)
    module, data = finishing(options, run.splits, run.tokenizer, model, start)
    console = Console(stderr=True)
    make_finishing_trainer(options.training, options.finish.finish_steps, console, callbacks).fit(module, data)


def finishing(
    options: UnlearnOptions, splits: Splits, tokenizer: Any, model: nn.Module, start: Reference
) -> tuple[UnlearningModule, ForgetRetainDataModule]:
    """What trains in the finish, in training mode, and its data.

    Args:
        options: Resolved, with those of the finish.
        splits: With the forget and the retain set.
        tokenizer: Of the model.
        model: That has forgotten.
        start: How the finish knows the model before unlearning.
    """
    taught = options.method.teacher is not None
    data = ForgetRetainDataModule(
        splits["forget"] if taught else substitute_answers(options, splits),
        splits["retain"],
        tokenizer,
        batch_size=options.training.batch_size,
        seed=options.output.seed,
        max_length=options.data.max_length,
    )
    rate = processes.from_first(lambda: options.finish.finish_lr)  # half of one that it alone may have found
    settings = FinishSettings(lr=rate or FinishSettings.lr, max_norm=options.training.max_norm)
    module = finishing_module(
        model,
        start,
        settings,
        teacher=teacher(options.method, options.loading) if taught else None,
        noise=NoiseSettings(1.0) if options.method.retain_noise else None,
    )
    if options.training.padding_free:
        module.head.pack()
    return module.train(), data
