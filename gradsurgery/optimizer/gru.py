"""GRU: gradient surgery with the defaults of the GRU paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from gradsurgery import rules
from gradsurgery.optimizer.metric import MetricOption
from gradsurgery.optimizer.options import Guard
from gradsurgery.optimizer.scope import Scope
from gradsurgery.optimizer.surgery import GradientSurgery


class GRU(GradientSurgery):
    """`GradientSurgery` with the GRU paper's defaults (2503.09117): rule ``gru``, ``ema_decay=0.2``, global scope.

    All parameters, errors and costs are those of `GradientSurgery`.

    Example:
        >>> weights = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = GRU(torch.optim.SGD([weights], lr=0.1))
        >>> optimizer.join(forget=3 * weights[0] - 4 * weights[1], retain=weights[1]).backward()
        >>> optimizer.step()
        >>> weights.data  # the retain loss, the second weight, is as before
        tensor([0.7000, 1.0000])
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        rule: Callable[..., Any] | str = rules.gru,
        objectives: Sequence[str] = ("forget", "retain"),
        *,
        ema_decay: float | Mapping[str, float] | None = 0.2,
        scope: Scope = "global",
        record_scope: Scope | None = None,
        metric: MetricOption = "euclidean",
        guard: Guard = None,
        add: Mapping[str, float] | None = None,
        max_norm: float | None = None,
        ema_dtype: torch.dtype = torch.float32,
        accumulate: bool = False,
    ) -> None:
        super().__init__(
            base,
            rule,
            objectives,
            ema_decay=ema_decay,
            scope=scope,
            record_scope=record_scope,
            metric=metric,
            guard=guard,
            add=add,
            max_norm=max_norm,
            ema_dtype=ema_dtype,
            accumulate=accumulate,
        )
