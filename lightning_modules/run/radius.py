"""--radius auto: the radius is measured once, on the model before unlearning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_modules.data.examples import Example
from lightning_modules.data.tokenization import encode_example, padding_id
from lightning_modules.evaluation.likelihood import on_gpu
from lightning_modules.folder import TRAINING
from lightning_modules.run.options import AUTO, UnlearnOptions
from lightning_modules.run.run import Run
from lightning_modules.run.show import say
from lightning_modules.training.auto_radius import RadiusSearch, measured_radius
from lightning_modules.training.callbacks.notes import note


def with_radius(run: Run[UnlearnOptions], model: nn.Module) -> Run[UnlearnOptions]:
    """The run with the measured radius in the place of "auto"; any other run as it is.

    Args:
        run: Its config.yaml is not written yet. One that is resumed reads the measured radius there.
        model: Before unlearning, with the adapters that are trained.

    Raises:
        ValueError: If it cannot be measured, see `measured_radius`.
    """
    if run.options.method.radius != AUTO:
        return run
    return replace(
        run, options=run.options.but(radius=measure(run.options, model, run.tokenizer, run.splits["forget"]))
    )


def search_settings(options: UnlearnOptions) -> RadiusSearch:
    """How a run with these options searches its radius: each process alone, on the batches of all of them."""
    training, processes = options.training, options.training.processes
    return RadiusSearch(batch_size=training.batch_size * processes, parts=processes, scale=options.method.radius_scale)


def measure(options: UnlearnOptions, model: nn.Module, tokenizer: Any, forget: Sequence[Example]) -> dict[str, float]:
    """The radius that "auto" stands for, which is said too.

    Args:
        options: Of the run.
        model: Before unlearning, with the adapters that are trained.
        tokenizer: Its tokenizer.
        forget: The forget examples.

    Raises:
        ValueError: If it cannot be measured, see `measured_radius`.
    """
    encoded = [encode_example(tokenizer, row, options.data.max_length) for row in forget]
    search = search_settings(options)
    with on_gpu(model):
        found = measured_radius(model, encoded, pad_token_id=padding_id(tokenizer), settings=search)
    say(f"--radius auto: measured {found['start']:g}, growing to {found['end']:g}")
    return found


def write_radius(run: Run[UnlearnOptions], measured: Run[UnlearnOptions]) -> None:
    """Write into training.json that the radius was measured, so that `--resume --radius auto` means this one.

    Args:
        run: As it was started.
        measured: From `with_radius`.
    """
    found = measured.options.method.radius
    if run.options.method.radius == AUTO and isinstance(found, dict):
        note(run.folder / TRAINING, "radius", found)
