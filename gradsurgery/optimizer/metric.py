"""The base optimizer's own inner product, read from its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradsurgery.gram import Metric

# Their step is not a diagonal matrix times the gradient that one tensor of their state describes.
_WITHOUT_DIAGONAL = ("Adadelta", "Adafactor", "Muon", "Rprop")


def check_metric(base: torch.optim.Optimizer) -> None:
    """Refuse ``metric="optimizer"`` where the optimizer's own metric is not a diagonal that its state holds.

    Raises:
        ValueError: For Adadelta, Adafactor, Muon, Rprop, and RMSprop with ``centered``.
    """
    without = tuple(kind for name in _WITHOUT_DIAGONAL if (kind := getattr(torch.optim, name, None)) is not None)
    if isinstance(base, without) or any(group.get("centered") for group in base.param_groups):
        raise ValueError(
            "metric='optimizer': expected a base whose state holds a second moment (Adam, AdamW, NAdam, RAdam, Adamax, "
            f"RMSprop, Adagrad) or SGD, found {type(base).__name__}; use metric='euclidean', and guard='update' for a "
            "promise about the step itself"
        )


def optimizer_metric(base: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Metric | None:
    """The base's preconditioner, from its state before the coming step; None (Euclidean) for SGD and before the first step.

    Raises:
        RuntimeError: When it is asked for a parameter whose state holds no second moment known here.
    """
    if isinstance(base, (torch.optim.SGD, torch.optim.ASGD)) or not base.state:
        return None
    groups = [group for group in base.param_groups for _ in group["params"]]

    def weights(index: int) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        state, group = base.state.get(parameters[index]), groups[index]
        if not state or ("sum" in state and state["step"] == 0):
            return None  # this parameter's first step (Adagrad makes its state when it is constructed)
        eps = group.get("eps", 0.0)
        if "exp_avg_sq" in state:
            # In float64: 1 - 0.999 keeps three digits of a float32 step's power.
            unbiased = 1.0 - group["betas"][1] ** torch.as_tensor(state["step"], dtype=torch.float64)
            moment = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
            return moment, lambda v: 1.0 / ((v / unbiased).sqrt() + eps)
        if "exp_inf" in state:
            return state["exp_inf"], lambda v: 1.0 / v.clamp_min(eps)
        for key in ("square_avg", "sum"):
            if key in state:
                return state[key], lambda v: 1.0 / (v.sqrt() + eps)
        raise RuntimeError(
            "metric='optimizer': expected exp_avg_sq, exp_inf, square_avg or sum in the state of "
            f"{type(base).__name__}, found {sorted(map(str, state))}; use metric='euclidean'"
        )

    return weights
