"""Join: one scalar whose single backward pass captures every row, for trainers that own the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gradsurgery.gram import numbers_on
from gradsurgery.optimizer.perturbation import Perturbation, Perturbed
from gradsurgery.optimizer.trunk import Shared, Trunk

OPTIONS = ("features", "batched", "retain_graph", "scale")
"""Keywords of `GradientSurgery.join`, which no objective can be called."""

ANOTHER_TERM = (
    "join: expected its backward pass to be the only one that writes .grad, found a gradient that came from elsewhere, as from a term "
    "added to the joint loss (a regulariser, say): it would be in no row; add the term to one of the losses, as in "
    "join(forget=forget_loss, retain=retain_loss + term), and call zero_grad()"
)


class Joined:
    """What `join` knows of the micro-batches of one window, and a mistake that it notices.

    Attributes:
        number: Micro-batches captured so far.
        explicit: Whether they came with the loss scale that their incoming gradients carry; None before the first.
        incoming: The latest incoming gradient, 0-dim, from the second micro-batch on, if the loss scale is not given.
        total: The sum of the incoming gradients, if the loss scale is not given.
        loss_scale: What an undivided loss would bring as its incoming gradient: 1, or a GradScaler's scale.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A new window."""
        self.number = 0
        self.explicit: bool | None = None
        self.incoming: Tensor | None = None
        self.total: Tensor | None = None
        self.loss_scale: float | Tensor = 1.0

    def add(self, gradient: Tensor, scale: float | Tensor | None) -> float | Tensor:
        """Count a micro-batch.

        Args:
            gradient: Its incoming gradient.
            scale: The loss scale, where that was given.

        Returns:
            What the rows must be divided by. An incoming gradient is the loss scale times the micro-batch's share of
            the step, usually one over their number, and the rows are sums of gradients times these: over the sum of
            the shares so far they are means. With a given scale they stay sums.
        """
        self.number += 1
        if scale is not None:
            return scale
        self.incoming = gradient if self.number > 1 else None
        self.total = gradient if self.total is None else self.total + gradient
        return self.total

    def undivided(self, device: torch.device) -> Tensor:
        """Whether a loss was not divided by the number of micro-batches, as far as its gradient tells, 0-dim bool."""
        if self.incoming is None:
            return torch.zeros((), dtype=torch.bool, device=device)
        incoming = numbers_on(device, self.incoming)
        return incoming == numbers_on(device, self.loss_scale)

    def refuse_undivided(self) -> None:
        """Say what is wrong where `undivided` is True.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "step: expected the incoming gradient of join's backward to be the loss scale divided by the number of micro-batches, found "
            f"the loss scale itself in micro-batch {self.number}; divide each loss by the number of micro-batches, as in "
            "(optimizer.join(...) / micro_batches).backward(), or say join(..., scale=1.0) (the loss scale) where rows are to be summed; "
            "nothing was stepped and zero_grad() recovers"
        )

    def refuse_mixture(self, scale: float | Tensor | None) -> None:
        """Refuse micro-batches with and without a given loss scale in one window.

        Raises:
            RuntimeError: If there are both.
        """
        explicit = scale is not None
        if self.explicit not in (None, explicit):
            raise RuntimeError(
                f"join: expected scale= in every micro-batch of a window or in none, found {'one with' if explicit else 'one without'} "
                f"after {self.number} {'without' if explicit else 'with'}; call zero_grad() and say it in all"
            )
        self.explicit = explicit


class Enter(Protocol):
    """The context that captures the row of a name, at moved weights or not."""

    def __call__(self, name: str, *, at: Perturbation | None = None) -> AbstractContextManager[None]:
        """Make it."""
        ...


class Stages(NamedTuple):
    """What the backward pass of a joint scalar calls, in this order.

    Attributes:
        begin: First.
        arm: With each loss before its backward pass.
        objective: The context that captures the row of a name.
        finish: With the scalar's incoming gradient, when every row is captured.
        end: When the whole backward pass that the scalar is part of is over.
    """

    begin: Callable[[], None]
    arm: Callable[[Tensor], None]
    objective: Enter
    finish: Callable[[Tensor], None]
    end: Callable[[], None]


def join(
    losses: Mapping[str, Tensor | Perturbed],
    objectives: Sequence[str],
    stages: Stages,
    *,
    device: torch.device,
    retain_graph: bool,
    shared: Shared | None = None,
) -> Tensor:
    """The scalar that `GradientSurgery.join` returns.

    Args:
        losses: A loss for each objective.
        objectives: The names, the rectified one first.
        stages: What its backward pass calls.
        device: Of the parameters.
        retain_graph: Keep the graphs until the last of the backward passes.
        shared: The features that all losses are computed from.

    Raises:
        ValueError: If an objective is missing or unknown, or a loss is not a single number, and as `Trunk`.
        RuntimeError: If a loss has no graph, and as `Trunk`.
    """
    if set(losses) != set(objectives):
        raise ValueError(f"join: expected one loss for each of {list(objectives)}, found {list(losses)}")
    known = {name: loss for name, loss in losses.items() if not isinstance(loss, Perturbed)}
    for name, loss in known.items():
        _check_number(name, loss)
    if not torch.is_grad_enabled():
        return _total(known, device)  # validation: there is nothing to capture
    for name, loss in known.items():
        _check_graph(name, loss)
    # A perturbed row moves the weights, after which no graph that holds them can run: the losses that are here go
    # first. Of each kind the rectified one is the last.
    names = sorted((*objectives[1:], objectives[0]), key=lambda name: name not in known)
    ordered = {name: losses[name] for name in names}
    autocast = _autocast_now(device.type)

    trunk = None if shared is None else Trunk(shared, known)
    keep = retain_graph or trunk is not None
    if trunk is not None and trunk.whole is not None:
        trunk = None  # whole backward passes, one after another, are exact for every graph

    def backward(gradient: Tensor) -> None:
        stages.begin()
        if trunk is not None:
            trunk.run_heads({name: known[name] for name in ordered if name in known}, gradient, keep_graph=retain_graph)
        for name, loss in ordered.items():
            if isinstance(loss, Perturbed):
                _run_perturbed(name, loss, gradient, stages, autocast)
                continue
            stages.arm(loss)
            with stages.objective(name):
                if trunk is not None:
                    trunk.write(name)
                else:
                    _run(loss, gradient, keep_graph=keep and name != names[len(known) - 1])
        stages.finish(gradient)
        torch.autograd.Variable._execution_engine.queue_callback(stages.end)  # pyright: ignore[reportPrivateUsage]

    total = _total(known, device)
    return _Join.apply(backward, total, torch.zeros_like(total, requires_grad=True))


def _run(loss: Tensor, gradient: Tensor, *, keep_graph: bool = False) -> None:
    torch.autograd.backward(loss, gradient.to(loss).reshape(loss.shape), retain_graph=keep_graph)


def _run_perturbed(
    name: str, loss: Perturbed, gradient: Tensor, stages: Stages, autocast: AbstractContextManager[Any]
) -> None:
    """Compute and differentiate the direction, and then the loss at the weights that it leads to."""
    for context, compute in (
        (loss.at.direction, loss.direction),
        (partial(stages.objective, name, at=loss.at), loss.loss),
    ):
        with context():
            # A backward pass runs without gradients and, on a GPU, in a thread that knows no autocast.
            with torch.enable_grad(), autocast:
                value = compute()
            _check_number(name, value)
            _check_graph(name, value)
            stages.arm(value)
            _run(value, gradient)


def _autocast_now(device: str) -> AbstractContextManager[Any]:
    """Enters the autocast that is on now, whenever and wherever it is entered."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


def _check_number(name: str, loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"join: expected a loss of one number for {name!r}, found {found}; take its mean or sum first")


def _check_graph(name: str, loss: Tensor) -> None:
    if not loss.requires_grad:
        raise RuntimeError(
            f"join: expected the loss of {name!r} to depend on trainable parameters, found one without a graph"
        )


class _Join(torch.autograd.Function):
    """The losses are no inputs of the function, because autograd would hand them one shared backward pass."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[[Tensor], None], total: Tensor, _anchor: Tensor) -> Tensor:
        ctx.run = backward
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.run(gradients[0])
        return None, None, None


def _total(losses: Mapping[str, Tensor], device: torch.device) -> Tensor:
    # A float64 model needs a float64 scalar: 1 / number of micro-batches comes back through its gradient.
    dtype = torch.float64 if any(loss.dtype == torch.float64 for loss in losses.values()) else torch.float32
    if not losses:  # all are perturbed
        return torch.zeros((), dtype=dtype, device=device)
    return torch.stack([loss.detach().to(dtype).reshape(()) for loss in losses.values()]).sum()
