"""Learning rates that rise linearly at the start of training, and may fall towards its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR

LAST_SHARE = 0.02
"""Of the highest learning rate: what a decay ends with."""


Schedule: TypeAlias = Callable[[int, int], float]
"""A function of a step, counted from 0, and of the steps of the whole training: the share of the learning rate."""


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
    return LambdaLR(optimizer, lambda step: rising_and_falling(step, steps))


def rising_and_falling(step: int, steps: int) -> float:
    """The `Schedule` of `warmup_and_decay`."""
    rising = max(1, min(100, steps // 10))
    if step < rising:
        # Not LinearLR, which multiplies from step to step: it rounds otherwise, and cached models would change.
        return (step + 1) / rising
    return max(LAST_SHARE, (steps - step) / max(1, steps - rising))


def falling_late(step: int, steps: int, *, warmup_steps: int = 5, floor: float = 0.05) -> float:
    """A `Schedule`: a linear warm-up, the whole learning rate for a third of the steps, then a linear decay.

    Step t of S, counted from 1, has min(1, t / warm-up) x max(floor, min(1, 1.5 (S - t) / S)) of it.

    Example:
        >>> [falling_late(step, 60) for step in (0, 4, 19, 39, 59)]
        [0.2, 1.0, 1.0, 0.5, 0.05]
    """
    t = step + 1
    return min(1.0, t / max(1, warmup_steps)) * max(floor, min(1.0, 1.5 * (steps - t) / steps))


class Scheduled:
    """Gives an optimizer the shares of a `Schedule`, as a learning rate scheduler of torch.

    Lightning knows the number of steps where training starts. Asked earlier, it makes the loaders before the checkpoint
    of a resumed run is read, and then forgets their place in the epoch.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self._schedule, self._steps = schedule, 0
        self.scheduler = LambdaLR(optimizer, lambda step: self._share(step))

    @property
    def begun(self) -> bool:
        """Whether the number of steps is known."""
        return self._steps > 0

    def begin(self, steps: int) -> None:
        """Set the learning rate of the step that comes, now that their number is known."""
        self._steps, scheduler = steps, self.scheduler
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = rate * self._share(scheduler.last_epoch)

    def _share(self, step: int) -> float:
        return self._schedule(step, self._steps) if self._steps else 1.0
