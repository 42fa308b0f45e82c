"""Moving averages of protected rows: float32, unscaled, committed only by a step that happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsurgery.gram import combine_, local_tensor, numbers_on

_KEY = "gradsurgery_ema_"
_STEPS = "gradsurgery_steps"
_DECAY = "gradsurgery_decay_"


@dataclass(frozen=True)
class Mixing:
    """The K rows of the Gram matrix as linear combinations of the B tensor lists at hand, ``weights [K, B]``.

    A protected row d m + (1 - d) r is one list where `EMA.fold` has formed it, and two, r and m, where it has not: the Gram matrix of
    (f, r, m) says all about it, and no temporary of the model's size is made.

    Attributes:
        rows: B lists; the first K are what is left of the captured rows.
        weights: ``[K, B]``, float64 on the CPU.
        averaged: Whether each list is an average, which has no loss scale.
        owners: The row that each list is part of.
        folded: The candidate averages by objective.
    """

    rows: list[list[Tensor | None]]
    weights: Tensor
    averaged: tuple[bool, ...]
    owners: tuple[int, ...]
    folded: Mapping[str, list[Tensor | None]]

    def units(self, scale: float | Tensor, device: torch.device) -> Tensor:
        """What turns each list into unscaled units, ``[B]``: 1 / scale for captured rows, 1 for averages."""
        inverse = 1.0 / numbers_on(device, scale, torch.float64)
        return torch.where(numbers_on(device, self.averaged), torch.ones_like(inverse), inverse)

    def scaled(self, amounts: Tensor, scale: float | Tensor) -> Tensor:
        """Amounts ``[S, B]`` of unscaled lists as amounts of the lists as they are, for a sum in the captured rows' scale."""
        factor = numbers_on(amounts.device, scale, torch.float64)
        return torch.where(numbers_on(amounts.device, self.averaged), amounts * factor, amounts)


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

    def _type(self, tensor: Tensor) -> torch.dtype:
        return self.dtype.to_complex() if tensor.is_complex() else self.dtype

    def fold(
        self,
        captured: Mapping[str, list[Tensor | None]],
        folded: dict[str, list[Tensor | None]],
        scale: float | Tensor,
        parameters: Sequence[Tensor],
    ) -> None:
        """Turn captured rows into candidate averages d m + (1 - d) r where that can be done in their own memory.

        One pass instead of the three that products with r and m, their combination and the commit would take; and a commit is then a
        change of names. The old averages stay as they are, until the step has happened. Rows in another type than the averages, and
        DTensors (views of a buffer that an average would keep alive), are left.

        Args:
            captured: Rows by objective; entries that are folded become None.
            folded: Candidates so far, to be added to.
            scale: Loss scale of the captured rows.
            parameters: In the rows' order.
        """
        inverse = 1.0 / torch.as_tensor(scale, dtype=torch.float64)
        unscaled = inverse.device.type == "cpu" and float(inverse) == 1.0
        for name, row in captured.items():
            decay, average = self.decays[name], self.averages[name]
            candidates = folded.setdefault(name, [])
            candidates += [None] * (len(parameters) - len(candidates))
            for index, gradient in enumerate(row):
                if gradient is None or gradient.dtype != self._type(gradient) or local_tensor(gradient) is not gradient:
                    continue
                if not unscaled:
                    combine_([[gradient]], inverse[None])
                old = average.get(parameters[index])
                if (candidate := candidates[index]) is not None:
                    candidate.add_(gradient, alpha=1.0 - decay)
                elif old is not None:
                    candidates[index] = gradient.lerp_(old, decay)
                else:
                    candidates[index] = gradient.mul_(1.0 - decay)
                row[index] = None

    def mixing(
        self,
        objectives: Sequence[str],
        raw: list[list[Tensor | None]],
        folded: Mapping[str, list[Tensor | None]],
        parameters: Sequence[Tensor],
    ) -> Mixing:
        """The rows to protect at the coming step, from the captured rows ``raw``, the candidates and the averages so far."""
        rows, owners, columns = list(raw), list(range(len(raw))), list(torch.eye(len(raw), dtype=torch.float64))
        # A parameter that no objective reached takes no part in the step, so its average must take none in the projection.
        reached = [any(row[index] is not None for row in (*raw, *folded.values())) for index in range(len(parameters))]

        def add(k: int, part: list[Tensor | None], weight: float) -> None:
            if any(tensor is not None for tensor in part):
                rows.append(part)
                owners.append(k)
                columns.append(weight * columns[k].sign())

        for k, name in enumerate(objectives):
            if (decay := self.decays.get(name)) is None:
                continue
            correction = 1.0 - decay ** (self.steps + 1)
            columns[k] = columns[k] * ((1.0 - decay) / correction)
            candidates = folded.get(name, [None] * len(parameters))
            whole = [
                self.averages[name].get(parameter) if there and candidate is None else None
                for parameter, there, candidate in zip(parameters, reached, candidates, strict=True)
            ]
            add(k, whole, decay / correction)
            add(k, candidates, 1.0 / correction)
        averaged = (False,) * len(raw) + (True,) * (len(rows) - len(raw))
        return Mixing(rows, torch.stack(columns, 1), averaged, tuple(owners), dict(folded))

    def commit(
        self, objectives: Sequence[str], mixing: Mixing, scale: float | Tensor, parameters: Sequence[Tensor]
    ) -> None:
        """Adopt the candidates, and take the rows that were not folded into the averages."""
        for name, decay in self.decays.items():
            row, average = mixing.rows[objectives.index(name)], self.averages[name]
            candidates = mixing.folded.get(name, [None] * len(parameters))
            share = (1.0 - decay) / torch.as_tensor(scale, dtype=torch.float64)
            for parameter, gradient, candidate in zip(parameters, row, candidates, strict=True):
                if candidate is not None:
                    average[parameter] = candidate
                elif parameter in average:
                    combine_([[average[parameter]], [gradient]], torch.stack([torch.full_like(share, decay), share]))
                elif gradient is not None:
                    # FSDP2's gradients are views of one buffer, and a DTensor that is one can be neither copied nor freed alone.
                    first = gradient.to(self._type(gradient), copy=hasattr(gradient, "to_local"))
                    combine_([[first]], share[None])
                    average[parameter] = first
        self.steps += 1

    def start(self, parameters: Sequence[Tensor]) -> None:
        """Zero averages where there are none: a checkpoint is loaded into a template of this shape."""
        for average in self.averages.values():
            for parameter in parameters:
                if parameter.requires_grad and parameter not in average:
                    average[parameter] = torch.zeros_like(parameter, dtype=self._type(parameter), requires_grad=False)

    def save(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """The base's state_dict with the averages in it."""
        state = {index: dict(entries) for index, entries in state_dict["state"].items()}
        for name, average in self.averages.items():
            for index, parameter in enumerate(parameters):
                if parameter in average:
                    state.setdefault(index, {})[_KEY + name] = average[parameter]
                elif index in state and parameter.requires_grad:
                    # Adagrad has a state before its first step, so torch.distributed.checkpoint takes this one for its template.
                    state[index][_KEY + name] = torch.zeros_like(
                        parameter, dtype=self._type(parameter), requires_grad=False
                    )
        groups = [dict(group) for group in state_dict["param_groups"]]
        if self.decays:
            for group in groups:
                group[_STEPS] = self.steps
                group.update({_DECAY + name: decay for name, decay in self.decays.items()})
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
                averages[name][parameter] = value.detach().to(
                    device=parameter.device, dtype=self._type(parameter), copy=True
                )
            rest = {key: value for key, value in entries.items() if key not in ours}
            if rest or not ours:
                state[index] = rest
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            for key in [key for key in group if key.startswith(_DECAY)]:
                name, decay = key.removeprefix(_DECAY), group.pop(key)
                if averages.get(name) and self.decays[name] != decay:
                    raise ValueError(
                        f"load_state_dict: expected the average of {name!r} to have ema_decay={self.decays[name]}, found {decay}; "
                        "construct GradientSurgery with that"
                    )
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
