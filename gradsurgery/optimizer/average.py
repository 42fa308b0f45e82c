"""Moving averages of protected rows: unscaled, in `ema_dtype`, and committed only by a step that happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from gradsurgery.gram import Write, combine_, local_tensor
from gradsurgery.optimizer.rows import Parts, Rows, check_protected


class EMA:
    """A bias-corrected moving average m <- d m + (1 - d) r for each protected row r that has a decay d; it starts at 0.

    A step takes three calls: `fold` before the Gram matrix (where rows can be averaged in their own memory), `stand_in`
    to put the averages in the place of the rows, and `commit` after the base's step.

    Args:
        decay: Weight of the old value, in [0, 1): for every protected row, or by objective.
        objectives: In the order of the rows; all but the first are protected.
        dtype: Type that the averages are kept in.

    Attributes:
        decays: By objective, only where there is one.
        averages: By objective and parameter, from the first committed step on.
        steps: By parameter, the number of steps behind its averages: a step counts where any objective reached the
            parameter, so that one that is added or unfrozen late is corrected by steps of its own.

    Raises:
        ValueError: If a decay is outside [0, 1) or of an unknown objective, or the type is not a floating-point one.
    """

    def __init__(
        self, decay: float | Mapping[str, float] | None, objectives: Sequence[str], dtype: torch.dtype
    ) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"ema_dtype: expected a floating-point type, found {dtype}")
        self.objectives = tuple(objectives)
        self.decays = _decays(decay, self.objectives)
        self.dtype = dtype
        self.averages: dict[str, dict[Tensor, Tensor]] = {name: {} for name in self.decays}
        self.steps: dict[Tensor, int] = {}

    @torch.no_grad()
    def change_decays(self, decay: float | Mapping[str, float] | None) -> None:
        """Set other decays. The bias-corrected averages stay what they are.

        An average m of n steps stands for m / (1 - d^n). It is multiplied by the quotient of these factors, new over
        old, as if it had been made with the new decay.

        Args:
            decay: As in the constructor.

        Raises:
            ValueError: As the constructor, or if other objectives than so far would have an average that has begun.
        """
        decays = _decays(decay, self.objectives)
        if decays.keys() != self.decays.keys() and self.steps:
            raise ValueError(
                f"ema_decay: expected decays for the objectives whose averages have begun, {sorted(self.decays)}, found "
                f"{sorted(decays)}; 0.0 is no memory, and an average begins with the first step"
            )
        for name, averages in self.averages.items():
            for parameter, average in averages.items():
                number, old, new = self.steps.get(parameter, 0), self.decays[name], decays.get(name)
                if number and new != old and new is not None:
                    average.mul_((1.0 - new**number) / (1.0 - old**number))
        self.decays = decays
        self.averages = {name: self.averages.get(name, {}) for name in decays}

    def type_for(self, tensor: Tensor) -> torch.dtype:
        """Type of the average of a row of this tensor's type: a complex one for complex numbers."""
        return self.dtype.to_complex() if tensor.is_complex() else self.dtype

    def fold(
        self, rows: Rows, candidates: dict[str, list[Tensor | None]], *, add: Sequence[float]
    ) -> dict[str, dict[int, Tensor]]:
        """Turn captured rows r into the next averages d m + (1 - d) r, in the rows' own memory, where that is possible.

        The pass that measures the rows does it, without one of its own. Otherwise the products with r and with m, their
        combination and the commit take three; after this, the commit only stores the results. The averages m stay as
        they are until the step has happened. Two kinds of gradient are left alone: those of another type than the
        averages, and DTensors (they are views of a buffer, which an average would keep alive).

        Args:
            rows: The captured rows; entries that are folded become None, also in the slots whose lists they are.
            candidates: The next averages so far, by objective; added to.
            add: The multiple of each current row that the update adds, K numbers. A row that is added must stay.

        Returns:
            By objective and parameter index, the averages m that candidates are still to be folded with.
        """
        to_fold: dict[str, dict[int, Tensor]] = {}
        inverse = 1.0 / rows.loss_scale()
        unscaled = inverse.device.type == "cpu" and float(inverse) == 1.0
        for name, row, multiple in zip(self.objectives, rows.lists, add, strict=True):
            if multiple or (decay := self.decays.get(name)) is None:
                continue
            average = self.averages[name]
            folded = candidates.setdefault(name, [])
            folded += [None] * (len(rows.parameters) - len(folded))
            for index, gradient in enumerate(row):
                if (
                    gradient is None
                    or gradient.dtype != self.type_for(gradient)
                    or local_tensor(gradient) is not gradient
                ):
                    continue
                if not unscaled:
                    combine_([[gradient]], inverse[None])
                old = average.get(rows.parameters[index])
                if (candidate := folded[index]) is not None:
                    candidate.add_(gradient, alpha=1.0 - decay)
                elif old is not None:
                    folded[index] = gradient
                    to_fold.setdefault(name, {})[index] = old
                else:
                    folded[index] = gradient.mul_(1.0 - decay)
                row[index] = None
        return to_fold

    def stand_in(
        self,
        rows: Rows,
        candidates: Mapping[str, list[Tensor | None]],
        to_fold: Mapping[str, dict[int, Tensor]] = MappingProxyType({}),
    ) -> Rows:
        """The rows of the coming step, where the averages that it would commit stand in for protected rows.

        Args:
            rows: The captured rows, without what was folded.
            candidates: From `fold`.
            to_fold: What `fold` returned. The rows' first measurement does it, or their `Rows.finish_writes`.

        Returns:
            Rows over the captured lists, and up to two more lists for each average: the candidates, and the averages so
            far where there is no candidate. Both are bias-corrected through the weights.
        """
        number = len(self.objectives)
        lists, owners = list(rows.lists), list(rows.owners)
        # A parameter that no objective reached takes no part in the step, so its average must take none in the
        # projection.
        reached = [
            any(row[index] is not None for row in (*rows.lists, *candidates.values()))
            for index in range(len(rows.parameters))
        ]

        counts = [self.steps.get(parameter, 0) for parameter in rows.parameters]
        parts, counts_of_parts = _parts(rows, counts, reached)
        weights = torch.eye(number, dtype=torch.float64, device="cpu").repeat(len(counts_of_parts), 1, 1)

        def append(k: int, part: list[Tensor | None], weight: Tensor) -> None:
            if any(tensor is not None for tensor in part):
                lists.append(part)
                owners.append(k)
                columns.append(weight[:, None] * torch.eye(number, dtype=torch.float64, device="cpu")[k])

        columns: list[Tensor] = []
        writes: list[Write] = []
        for k, name in enumerate(self.objectives):
            if (decay := self.decays.get(name)) is None:
                continue
            corrections = [1.0 - decay ** (count + 1) for count in counts_of_parts]
            correction = torch.tensor(corrections, dtype=torch.float64, device="cpu")
            weights[:, k, k] = (1.0 - decay) / correction
            folded = candidates.get(name, [None] * len(rows.parameters))
            so_far = [
                self.averages[name].get(parameter) if is_reached and candidate is None else None
                for parameter, is_reached, candidate in zip(rows.parameters, reached, folded, strict=True)
            ]
            append(k, so_far, decay / correction)
            append(k, folded, 1.0 / correction)
            if name in to_fold:
                writes.append(Write(len(lists) - 1, to_fold[name], decay))
        weights = torch.cat([weights, torch.stack(columns, -1)], -1) if columns else weights
        return replace(
            rows,
            lists=lists,
            weights=weights[0] if parts is None else weights,
            parts=parts,
            reached=reached,
            owners=tuple(owners),
            scaled=rows.scaled + (False,) * (len(lists) - len(rows.lists)),
            averaged=tuple(name in self.decays for name in self.objectives),
            writes=tuple(writes),
        )

    def commit(self, rows: Rows, candidates: Mapping[str, list[Tensor | None]]) -> None:
        """Store the candidates as the averages, and update the averages of rows that were not folded.

        Args:
            rows: From `stand_in`.
            candidates: From `fold`.
        """
        for name, decay in self.decays.items():
            row, average = rows.lists[self.objectives.index(name)], self.averages[name]
            folded = candidates.get(name, [None] * len(rows.parameters))
            new_weight = (1.0 - decay) / rows.loss_scale()
            for parameter, gradient, candidate, reached in zip(rows.parameters, row, folded, rows.reached, strict=True):
                if not reached:
                    continue
                if candidate is not None:
                    average[parameter] = candidate
                elif parameter in average:
                    weights = torch.stack([torch.full_like(new_weight, decay), new_weight])
                    combine_([[average[parameter]], [gradient]], weights)
                elif gradient is not None:
                    # FSDP2's gradients are views of one buffer: a DTensor can be neither copied nor freed by itself.
                    first = gradient.to(self.type_for(gradient), copy=hasattr(gradient, "to_local"))
                    combine_([[first]], new_weight[None])
                    average[parameter] = first
        for parameter, reached in zip(rows.parameters, rows.reached, strict=True):
            if reached:
                self.steps[parameter] = self.steps.get(parameter, 0) + 1

    def start(self, parameters: Sequence[Tensor]) -> None:
        """Zero averages where there are none: torch.distributed.checkpoint loads into a template of this shape."""
        for average in self.averages.values():
            for parameter in parameters:
                if parameter.requires_grad and parameter not in average:
                    average[parameter] = self.zero(parameter)

    def zero(self, parameter: Tensor) -> Tensor:
        """The average of a row of this parameter before the first step."""
        return torch.zeros_like(parameter, dtype=self.type_for(parameter), requires_grad=False)

    def restore(self, averages: Mapping[str, dict[Tensor, Tensor]], steps: Mapping[Tensor, int]) -> None:
        """Replace the averages by saved ones, and the numbers of steps behind them."""
        self.averages.clear()
        self.averages.update(averages)
        self.steps.clear()
        self.steps.update(steps)


def _decays(decay: float | Mapping[str, float] | None, objectives: Sequence[str]) -> dict[str, float]:
    """The decays by objective, only where there is one."""
    decays = decay if isinstance(decay, Mapping) else dict.fromkeys(objectives[1:], decay)
    check_protected("ema_decay", decays, objectives)
    found = {name: value for name, value in decays.items() if value is not None}
    for name, value in found.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"ema_decay: expected the old value's weight in [0, 1), found {value} for {name!r}")
    return found


def _parts(rows: Rows, counts: Sequence[int], reached: Sequence[bool]) -> tuple[Parts | None, list[int]]:
    """The parts of the blocks whose parameters have equal counts, and the count of each; no parts for one count."""
    different = dict.fromkeys(count for count, is_reached in zip(counts, reached, strict=True) if is_reached)
    if len(different) < 2:
        return None, list(different) or [0]
    blocks = rows.blocks.of_parameter or [0] * len(counts)
    keys = list(zip(blocks, counts, strict=True))
    order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    return Parts([order[key] for key in keys], [block for block, _ in order]), [count for _, count in order]
