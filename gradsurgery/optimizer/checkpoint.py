"""Checkpoint: how averages and a stateful rule's numbers are kept in the base optimizer's state_dict."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsurgery.optimizer.average import EMA
from gradsurgery.optimizer.wrapper import parameters_of, refuse_groups
from gradsurgery.rules import StatefulRule

_AVERAGE = "gradsurgery_ema_"
_STEPS = "gradsurgery_steps"
_DECAY = "gradsurgery_decay_"
_RULE = "gradsurgery_rule"

# States of torch's optimizers that have a number for every weight; Adafactor's and Muon's have others too.
_LIKE_ITS_PARAMETER = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "exp_inf",
    "sum",
    "prev",
)


def save(base: torch.optim.Optimizer, average: EMA, rule: object) -> dict[str, Any]:
    """The base's state_dict with the averages and the rule's numbers in it (see `GradientSurgery.state_dict`).

    Raises:
        ValueError: If torch.distributed.checkpoint asks for it with ``flatten_optimizer_state_dict``.
    """
    _refuse_flattening(average, rule)
    state_dict = base.state_dict()
    state = {index: dict(entries) for index, entries in state_dict["state"].items()}
    for name, averages in average.averages.items():
        for index, parameter in enumerate(parameters_of(base)):
            if parameter in averages:
                state.setdefault(index, {})[_AVERAGE + name] = averages[parameter]
            elif index in state and parameter.requires_grad:
                # Adagrad has a state before its first step, which torch.distributed.checkpoint takes for its template.
                state[index][_AVERAGE + name] = average.zero(parameter)
    for index, parameter in enumerate(parameters_of(base)):
        steps = average.steps.get(parameter, 0)
        if steps or any(_AVERAGE + name in state.get(index, {}) for name in average.decays):
            # A tensor, as the base's own "step" is: torch.distributed.checkpoint keeps no other kind of number here.
            state.setdefault(index, {})[_STEPS] = torch.tensor(float(steps), dtype=torch.float32, device="cpu")
    groups = [dict(group) for group in state_dict["param_groups"]]
    for group in groups:
        if average.decays:
            group[_STEPS] = max(average.steps.values(), default=0)
            group.update({_DECAY + name: decay for name, decay in average.decays.items()})
        if isinstance(rule, StatefulRule):
            group[_RULE] = rule.state_dict()
    return {**state_dict, "state": state, "param_groups": groups}


def load(
    state_dict: Mapping[str, Any], base: torch.optim.Optimizer, average: EMA, rule: object, start: dict[str, Any]
) -> None:
    """Restore what `save` returned. From a plain checkpoint of the base, averages and rule start anew.

    Args:
        state_dict: From `save`, or from the base.
        base: The base optimizer.
        average: The averages.
        rule: The rule; only a `StatefulRule` is changed.
        start: What a `StatefulRule` was constructed with.

    Raises:
        ValueError: If it does not fit. Nothing is changed then.
    """
    _refuse_flattening(average, rule)
    refuse_groups(state_dict["param_groups"])  # the base would adopt it with the groups
    # The base must not see the averages, because it would cast them to the parameters' type.
    state, averages, steps = _split_state(state_dict, parameters_of(base), average)
    _refuse_other_parameters(state_dict["param_groups"], state, base)
    groups = [dict(group) for group in state_dict["param_groups"]]
    _refuse_late_averages(groups, average)
    for group in groups:
        for key in [key for key in group if key.startswith(_DECAY)]:
            name, decay = key.removeprefix(_DECAY), group.pop(key)
            if averages.get(name) and average.decays[name] != decay:
                raise ValueError(
                    f"load_state_dict: expected the average of {name!r} to have ema_decay={average.decays[name]}, found {decay}; "
                    "construct GradientSurgery with that, or set optimizer.ema_decay to it before loading"
                )
    of_all = max((int(group.pop(_STEPS, 0)) for group in groups), default=0)
    of_rule = [group.pop(_RULE, None) for group in groups]
    if isinstance(rule, StatefulRule):  # before the base, and back where either does not fit
        kept = rule.state_dict()
        try:
            rule.load_state_dict(of_rule[0] if of_rule and of_rule[0] is not None else start)
            base.load_state_dict({**state_dict, "state": state, "param_groups": groups})
        except BaseException:
            rule.load_state_dict(kept)
            raise
    else:
        base.load_state_dict({**state_dict, "state": state, "param_groups": groups})
    # Checkpoints of earlier versions have one number of steps for all parameters.
    averaged = {parameter for of_name in averages.values() for parameter in of_name}
    average.restore(averages, dict.fromkeys(averaged, of_all) | steps)


def _refuse_late_averages(groups: list[dict[str, Any]], average: EMA) -> None:
    """Raise ValueError where an average would begin now and be corrected as one of all the steps before."""
    begun = {
        key.removeprefix(_DECAY) for group in groups if group.get(_STEPS) for key in group if key.startswith(_DECAY)
    }
    if begun and (late := sorted(average.decays.keys() - begun)):
        raise ValueError(
            f"load_state_dict: expected averages of {sorted(average.decays)}, found those of {sorted(begun)} alone, which have begun; "
            f"construct GradientSurgery with ema_decay for these, and none for {', '.join(late)}"
        )


def _refuse_flattening(average: EMA, rule: object) -> None:
    """Refuse what a flattened checkpoint would lose: torch loads from it only what the base's state has keys for.

    Neither `state_dict` nor `load_state_dict` is told; torch's functions that call them know.
    """
    frame = inspect.currentframe() if average.decays or isinstance(rule, StatefulRule) else None
    while frame is not None:
        if frame.f_code.co_name in ("_get_optim_state_dict", "_load_optim_state_dict"):
            if getattr(frame.f_locals.get("info"), "flatten_optimizer_state_dict", False):
                raise ValueError(
                    "state_dict: expected StateDictOptions(flatten_optimizer_state_dict=False), found True, from which torch restores no "
                    "moving average and no rule's numbers; leave it False"
                )
            return
        frame = frame.f_back


def _refuse_other_parameters(
    groups: list[dict[str, Any]], state: Mapping[Any, Any], base: torch.optim.Optimizer
) -> None:
    """Raise ValueError where torch would say too little, or nothing before the next step."""
    found, expected = ([len(group["params"]) for group in each] for each in (groups, base.param_groups))
    if found != expected:
        what = "number of parameter groups" if len(found) != len(expected) else "number of parameters"
        raise ValueError(
            f"load_state_dict: expected groups of {expected} parameters, found {found}, a different {what}; the checkpoint is of another "
            "model, or its parameters were grouped otherwise"
        )
    if not type(base).__module__.startswith("torch.optim"):
        return  # other optimizers may keep states of other shapes
    keys = [key for group in groups for key in group["params"]]
    for key, parameter in zip(keys, parameters_of(base), strict=True):
        for name, value in state.get(key, {}).items():
            if name in _LIKE_ITS_PARAMETER and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ValueError(
                    f"load_state_dict: expected {name} of parameter {key} to have the parameter's shape {list(parameter.shape)}, found "
                    f"{list(value.shape)}; the checkpoint is of another model"
                )


def _split_state(
    state_dict: Mapping[str, Any], parameters: list[Tensor], average: EMA
) -> tuple[dict[Any, Any], dict[str, dict[Tensor, Tensor]], dict[Tensor, int]]:
    """The base's part of the parameters' states, the averages by objective and parameter, and the steps behind them."""
    steps: dict[Tensor, int] = {}
    averages: dict[str, dict[Tensor, Tensor]] = {name: {} for name in average.decays}
    state: dict[Any, Any] = {}
    # As in torch, the order in the saved groups says which parameter a key means, and not the key itself:
    # torch.distributed.checkpoint's keys are names.
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    of_key = dict(zip(keys, parameters, strict=False))
    for index, entries in state_dict["state"].items():
        ours = {key: value for key, value in entries.items() if isinstance(key, str) and key.startswith(_AVERAGE)}
        for key, value in ours.items():
            name = key.removeprefix(_AVERAGE)
            if name not in averages:
                raise ValueError(
                    f"load_state_dict: expected averages of {list(averages)}, found one of {name!r}; construct GradientSurgery with "
                    "the ema_decay it was saved with"
                )
            parameter = of_key.get(index)
            if parameter is None or value.shape != parameter.shape:
                raise ValueError(
                    f"load_state_dict: expected the average of {name!r} for parameter {index} to have the parameter's shape, found "
                    f"{list(value.shape)}; the checkpoint is of another model"
                )
            averages[name][parameter] = value.detach().to(
                device=parameter.device, dtype=average.type_for(parameter), copy=True
            )
        if _STEPS in entries and index in of_key:
            steps[of_key[index]] = int(entries[_STEPS])
        rest = {key: value for key, value in entries.items() if key not in ours and key != _STEPS}
        if rest or not entries:
            state[index] = rest
    return state, averages, steps
