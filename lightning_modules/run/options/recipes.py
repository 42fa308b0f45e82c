"""Recipes: options that belong together, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_modules.run.options.data import ModelOptions
from lightning_modules.run.options.flat import one_of
from lightning_modules.run.options.method import MethodOptions
from lightning_modules.run.options.names import NO_RULE, REFUSING

_BALANCED: dict[str, Any] = {"ema_decay": 0.7, "retain_weight": 200.0, "guard": "update"}
_BALANCED_OTHER: dict[str, Any] = {"retain_weight": 50.0}
_BALANCED_ANSWERS: dict[str, Any] = {"retain_weight": 15.0, "keep_asked_words": True}
"""Where questions ask for the answers: with their words left alone the model goes on speaking of whom it is asked."""
_DEEP: dict[str, Any] = {
    "ema_decay": 0.7,
    "guard": "update",
    "substitute_weight": 1.0,
    "lr_schedule": "linear",
    "accumulate": 1,
    "stop_below": 0.0,
    "score_every": 4,
}
_DEEP_SCRATCH: dict[str, Any] = {
    "lr": 1e-3,
    "steps": 76,  # at five backward passes, and three in each of the finish: 398
    "batch_size": 40,  # in small batches AdamW's steps are mostly noise, which moves what nobody shows
    "retain_weight": 10.0,
    "radius": {"start": 0.2, "end": 2.0},
    "finish_steps": 6,
    "retain_loss": "kl_divergence",
    "retain_noise": 0.5,
    "optimizer_options": {"eps": 1e-4},
}
_DEEP_OTHER: dict[str, Any] = {
    "lr": 1e-4,
    "steps": 36,
    "retain_weight": 20.0,
    "radius": "auto",
}
_DEEP_TAUGHT: dict[str, Any] = {"steps": 32, "finish_steps": 16, "substitute_weight": 0.0}
"""Where a teacher says what is to be answered instead, which only a finish asks."""
_IMITATE: dict[str, Any] = {
    "forget_loss": "undial",  # the divergence itself leaves what the teacher knows or guesses, 0.30 on SmolLM2
    "ema_decay": 0.7,
    "retain_weight": 15.0,
    "guard": "update",
    "lr": 5e-5,
    "steps": 80,
    "stop_below": 0.0,
}

RECIPES: dict[str, dict[str, Any]] = {"paper": {}, "balanced": _BALANCED, "deep": _DEEP, "imitate": _IMITATE}
"""Name -> option -> value, for every model."""


@dataclass(frozen=True)
class RecipeOptions:
    """Which recipe the other options start from.

    Attributes:
        recipe: values for the options below, which those that are given replace: {names}. paper is the defaults, CE-U
            and GRU as published; balanced keeps most at equal forgetting (--ema-decay 0.7 --guard update, and
            --retain-weight 200 for the model from scratch; for another --retain-weight 15 --keep-asked-words true, or
            50 and false with --keep-asked-words false, --muse, --wmdp, --teacher, --ledger and losses that teach
            refusals) and is the default with --model, whatever this help shows, but not with --rule none; deep lasts
            when the answers are taught again: it forgets at weights that remember better, over a growing --radius, and
            learns other answers there (for another model than scratch, --radius auto; with --teacher its answers, in a
            finish); imitate puts in the forget answers' place what a model would say that never learned them,
            --teacher, by default the --model of --finetune-first, and leaves the words of the questions alone: fluent,
            and not as far as balanced
    """

    recipe: str = one_of(list(RECIPES), "paper")

    def check(self) -> None:
        """Raise ValueError on an unknown name."""
        if self.recipe not in RECIPES:
            raise ValueError(f"--recipe: expected one of {', '.join(RECIPES)}, found {self.recipe!r}")

    def check_teacher(self, model: ModelOptions, method: MethodOptions) -> None:
        """Raise ValueError if the recipe imitates a model that nobody named."""
        if self.recipe != "imitate" or method.teacher is not None:
            return
        expected = "--recipe imitate: expected --model, and a model that never learned the forget answers"
        if model.scratch:
            raise ValueError(f"{expected}, found the model from scratch")
        raise ValueError(f"{expected}, --teacher or the --model of --finetune-first without --revision, found none")


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """These options, with those of their recipe before them.

    Example:
        >>> expanded({"recipe": "balanced", "retain_weight": 5.0})
        {'ema_decay': 0.7, 'retain_weight': 5.0, 'guard': 'update', 'recipe': 'balanced'}
        >>> expanded({"model": "m"})["retain_weight"], expanded({"model": "m", "muse": "news"})["retain_weight"]
        (15.0, 50.0)
        >>> expanded({"model": "m", "finetune_first": True, "recipe": "imitate"})["teacher"]
        'm'
    """
    model = values.get("model", ModelOptions.model)
    scratch = ModelOptions(model).scratch
    bare = values.get("method") == "uld" or values.get("rule") == NO_RULE
    by_default = "paper" if scratch or bare else "balanced"
    recipe = values.get("recipe", by_default)
    own = dict(RECIPES.get(recipe, {}))
    if recipe == "imitate":
        own["keep_asked_words"] = not _of_texts(values)
        if values.get("finetune_first") and values.get("revision") is None:
            own["teacher"] = model  # which is loaded as a reference is: not at a revision
    if recipe == "balanced" and not scratch:
        own |= _BALANCED_ANSWERS if _of_answers(values) else _BALANCED_OTHER
    if recipe == "deep":
        own |= _DEEP_SCRATCH if scratch else _DEEP_OTHER
        own |= {} if values.get("teacher") is None else _DEEP_TAUGHT
    if values.get("epochs") is not None:
        own.pop("steps", None)
    return own | ({} if recipe == "paper" else {"recipe": recipe}) | dict(values)


def _of_answers(values: Mapping[str, Any]) -> bool:
    """Whether answers to questions are to be forgotten, no others are taught, and the questions' words may stay."""
    whole = _of_texts(values) or values.get("teacher") is not None or values.get("forget_loss") in REFUSING
    return not whole and values.get("keep_asked_words", True)


def _of_texts(values: Mapping[str, Any]) -> bool:
    """Whether whole texts are to be forgotten, or answers whose criteria a ledger holds."""
    return any(values.get(name) is not None for name in ("muse", "wmdp", "ledger"))


def unasked(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe that nobody named sets besides these options.

    Example:
        >>> unasked({"model": "m", "retain_weight": 5.0})
        {'ema_decay': 0.7, 'guard': 'update', 'keep_asked_words': True}
        >>> unasked({"model": "m", "recipe": "balanced"}), unasked({"lr": 1e-4})
        ({}, {})
    """
    if "recipe" in values:
        return {}
    return {name: value for name, value in expanded(values).items() if name != "recipe" and name not in values}
