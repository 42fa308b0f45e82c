r"""Perturbation: an objective's gradient taken not at the weights, but at weights moved along a direction.

The gradient of a forget loss says little about what a short fine-tuning would bring back. Taken at the weights where
the model would remember best, it removes that too. With g the gradient of any loss (the *direction*, usually the
cross-entropy of the forget answers) and a radius $\rho$, the row is the gradient at

$$\theta' = \theta - \rho \, g / \|g\|_2 ,$$

and the step is taken from $\theta$. Source: SAM for unlearning (2502.05374), $\theta' = \theta + \rho \, g_f / \|g_f\|$
with $g_f$ the gradient of the forget loss itself and a radius of 0.01. Here the direction is any loss. A radius that
answers a relearning attack is about as long as the way that the attack moves the weights, 30 to 100 times theirs. The
weights are restored from a copy, bit for bit; the authors' code moves them back, which rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gradsurgery.gram import block_gram, local_tensor

Scale = Literal["global", "tensor"]

DIRECTION = "the direction of a perturbation"
"""What the direction is called among the captured rows, as no objective is."""


class Perturbation:
    """Moves the weights along a direction for the time of one objective, and restores them bit for bit.

    `GradientSurgery.perturbed` makes it. First the direction is captured, then an objective is entered ``at`` it::

        perturbed = optimizer.perturbed(radius=0.5)
        with perturbed.direction():
            cross_entropy(model, forget_batch).backward()
        with optimizer.objective("forget", at=perturbed):
            forget_loss(model, forget_batch).backward()  # forward and backward pass inside

    Each direction serves one objective, and every step needs a new one. Its length does not matter: neither a loss
    scale nor a division by the number of micro-batches changes where the weights go. A direction that is not finite
    makes a row that is not finite, which a GradScaler skips and `GradientSurgery.step` refuses. A direction of zero
    moves nothing.

    Weights of 16 bits move by whole units in their last place: a radius that is small beside their number is rounded
    away.

    Args:
        parameters: Returns the optimizer's parameters.
        capture: The context that captures the direction.
        take: Takes what it captured, a tensor or None per parameter; None where nothing was.
        radius: How far the weights move, see the attribute.
        scale: In what unit, see the attribute.

    Attributes:
        scale: With ``"global"`` the radius is the Euclidean length of the move over all weights. With ``"tensor"`` each
            tensor moves along its own part of the direction by the radius times its own length, which no rescaling of
            a layer changes.

    Raises:
        ValueError: If the radius is not a positive number, or the scale is unknown.

    Cost: the direction is one more backward pass. While it is captured it takes the place of a row; then one copy of
    the moved parameters is held until they are restored.
    """

    def __init__(
        self,
        parameters: Callable[[], Sequence[Tensor]],
        capture: Callable[[], AbstractContextManager[None]],
        take: Callable[[], list[Tensor | None] | None],
        step: Callable[[], int],
        *,
        radius: float,
        scale: Scale = "global",
    ) -> None:
        if scale not in get_args(Scale):
            raise ValueError(f"scale: expected one of {', '.join(get_args(Scale))}, found {scale!r}")
        self._parameters, self._capture, self._take, self._step = parameters, capture, take, step
        self.scale: Scale = scale
        self.radius = radius
        self._direction: list[Tensor | None] | None = None
        self._taken = 0  # the step of the direction

    @property
    def radius(self) -> float:
        """How far the weights move, in the unit that `scale` says. A schedule sets it between steps."""
        return self._radius

    @radius.setter
    def radius(self, value: float) -> None:
        if not 0.0 < value < float("inf"):
            raise ValueError(f"radius: expected a positive number, found {value}")
        self._radius = float(value)

    @contextmanager
    def direction(self) -> Generator[None]:
        """What ``backward()`` writes to ``.grad`` inside this context is the direction, which the weights descend.

        Several backward passes inside it add up. Rows that were captured before stay as they are.

        Raises:
            RuntimeError: As `GradientSurgery.objective`: in the middle of an objective, where ``.grad`` holds gradients
                of none, and if no parameter gets a gradient.
        """
        self._direction = None
        with self._capture():
            yield
        self._direction, self._taken = self._take(), self._step()

    def check(self) -> None:
        """Refuse to move without a direction.

        Raises:
            RuntimeError: If none was captured in this step, or since the last time that the weights were moved.
        """
        if self._direction is None or self._taken != self._step():
            raise RuntimeError(
                "objective: expected a direction to move the weights along, found none; run the backward pass of its loss inside "
                "perturbed.direction() before (each direction serves one objective of one step)"
            )

    @contextmanager
    def moved(self) -> Generator[None]:
        """Inside, the weights are theta'. Afterwards they are theta again, whatever happened inside.

        A graph that was built outside must not run its backward pass inside, nor the other way round. Autograd refuses
        it, because weights that it saved have changed; not under FSDP2, which gathers them anew.

        Raises:
            RuntimeError: As `check`.
        """
        self.check()
        parts, self._direction = self._direction or [], None
        # A parameter that came after the direction has no part of it.
        pairs = [(weight, part) for weight, part in zip(self._parameters(), parts, strict=False) if part is not None]
        with torch.no_grad():
            # Of shards each rank moves its own: torch has no such operations on lists of DTensors.
            weights, move = [local_tensor(weight) for weight, _ in pairs], [local_tensor(part) for _, part in pairs]
            before = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                _set_length_(pairs, self._radius, self.scale)
                torch._foreach_sub_(weights, move)  # pyright: ignore[reportPrivateUsage]
            del parts, pairs, move
            torch.clear_autocast_cache()  # it holds 16-bit copies of the weights as they were
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, before)  # pyright: ignore[reportPrivateUsage]
            torch.clear_autocast_cache()


@dataclass(frozen=True)
class Perturbed:
    """A loss for `GradientSurgery.join`, which computes it in its backward pass, at weights moved along a direction.

    The joint scalar does not contain its value, because the loss is not known before.

    Attributes:
        loss: Computes the objective's loss, one number.
        direction: Computes the loss whose gradient is the direction, one number.
        at: How far the weights move.

    Example:
        >>> import gradsurgery as gs
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1), rule="sum")
        >>> squares = lambda: weight.square().sum() / 2  # its gradient is the weights themselves
        >>> forget = gs.Perturbed(loss=squares, direction=lambda: weight[0], at=optimizer.perturbed(radius=0.5))
        >>> optimizer.join(forget=forget, retain=0.0 * weight.sum()).backward()
        >>> weight.grad, weight.data
        (tensor([0.5000, 1.0000]), tensor([1., 1.]))
    """

    loss: Callable[[], Tensor]
    direction: Callable[[], Tensor]
    at: Perturbation


def _set_length_(pairs: Sequence[tuple[Tensor, Tensor]], radius: float, scale: Scale) -> None:
    """Give the direction, the second of each pair, the length of the move, in place."""
    each = scale == "tensor"
    lengths = _lengths([part for _, part in pairs], each=each)
    unit = _lengths([weight for weight, _ in pairs], each=True) if each else torch.ones_like(lengths)
    # A NaN stays one; a direction of zero, which has no length to divide by, moves nothing.
    factors = radius * unit / torch.where(lengths == 0.0, 1.0, lengths)
    for (_, part), factor in zip(pairs, factors.expand(len(pairs)), strict=True):
        local = local_tensor(part)
        local.mul_(factor.to(local.device))


def _lengths(row: Sequence[Tensor], *, each: bool) -> Tensor:
    """The Euclidean length of a row, ``[1]``, or of each of its tensors; over all ranks where it is sharded."""
    blocks = range(len(row)) if each else None
    return block_gram([list(row)], blocks=blocks, num_blocks=len(row) if each else 1).flatten().sqrt()
