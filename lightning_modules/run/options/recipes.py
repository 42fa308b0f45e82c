"""Recipes: options that belong together, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_modules.run.options.data import ModelOptions
from lightning_modules.run.options.flat import one_of
from lightning_modules.run.options.shared import FSDP2

_BALANCED: dict[str, Any] = {"ema_decay": 0.7, "retain_weight": 200.0, "guard": "update"}
_BALANCED_OTHER: dict[str, Any] = {"retain_weight": 50.0}
_DEEP: dict[str, Any] = {
    "ema_decay": 0.7,
    "retain_weight": 20.0,
    "guard": "update",
    "lr_schedule": "linear",
    "accumulate": 1,
    "stop_below": 0.0,
    "score_every": 4,
}
_DEEP_SCRATCH: dict[str, Any] = {
    "lr": 1e-3,
    "steps": 110,
    "radius": {"start": 0.2, "end": 3.0},
    "finish_steps": 30,
    "retain_loss": "kl_divergence",
    "retain_noise": 0.1,
    "optimizer_options": {"eps": 1e-4},
}
_DEEP_OTHER: dict[str, Any] = {"lr": 1e-4, "steps": 32, "radius": "auto", "finish_steps": 16}
_IMITATE: dict[str, Any] = {
    "forget_loss": "undial",
    "loss_options": {"beta": 1.5},
    "ema_decay": 0.7,
    "retain_weight": 10.0,
    "guard": "update",
    "lr": 1e-4,
}

RECIPES: dict[str, dict[str, Any]] = {"paper": {}, "balanced": _BALANCED, "deep": _DEEP, "imitate": _IMITATE}
"""Name -> option -> value, for every model."""


@dataclass(frozen=True)
class RecipeOptions:
    """Which recipe the other options start from.

    Attributes:
        recipe: values for the options below, which those that are given replace: {names}. paper is the defaults, CE-U
            and GRU as published; balanced keeps most at equal forgetting (--ema-decay 0.7 --guard update, and
            --retain-weight 200 for the model from scratch, 50 for another) and is the default with --model; deep lasts
            when the answers are taught again: it forgets at weights that remember better, over a growing --radius, and
            then finishes (for another model than scratch, --radius auto); imitate gives the forget answers the
            probabilities that they have in a model that never learned them, --teacher, a little lowered, and leaves
            names and fluency as they are there; it is the default with --finetune-first, where the teacher is --model
    """

    recipe: str = one_of(list(RECIPES), "paper")

    def check(self) -> None:
        """Raise ValueError on an unknown name."""
        if self.recipe not in RECIPES:
            raise ValueError(f"--recipe: expected one of {', '.join(RECIPES)}, found {self.recipe!r}")


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """These options, with those of their recipe before them.

    Example:
        >>> expanded({"recipe": "balanced", "retain_weight": 5.0})
        {'ema_decay': 0.7, 'retain_weight': 5.0, 'guard': 'update', 'recipe': 'balanced'}
        >>> expanded({"model": "m"})
        {'ema_decay': 0.7, 'retain_weight': 50.0, 'guard': 'update', 'recipe': 'balanced', 'model': 'm'}
        >>> expanded({"model": "m", "finetune_first": True})["teacher"]
        'm'
    """
    model = values.get("model", ModelOptions.model)
    scratch = ModelOptions(model).scratch
    # The teacher is loaded whole, in every process, and not at a revision.
    taught = not scratch and values.get("finetune_first") and values.get("revision") is None
    recipe = values.get("recipe", _by_default(values, scratch, bool(taught)))
    own = dict(RECIPES.get(recipe, {}))
    if recipe == "imitate":
        own |= {"teacher": model} if taught else {}
        if values.get("forget_loss", own["forget_loss"]) != own["forget_loss"]:
            own.pop("loss_options")
    if recipe == "balanced" and not scratch:
        own |= _BALANCED_OTHER
    if recipe == "deep":
        own |= _DEEP_SCRATCH if scratch else _DEEP_OTHER
        if values.get("epochs") is not None:
            own.pop("steps")
    return own | ({} if recipe == "paper" else {"recipe": recipe}) | dict(values)


def _by_default(values: Mapping[str, Any], scratch: bool, taught: bool) -> str:
    if scratch or values.get("method") == "uld":
        return "paper"
    other = values.get("forget_loss") is not None or values.get("strategy") == FSDP2
    return "imitate" if taught and not other else "balanced"
