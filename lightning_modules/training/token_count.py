"""Means over the answer tokens of all processes."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor


def mean_token_count(count: int, trainer: L.Trainer | None, device: torch.device) -> Tensor:
    """What a process divides the sum over its tokens by, so that the result is a mean over the tokens of all processes.

    DDP averages gradients over processes, however many tokens each of them counted. Divided by the mean of these
    counts, the sums of all processes average to the mean over all tokens: two processes with half a batch each then
    do what one does with all of it.

    Args:
        count: Tokens of this process.
        trainer: None for a module that is used without one, in one process.
        device: Of the result.

    Returns:
        The mean of the count over the processes, float32, `[]`; 1 over their number where none of them has a token,
        so that the mean of no token is 0.
    """
    world = 1 if trainer is None else trainer.world_size
    mean = torch.tensor(float(count), device=device)
    if trainer is not None and world > 1:
        mean = trainer.strategy.reduce(mean, reduce_op="mean")
    return mean.clamp_min(1.0 / world)
