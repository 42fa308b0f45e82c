"""What a user plugs into the training of a run: Lightning's loggers by name, and callbacks of any class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from lightning_modules.folder import LOGS
from lightning_modules.run.options import TrainingOptions

_PACKAGES = {"csv": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_plugins(training: TrainingOptions) -> None:
    """Refuse a logger whose package is not installed, and callbacks that cannot be made. It makes none.

    Raises:
        ValueError: If there is such a one.
    """
    packages = _PACKAGES.get(training.logger or "csv", ())
    if packages and not any(map(find_spec, packages)):
        raise ValueError(
            f"--logger {training.logger}: expected the package {packages[0]}, found it not installed; pip install {packages[0]}, or "
            "--logger csv, which needs none"
        )
    _parsed(training.callbacks)


def make_loggers(training: TrainingOptions, folder: Path) -> list[Logger]:
    """The loggers that the options name, which write into `logs/` of the run's folder; Weights & Biases also elsewhere.

    A run that is resumed gets a log of its own beside the first one, `version_1`.
    """
    target = folder / LOGS
    if training.logger == "csv":
        return [CSVLogger(target, name="csv")]
    if training.logger == "tensorboard":
        return [TensorBoardLogger(target, name="tensorboard")]
    if training.logger == "wandb":
        target.mkdir(parents=True, exist_ok=True)
        return [WandbLogger(save_dir=target, name=folder.name)]
    return []


def make_callbacks(training: TrainingOptions) -> list[Callback]:
    """The callbacks that the options name, in order.

    Nothing is imported or called but the classes that they name, and those that their arguments name.
    """
    parser, parsed = _parsed(training.callbacks)
    return list(parser.instantiate(parsed).callbacks or ())


def scores_to_log(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The scores in metrics.json under the names that they have in a log, such as after/forget/probability."""
    found = {
        f"{model}/{split}/{name}": value
        for model in ("before", "after", "reference")
        for split, scores in (metrics[model] or {}).items()
        for name, value in scores.items()
    }
    found |= {
        f"{model}/benchmarks/{name}": scores[model]
        for name, scores in metrics.get("benchmarks", {}).items()
        for model in ("before", "after", "reference")
    }
    found |= {f"forget_quality/{name}": value for name, value in (metrics["forget_quality"] or {}).items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _parsed(callbacks: Sequence[Mapping[str, Any]]) -> tuple[ArgumentParser, Any]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    try:
        return parser, parser.parse_object({"callbacks": [dict(entry) for entry in callbacks]})
    except (ArgumentError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            "--callbacks: expected a list of {class_path: ..., init_args: {...}} of Lightning callbacks, found: " + said
        ) from error
