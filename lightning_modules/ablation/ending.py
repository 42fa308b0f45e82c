"""What a method does after its training: the finish with substitute answers, or UNDO's distillation."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
from torch import nn

from lightning_modules.ablation.grid import Run
from lightning_modules.ablation.stale import training_data
from lightning_modules.run.finish import finishing
from lightning_modules.training.references import SecondModel
from lightning_modules.training.trainer import trainer_options
from lightning_modules.training.undo import undo_settings, undoing_module


class Cost(NamedTuple):
    """What the end of a method took: seconds, and backward passes of a batch."""

    seconds: float = 0.0
    backward_passes: int = 0


def ended(run: Run, model: nn.Module, before: Any, tokenizer: Any, hardware: Callable[..., dict[str, Any]]) -> Cost:
    """Do what comes after the training, in place; nothing for most methods.

    Args:
        run: Of the method.
        model: That has forgotten, its adapters merged.
        before: State of the start model.
        tokenizer: Of both.
        hardware: Number of steps -> arguments of a Trainer.
    """
    method, options = run.method, run.options()
    if not method.finish_steps and not method.undo:
        return Cost()
    started = time.perf_counter()
    L.seed_everything(options.output.seed, verbose=False)
    data = training_data(run, tokenizer)
    if method.undo:
        settings = undo_settings(method.undo)
        module, steps = undoing_module(model, settings), settings.steps
    else:
        start = copy.deepcopy(model)
        start.load_state_dict(before)
        module, data = finishing(options.resolved(), data.read(), tokenizer, model, SecondModel(start))
        steps = method.finish_steps
    L.Trainer(**trainer_options(**hardware(steps))).fit(module.train(), data)
    noised = method.finish_steps > 0 and method.retain_noise != 0.0
    return Cost(time.perf_counter() - started, (2 + noised) * steps)
