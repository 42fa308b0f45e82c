"""Relearning attacks on what a method leaves: how much comes back when a part of the forgotten is taught again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from lightning_modules.data.tokenization import Encoded
from lightning_modules.training.callbacks import RelearnSettings, relearn_probe
from lightning_modules.training.counts import whole

_COUNTS = ("steps", "batch_size", "seed")


def relearn_settings(given: Mapping[str, float], *, autocast: bool = False) -> RelearnSettings:
    """The settings of an attack; counts are whole numbers, even where a YAML file says 20.0. Only the end is scored.

    Raises:
        TypeError: If one of them is no setting.
        ValueError: If a count is no whole number, steps or lr are not given, or scores on the way are asked for.
    """
    if missing := [name for name in ("steps", "lr") if name not in given]:
        raise ValueError(
            f"expected steps and lr, for example {{steps: 20, lr: 5e-5}}, found no {' and no '.join(missing)}"
        )
    if scored := [name for name in ("every", "also") if name in given]:
        raise ValueError(f"expected no {scored[0]}, found one: an attack of a grid is scored at its end alone")
    values = whole(given, _COUNTS)
    settings = {"every": max(1, values["steps"]), **values}
    return RelearnSettings(autocast=autocast, **cast(Any, settings))


def attacked(
    model: nn.Module,
    forget: Sequence[Encoded],
    attacks: Mapping[str, Mapping[str, float]],
    *,
    pad_token_id: int,
    autocast: bool = False,
) -> dict[str, float]:
    """Name of an attack -> mean probability of the untaught forget answers after it. The model stays as it is.

    Attacks that differ in their steps alone are one: the shorter are scored on the way of the longest.
    """
    given_settings = {name: relearn_settings(given, autocast=autocast) for name, given in attacks.items()}
    alike: dict[RelearnSettings, list[str]] = {}
    for name, settings in given_settings.items():
        alike.setdefault(replace(settings, steps=1, every=1, also=()), []).append(name)
    after: dict[str, float] = {}
    for common, names in alike.items():
        steps = {name: given_settings[name].steps for name in names}
        end = max(steps.values())
        longest = replace(common, steps=end, every=end, also=tuple(sorted(steps.values())))
        result = relearn_probe(model, forget, pad_token_id=pad_token_id, settings=longest)
        rest = {point["step"]: float(point["rest"]) for point in result["points"]}
        after |= {name: rest[step] for name, step in steps.items()}
    return {name: after[name] for name in attacks}
