"""Defaults that depend on the data: how many batches a step takes, how many passes are made, and the learning rate."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_modules.run.options.commands import UnlearnOptions
from lightning_modules.run.options.flat import AUTO
from lightning_modules.run.options.training import TrainingOptions

LEAST_STEPS, LEAST_STEPS_KEEPING = 40, 80
"""Optimizer steps that a run may take at least, if nobody says how many: twice what SmolLM2 needed for 40 answers. With
--keep-asked-words, where there is less to forget in each answer and smaller steps keep more."""
LEAST_BETWEEN, POINTS = 4, 25
"""Optimizer steps between two scores at least, and about how many scores a run has."""
LEAST_EPOCHS, LARGEST_ACCUMULATE, STEPS_AN_EPOCH = 5, 4, 10


def fitted(options: UnlearnOptions, examples: int) -> UnlearnOptions:
    """A copy in which the options that nobody gave suit this number of forget examples.

    With TOFU's 400 and --recipe paper they are those of the papers: 5 epochs of steps of 4 batches. Few examples would
    make few such steps, and the last of them, not the target, would end the run. So they make steps of fewer batches,
    as long as an epoch has fewer than 10 of them, and more epochs, until there are 40 steps, or 80 with
    --keep-asked-words.

    | forget examples | batches a step | epochs | steps | with --keep-asked-words: epochs | steps |
    |---|---|---|---|---|---|
    | 20 | 1 | 14 | 42 | 27 | 81 |
    | 40 | 1 | 8 | 40 | 16 | 80 |
    | 200 | 2 | 5 | 65 | 7 | 91 |
    | 400 | 4 | 5 | 65 | 7 | 91 |

    The learning rate becomes "auto", except where the model is sharded (trial steps need the whole of it) or imitates a
    teacher, which leads to no lower probability than the teacher's: then such a run has no target of 0.05. The model
    from scratch and ULD have defaults of their own, which stay (`UnlearnOptions.resolved`).

    Args:
        options: Not resolved yet.
        examples: To be forgotten.
    """
    training = options.training
    if options.model.scratch or options.method.method == "uld":
        return options
    batches = _batches(training, examples)
    accumulate = training.accumulate or max(1, min(LARGEST_ACCUMULATE, batches // STEPS_AN_EPOCH))
    epochs = training.epochs
    if epochs is None and training.steps is None:
        least = LEAST_STEPS_KEEPING if options.method.keep_asked_words else LEAST_STEPS
        epochs = max(LEAST_EPOCHS, math.ceil(least / math.ceil(batches / accumulate)))
    searched = training.lr is None and not (training.sharded or options.method.imitates)
    rate = AUTO if searched else training.lr
    fit = replace(training, accumulate=accumulate, epochs=epochs, lr=rate)
    if fit.score_every is None:  # scoring 64 + 64 examples takes as long as a step or two
        fit = replace(fit, score_every=max(LEAST_BETWEEN, most_steps(fit, examples) // POINTS))
    known = options.evaluation.reference is not None or options.first.finetune_first
    if options.method.imitates and fit.stop_below is None and not known:
        fit = replace(fit, stop_below=0.0)
    return replace(options, training=fit)


def chosen(given: UnlearnOptions, resolved: UnlearnOptions) -> tuple[str, ...]:
    """The options that nobody gave and that have a value of their own now.

    Args:
        given: As they came from the command line.
        resolved: The same, fitted and resolved. The learning rate of the finish may follow later.
    """
    now = resolved.flat()
    later = "finish_lr" if resolved.finish.finish_steps else ""
    names = (name for name, value in given.flat().items() if value is None)
    return tuple(name for name in names if now[name] is not None or name == later)


def most_steps(training: TrainingOptions, examples: int) -> int:
    """The optimizer steps that a run takes where nothing stops it.

    Args:
        training: Resolved.
        examples: To be forgotten.
    """
    if training.steps is not None:
        return training.steps
    # The last step of an epoch may have fewer batches, and its last batch fewer examples.
    return (training.epochs or 1) * math.ceil(_batches(training, examples) / (training.accumulate or 1))


def _batches(training: TrainingOptions, examples: int) -> int:
    """Batches that each process has in an epoch."""
    return math.ceil(examples / (training.batch_size * training.processes))
