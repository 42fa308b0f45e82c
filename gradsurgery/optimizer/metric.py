"""The metric: the inner product in which conflict is measured, if it is the base optimizer's own or a user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from gradsurgery.gram import Metric, dtensor_type

UserMetric: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]
"""A user's own metric: the parameters -> for each the diagonal of the inner product, a tensor like the parameter with
weights > 0, or None where it is Euclidean. It is asked whenever rows are combined: once a step, or
with ``accumulate`` and `join` once a micro-batch."""

MetricOption: TypeAlias = Literal["euclidean", "optimizer"] | UserMetric
"""What ``metric`` may be."""

# What their step does to a gradient is no diagonal matrix that one tensor of their state describes.
_WITHOUT_DIAGONAL = ("Adadelta", "Adafactor", "Muon", "Rprop")


def check_metric(metric: MetricOption, base: torch.optim.Optimizer) -> None:
    """Check the option, and refuse ``"optimizer"`` where the base's own metric is not a diagonal that its state holds.

    Raises:
        ValueError: If there is no such metric; for Adadelta, Adafactor, Muon, Rprop, and RMSprop with ``centered``.
    """
    if metric == "euclidean" or callable(metric):
        return
    if metric != "optimizer":
        raise ValueError(
            f"metric: expected 'euclidean' or 'optimizer', found {metric!r}; a metric of your own is a function of the parameters"
        )
    without = tuple(kind for name in _WITHOUT_DIAGONAL if (kind := getattr(torch.optim, name, None)) is not None)
    if isinstance(base, without) or any(group.get("centered") for group in base.param_groups):
        raise ValueError(
            "metric='optimizer': expected a base whose state holds a second moment (Adam, AdamW, NAdam, RAdam, Adamax, "
            f"RMSprop, Adagrad) or SGD, found {type(base).__name__}; use metric='euclidean', and guard='update' for a "
            "promise about the step itself"
        )


def metric_of(option: MetricOption, base: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Metric | None:
    """The metric of the coming step; None is the Euclidean one.

    Raises:
        ValueError: If a user's metric is no list of tensors like the parameters.
    """
    if option == "euclidean":
        return None
    if option == "optimizer":
        return optimizer_metric(base, parameters)
    return _users_metric(option, parameters)


def _users_metric(metric: UserMetric, parameters: Sequence[Tensor]) -> Metric:
    DTensor = dtensor_type()

    def layout(tensor: Tensor) -> object:
        sharding = tensor.placements if DTensor is not None and isinstance(tensor, DTensor) else None
        return tensor.shape, tensor.device, sharding

    weights = list(metric(parameters))
    if len(weights) != len(parameters):
        raise ValueError(
            f"metric: expected a tensor or None for each of {len(parameters)} parameters, found {len(weights)}"
        )
    for index, (weight, parameter) in enumerate(zip(weights, parameters, strict=True)):
        if weight is None:
            continue
        if not isinstance(weight, Tensor) or layout(weight) != layout(parameter) or parameter.is_complex():
            found = f"{list(weight.shape)} on {weight.device}" if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(
                f"metric: expected weights like parameter {index}, real, {list(parameter.shape)} on {parameter.device} and sharded as it "
                f"is, found {found}; None stands for weights of 1"
            )

    def chosen(index: int) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        weight = weights[index]
        return None if weight is None else (weight.detach(), lambda found: found)

    return chosen


def optimizer_metric(base: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Metric | None:
    """The base's preconditioner as a metric, from its state before the coming step.

    Args:
        base: The base optimizer.
        parameters: Its parameters, in order.

    Returns:
        None (Euclidean) for SGD and before the first step; for a parameter also while RAdam steps without its second
        moment. The metric raises a RuntimeError for a parameter whose state holds no second moment known here.
    """
    if isinstance(base, (torch.optim.SGD, torch.optim.ASGD)) or not base.state:
        return None
    groups = [group for group in base.param_groups for _ in group["params"]]

    def weights(index: int) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        state, group = base.state.get(parameters[index]), groups[index]
        if not state:
            return None  # this parameter's first step
        eps = group.get("eps", 0.0)
        if "exp_avg_sq" in state and "step" in state and "betas" in group:  # Adam's, and not only a name of it
            # In float64, because 1 - 0.999 ** step would keep only a few digits of a float32 step count's power.
            step = state["step"]
            step = step.double() if isinstance(step, Tensor) else step
            unbiased = 1.0 - group["betas"][1] ** step
            moment = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]

            def adam(v: Tensor) -> Tensor:
                return 1.0 / ((v / unbiased).sqrt() + eps)

            if not isinstance(base, torch.optim.RAdam):
                return moment, adam
            rectified = _rectified(step + 1, group["betas"][1])
            if isinstance(rectified, Tensor) and rectified.device.type != "cpu":  # the host does not wait for it
                return moment, lambda v: torch.where(rectified, adam(v), 1.0)
            return (moment, adam) if rectified else None
        if "exp_inf" in state:
            return state["exp_inf"], lambda v: 1.0 / v.clamp_min(eps)
        if "square_avg" in state:
            return state["square_avg"], lambda v: 1.0 / (v.sqrt() + eps)
        if "sum" in state:
            # Adagrad has a state from its construction on. A fused one counts on the device, which is not asked.
            step = state["step"]
            if not isinstance(step, Tensor) or step.device.type == "cpu":
                return None if step == 0 else (state["sum"], lambda v: 1.0 / (v.sqrt() + eps))
            return state["sum"], lambda v: torch.where(step == 0, 1.0, 1.0 / (v.sqrt() + eps))
        raise RuntimeError(
            "metric='optimizer': expected exp_avg_sq with Adam's step and betas, exp_inf, square_avg or sum in the state of "
            f"{type(base).__name__}, found {sorted(map(str, state))}; use metric='euclidean'"
        )

    return weights


def _rectified(step: Any, beta2: float) -> Any:
    r"""Whether RAdam's step t divides by its second moment (1908.03265, algorithm 2, but 5 as in torch, not 4).

    $$\rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t) > 5, \quad \rho_\infty = 2 / (1 - \beta_2) - 1$$
    """
    power = beta2**step
    return 2.0 / (1.0 - beta2) - 1.0 - 2.0 * step * power / (1.0 - power) > 5.0
