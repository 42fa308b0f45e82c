"""Scaler: noticing a GradScaler that is about to step, because it says nothing to the optimizer that it steps."""

from __future__ import annotations

from types import FrameType

import torch

from gradsurgery.optimizer.capture import Phase, Window

_ORDER = (
    "call optimizer.combine(scale=scaler.get_scale()) after the last objective, and only then scaler.unscale_(optimizer), clipping and "
    "scaler.step(optimizer)"
)


def check_scaler(window: Window, asked: FrameType | None) -> None:
    """Refuse rows whose loss scale nobody said, when a GradScaler steps them.

    `torch.amp.GradScaler.step` asks the optimizer whether it unscales by itself, before anything else. That is when
    this is called. Lightning's plugins ask the same, also without a scaler, so the one who asks decides.

    Args:
        window: The rows.
        asked: The frame of the property that was read; the frame behind it is of the one who asks.

    Raises:
        RuntimeError: If the rows are not combined, were combined without a scale, or the scaler unscaled before that;
            nothing is stepped.
    """
    reader = None if asked is None else asked.f_back
    if reader is None or reader.f_code.co_name != "step":
        return
    scaler = reader.f_locals.get("self")
    if not isinstance(scaler, torch.amp.GradScaler):
        return
    if window.phase is not Phase.COMBINED:
        if window.slots:
            raise RuntimeError(
                f"GradScaler.step: expected combined rows, found rows of {list(window.slots)} that wait; {_ORDER}"
            )
        return  # nothing to step: that is said by step()
    if not window.scale_known:
        raise RuntimeError(
            "GradScaler.step: expected rows combined with their loss scale, found combine() without one, so that averages, max_norm and "
            f"the record are in scaled units; call zero_grad() and from now on: {_ORDER}"
        )
    state = reader.f_locals.get("optimizer_state") or {}
    if getattr(state.get("stage"), "name", None) == "UNSCALED" and not state.get("found_inf_per_device"):
        raise RuntimeError(
            f"GradScaler.step: expected scaler.unscale_ after combine(), found it before, when .grad was None; {_ORDER}"
        )
    incoming = window.joined.incoming
    if incoming is not None:
        window.joined.loss_scale = scaler.scale(torch.ones_like(incoming))
