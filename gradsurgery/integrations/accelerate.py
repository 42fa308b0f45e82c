"""Accelerate: the optimizer behind the one that ``accelerator.prepare`` returns."""

from __future__ import annotations

import torch

from gradsurgery.optimizer.surgery import GradientSurgery


def unwrap(optimizer: torch.optim.Optimizer) -> GradientSurgery:
    """The `GradientSurgery` behind what ``accelerator.prepare`` made of it, which hides every method of ours.

    Call ``objective``, ``join``, ``combine`` and read ``record`` on what this returns; call ``step`` and ``zero_grad``
    on the prepared optimizer, which knows when a window of micro-batches ends::

        model, optimizer, loader = accelerator.prepare(model, gs.GRU(base, accumulate=True), loader)
        surgery = unwrap(optimizer)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = surgery.join(forget=forget_loss(model, batch), retain=retain_loss(model, batch))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    With contexts instead of ``join``, ``accumulate=True`` is not needed, and before clipping comes
    ``surgery.combine(scale=accelerator.scaler.get_scale())`` (``surgery.combine()`` where there is no scaler).

    Args:
        optimizer: From ``accelerator.prepare``, or of any other wrapper that keeps what it wraps as ``optimizer``; a
            `GradientSurgery` is returned as it is.

    Raises:
        TypeError: If there is no `GradientSurgery` behind it.

    Example:
        >>> import accelerate, gradsurgery as gs
        >>> surgery = gs.GRU(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
        >>> prepared = accelerate.Accelerator(cpu=True).prepare(surgery)
        >>> hasattr(prepared, "join"), unwrap(prepared) is surgery
        (False, True)
    """
    found = optimizer
    while not isinstance(found, GradientSurgery):
        found = getattr(found, "optimizer", None)
        if found is None:
            raise TypeError(
                "unwrap: expected a GradientSurgery, or what accelerator.prepare made of one, found "
                f"{type(optimizer).__name__}; wrap the base optimizer in gradsurgery.GradientSurgery before prepare()"
            )
    return found
