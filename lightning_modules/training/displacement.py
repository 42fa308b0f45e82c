"""How far weights have moved."""

from __future__ import annotations

import torch
from torch import nn


class Displacement:
    r"""The distance of a model's weights from where they are now.

    Args:
        model: Its parameters are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def to(self, model: nn.Module) -> tuple[float, float]:
        r"""Returns $\|\theta' - \theta\|_2$ over all parameters, and that divided by $\|\theta\|_2$.

        Args:
            model: With parameters of the same names.
        """
        now = dict(model.named_parameters())
        change = sum(float((now[name] - start).double().square().sum()) for name, start in self.start.items())
        size = sum(float(start.double().square().sum()) for start in self.start.values())
        return change**0.5, (change / size) ** 0.5 if size else float("inf")
