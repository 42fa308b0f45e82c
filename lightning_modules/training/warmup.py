"""Learning rates that rise linearly at the start of training."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR

LAST_SHARE = 0.02
"""Of the highest learning rate: what a decay ends with."""


def with_warmup(optimizer: Optimizer, steps: int) -> Any:
    """What a module's `configure_optimizers` returns for a linear warm-up to the optimizer's own learning rate.

    Step k of n has k/n of it, and the steps after them all of it. The schedules of Transformers start with a step of
    learning rate 0, which here would be a step of every run spent on nothing.

    Args:
        optimizer: With its highest learning rate.
        steps: n; 0 for no warm-up.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule, rates = with_warmup(optimizer, 4)["lr_scheduler"]["scheduler"], []
        >>> for _ in range(6):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    if not steps:
        return optimizer
    schedule = LinearLR(optimizer, 1.0 / steps, total_iters=steps - 1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_and_decay(optimizer: Optimizer, steps: int) -> LambdaLR:
    """A schedule of so many steps: a linear warm-up over the first tenth of them, at most 100, then a linear decay.

    The decay would reach 0 after the last step; it stops at `LAST_SHARE` of the highest learning rate.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> share = warmup_and_decay(optimizer, 40).lr_lambdas[0]
        >>> [share(step) for step in (0, 3, 4, 22, 40)]
        [0.25, 1.0, 1.0, 0.5, 0.02]
    """
    rising = max(1, min(100, steps // 10))

    def share(step: int) -> float:
        if step < rising:
            # Not LinearLR, which multiplies from step to step: it rounds otherwise, and cached models would change.
            return (step + 1) / rising
        return max(LAST_SHARE, (steps - step) / max(1, steps - rising))

    return LambdaLR(optimizer, share)
