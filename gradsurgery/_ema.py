"""Moving averages of protected rows: float32, unscaled, committed only by a step that happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.gram import Row, combine_

_KEY = "gradsurgery_ema_"
_STEPS = "gradsurgery_steps"


@dataclass(frozen=True)
class Mixing:
    """The K rows of the Gram matrix as linear combinations of the B tensor lists at hand, ``weights [K, B]``.

    The candidate average d m + (1 - d) r is never formed: the Gram matrix of (f, r, m) says all about it, the old average stays whole
    until the step has happened, and no temporary of the model's size is made.
    """

    rows: list[list[Tensor | None]]
    weights: Tensor
    averaged: tuple[bool, ...]

    def units(self, scale: float | Tensor, device: torch.device) -> Tensor:
        """What turns each list into unscaled units, ``[B]``: 1 / scale for captured rows, 1 for averages."""
        inverse = 1.0 / torch.as_tensor(scale, dtype=torch.float64, device=device)
        return torch.where(torch.tensor(self.averaged, device=device), torch.ones_like(inverse), inverse)

    def scaled(self, amounts: Tensor, scale: float | Tensor) -> Tensor:
        """Amounts ``[S, B]`` of unscaled lists as amounts of the lists as they are, for a sum in the captured rows' scale."""
        factor = torch.as_tensor(scale, dtype=torch.float64, device=amounts.device)
        return torch.where(torch.tensor(self.averaged, device=amounts.device), amounts * factor, amounts)


class EMA:
    """One bias-corrected moving average m <- d m + (1 - d) r for each protected row that has a decay d, starting at 0."""

    def __init__(self, decays: Mapping[str, float], dtype: torch.dtype) -> None:
        for name, decay in decays.items():
            if not 0.0 <= decay < 1.0:
                raise ValueError(f"ema_decay: expected the old value's weight in [0, 1), found {decay} for {name!r}")
        self.decays = dict(decays)
        self.dtype = dtype
        self.averages: dict[str, dict[Tensor, Tensor]] = {name: {} for name in decays}
        self.steps = 0

    def mixing(self, objectives: Sequence[str], raw: list[list[Tensor | None]], parameters: Sequence[Tensor]) -> Mixing:
        """The rows to protect at the coming step, from the captured rows ``raw`` and the averages so far."""
        rows = list(raw)
        weights = torch.eye(len(raw), dtype=torch.float64)
        # A parameter that no objective reached takes no part in the step, so its average must take none in the projection.
        reached = [any(row[index] is not None for row in raw) for index in range(len(parameters))]
        for k, name in enumerate(objectives):
            if (decay := self.decays.get(name)) is None:
                continue
            correction = 1.0 - decay ** (self.steps + 1)
            weights[k, k] = (1.0 - decay) / correction
            average = self.averages[name]
            if average:
                rows.append(
                    [
                        average.get(parameter) if there else None
                        for parameter, there in zip(parameters, reached, strict=True)
                    ]
                )
                column = torch.zeros(len(raw), 1, dtype=torch.float64)
                column[k] = decay / correction
                weights = torch.cat([weights, column], 1)
        return Mixing(rows, weights, (False,) * len(raw) + (True,) * (len(rows) - len(raw)))

    def commit(
        self, objectives: Sequence[str], raw: Sequence[Row], scale: float | Tensor, parameters: Sequence[Tensor]
    ) -> None:
        """Take the captured rows into the averages. Rows without an average yet become it, in place."""
        for name, decay in self.decays.items():
            row, average = raw[objectives.index(name)], self.averages[name]
            share = (1.0 - decay) / torch.as_tensor(scale, dtype=torch.float64)
            for parameter, gradient in zip(parameters, row, strict=True):
                if parameter in average:
                    combine_([[average[parameter]], [gradient]], torch.stack([torch.full_like(share, decay), share]))
                elif gradient is not None:
                    # FSDP2's gradients are views of one buffer, and a DTensor that is one can be neither copied nor freed alone.
                    first = gradient.to(self.dtype, copy=hasattr(gradient, "to_local"))
                    combine_([[first]], share[None])
                    average[parameter] = first
        self.steps += 1

    def start(self, parameters: Sequence[Tensor]) -> None:
        """Zero averages where there are none: a checkpoint is loaded into a template of this shape."""
        for average in self.averages.values():
            for parameter in parameters:
                if parameter.requires_grad and parameter not in average:
                    average[parameter] = torch.zeros_like(parameter, dtype=self.dtype, requires_grad=False)

    def save(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """The base's state_dict with the averages in it."""
        state = {index: dict(entries) for index, entries in state_dict["state"].items()}
        for name, average in self.averages.items():
            for index, parameter in enumerate(parameters):
                if parameter in average:
                    state.setdefault(index, {})[_KEY + name] = average[parameter]
                elif index in state and parameter.requires_grad:
                    # Adagrad has a state before its first step, so torch.distributed.checkpoint takes this one for its template.
                    state[index][_KEY + name] = torch.zeros_like(parameter, dtype=self.dtype, requires_grad=False)
        groups = [dict(group) for group in state_dict["param_groups"]]
        if self.decays:
            for group in groups:
                group[_STEPS] = self.steps
        return {**state_dict, "state": state, "param_groups": groups}

    def split(
        self, state_dict: Mapping[str, Any], parameters: Sequence[Tensor]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The base's part of a state_dict, and ours, checked.

        The base must not see the averages: it would cast them to the parameters' type.

        Raises:
            ValueError: If an average does not fit.
        """
        averages: dict[str, dict[Tensor, Tensor]] = {name: {} for name in self.decays}
        state: dict[Any, Any] = {}
        # As torch does: the saved groups' order says which parameter a key means (torch.distributed.checkpoint's keys are names).
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        of_key = dict(zip(keys, parameters, strict=False))
        for index, entries in state_dict["state"].items():
            ours = {key: value for key, value in entries.items() if isinstance(key, str) and key.startswith(_KEY)}
            for key, value in ours.items():
                name = key.removeprefix(_KEY)
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
                averages[name][parameter] = value.detach().to(device=parameter.device, dtype=self.dtype, copy=True)
            rest = {key: value for key, value in entries.items() if key not in ours}
            if rest or not ours:
                state[index] = rest
        groups = [dict(group) for group in state_dict["param_groups"]]
        steps = [int(group.pop(_STEPS, 0)) for group in groups]
        return {**state_dict, "state": state, "param_groups": groups}, {
            "averages": averages,
            "steps": max(steps, default=0),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Adopt what `split` found."""
        self.averages.clear()
        self.averages.update(saved["averages"])
        self.steps = saved["steps"]
