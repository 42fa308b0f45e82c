"""What the commands can be told: groups of options, each for one part of a run, and one flat table on the command line.

Strings end here: the groups' methods turn names into functions, and `UnlearnOptions.resolved` "it depends" into values.
"""

from __future__ import annotations

from lightning_modules.run.options.commands import EvaluateOptions, Options, UnlearnOptions
from lightning_modules.run.options.data import (
    DataOptions,
    EvaluateOutputOptions,
    EvaluationOptions,
    ModelOptions,
    OutputOptions,
    TOFUSplit,
)
from lightning_modules.run.options.finetune import FinetuneOptions, FinetuneTrainingOptions, FirstOptions, TaughtOptions
from lightning_modules.run.options.finish import FinishOptions
from lightning_modules.run.options.fitted import chosen, fitted, most_steps
from lightning_modules.run.options.flat import AUTO
from lightning_modules.run.options.ledger import LedgerOptions, LedgerVerifyOptions
from lightning_modules.run.options.ledger_plan import LedgerPlanOptions
from lightning_modules.run.options.loading import LoadingOptions
from lightning_modules.run.options.method import MethodOptions
from lightning_modules.run.options.recipes import RECIPES, RecipeOptions
from lightning_modules.run.options.training import TrainingOptions

__all__ = [
    "AUTO",
    "RECIPES",
    "DataOptions",
    "EvaluateOptions",
    "EvaluateOutputOptions",
    "EvaluationOptions",
    "FinetuneOptions",
    "FinetuneTrainingOptions",
    "FinishOptions",
    "FirstOptions",
    "LedgerOptions",
    "LedgerPlanOptions",
    "LedgerVerifyOptions",
    "LoadingOptions",
    "MethodOptions",
    "ModelOptions",
    "Options",
    "OutputOptions",
    "RecipeOptions",
    "TOFUSplit",
    "TaughtOptions",
    "TrainingOptions",
    "UnlearnOptions",
    "chosen",
    "fitted",
    "most_steps",
]
