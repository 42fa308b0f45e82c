"""PDU's multiplier of the retain loss: a number that is raised as long as that loss is above its limit."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


class DualVariable(nn.Module):
    r"""The weight $\lambda$ of the retain loss in PDU, raised while that loss is above a limit and lowered below it.

    $$\lambda \leftarrow \max(0,\; \lambda + \eta\,(L_\mathrm{retain} - \epsilon))$$

    It is the dual variable (Lagrange multiplier) of the constraint "retain loss <= limit". It is a number and not an
    optimizer: `gradsurgery.DualOptimizer`, which lets objectives take turns, has nothing to do with it.

    Forgetting under the constraint minimises ``forget_loss + dual.value * retain_loss``; the limit is a constant there.
    Call `update` once per optimizer step, with the retain loss's mean over the micro-batches and the processes of that
    step:

        loss = gs.losses.logit_margin(*tokens).mean() + dual.value * retain_loss
        loss.backward()
        optimizer.step()
        dual.update(mean_over_processes(retain_loss.detach()))  # for example self.all_gather(...).mean()

    The value is a Python float and not a buffer: it keeps its 53 bits whatever a model is cast to, and needs no device.
    A module that holds a ``DualVariable`` saves it in ``module.state_dict()``.

    Args:
        limit: $\epsilon$, the largest retain loss that is accepted, in its unit (nats per token for `cross_entropy`).
            It has no default: what can be kept depends on the model and the data.
        step_size: $\eta$, > 0, per optimizer step.
        initial: The value at the start, >= 0.

    Raises:
        ValueError: If a number is not finite or out of its range.

    Settings of the paper's scripts, with `logit_margin` as the forget loss:

    | settings | initial | step_size | limit | other |
    |---|---|---|---|---|
    | configuration | 1 | 1 | none | 5 warm-up epochs |
    | TOFU | 100 | 5 | 0.3 | lr 1e-5, 10 to 30 epochs |
    | MUSE (7B) | 50 | 1 | 1.5 News, 0.1 Books | |

    During the warm-up epochs the multiplier stands still: call `update` only after them.

    Source: PDU (primal-dual unlearning, 2506.05314) in open-unlearning. Difference from the authors' code: there each
    micro-batch of each process updates a multiplier of its own, so that eta grows with gradient accumulation and the
    processes drift apart; and nothing saves it, so that a resumed run starts again from the initial value. As in
    projected dual ascent, the multiplier is never negative.

    Example:
        >>> dual = DualVariable(limit=0.3, step_size=5.0, initial=1.0)
        >>> dual.update(0.7)
        >>> dual.value
        3.0
        >>> dual.update(0.0)
        >>> dual.value
        1.5
    """

    def __init__(self, limit: float, step_size: float = 1.0, initial: float = 0.0) -> None:
        super().__init__()
        if not math.isfinite(limit):
            raise ValueError(f"limit: expected a finite number, found {limit}")
        if not (step_size > 0 and math.isfinite(step_size)):
            raise ValueError(f"step_size: expected a finite number > 0, found {step_size}")
        self.limit = float(limit)
        self.step_size = float(step_size)
        self._value = _multiplier(initial, "initial")

    @property
    def value(self) -> float:
        """The weight of the retain loss, >= 0."""
        return self._value

    def update(self, loss: Tensor | float) -> None:
        """Move the value by one step of projected gradient ascent.

        Args:
            loss: The retain loss of the optimizer step that has just been taken, one number: its mean over
                micro-batches and processes, so that every process keeps the same value. A tensor on a GPU makes the
                call wait for it.

        Raises:
            ValueError: If the loss is not one finite number; the value stays as it was.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(
                f"loss: expected one number, found {list(loss.shape)}; pass the mean of the step's retain loss"
            )
        found = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if not math.isfinite(found):
            raise ValueError(
                f"loss: expected a finite number, found {found}; the value stays {self._value}, update after steps that happened"
            )
        self._value = max(0.0, self._value + self.step_size * (found - self.limit))

    def get_extra_state(self) -> dict[str, float]:
        """The value, for ``module.state_dict()``."""
        return {"value": self._value}

    def set_extra_state(self, state: Any) -> None:
        """Restore what ``get_extra_state`` returned.

        Raises:
            ValueError: If it is not a finite number >= 0; the value stays as it was.
        """
        if not isinstance(state, dict) or "value" not in state:
            raise ValueError(
                f"load_state_dict: expected the state of a DualVariable, {{'value': a number}}, found {state!r}"
            )
        self._value = _multiplier(state["value"], "load_state_dict: value")

    def extra_repr(self) -> str:
        """The arguments, with the current value."""
        return f"limit={self.limit}, step_size={self.step_size}, value={self._value}"


def _multiplier(value: Any, name: str) -> float:
    found = float(value)
    if not (found >= 0 and math.isfinite(found)):
        raise ValueError(f"{name}: expected a finite number >= 0, found {found}")
    return found
