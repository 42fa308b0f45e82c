"""Slots: how rows are captured from ``.grad``, accumulated, and refused when they cannot be trusted.

Inside ``capture("retain")`` every ``p.grad`` *is* the retain slot; on exit it is swapped out. Nothing is copied and no hook is
installed, gradients add up in place over micro-batches, and everything that acts on ``.grad`` during a backward pass (DDP's reducer,
FSDP2, gradient checkpointing, compiled graphs, tied weights) does to the row what it would do to an ordinary gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from enum import Enum

from torch import Tensor

from gradsurgery.gram import dtensor_type

_STRAY = (
    "expected every .grad to be None, found gradients that no objective wrote; call zero_grad(), and run every backward pass inside an "
    "objective"
)


class Phase(Enum):
    """Where a window (all micro-batches of one step) stands, and so what ``.grad`` holds outside the contexts."""

    OPEN = "rows are being captured; .grad holds nothing"
    COMBINED = "the rows are combined; .grad holds the update"
    CLOSED = "a step happened or .grad was zeroed; what .grad holds is spent"


class Slots:
    """The rows of one window, by objective: for each parameter the tensor that was its ``.grad``, or None."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor | None]] = {}
        self.phase = Phase.OPEN
        self.active: str | None = None
        self.joins = 0  # micro-batches whose rows join() has added up
        self.folded: dict[str, list[Tensor | None]] = {}  # what has become of rows that EMA.fold took

    def clear(self, phase: Phase = Phase.OPEN) -> None:
        """Forget every row."""
        self.rows.clear()
        self.phase = phase
        self.active = None
        self.joins = 0
        self.folded.clear()

    @contextmanager
    def capture(
        self, name: str, parameters: Sequence[Tensor], *, accumulate: bool, agree: Callable[[str | None], None]
    ) -> Generator[None]:
        """Let the backward passes inside write, or add to, the row called ``name``.

        Args:
            name: The objective.
            parameters: Every parameter, in the rows' order.
            accumulate: Whether a row may grow after it was combined (the caller kept it).
            agree: Called first, with the problem if there is one; it raises then, on every rank.

        Raises:
            RuntimeError: If objectives are nested; if ``.grad`` holds a gradient that belongs to no objective; if the rows were combined
                and not yet stepped, without ``accumulate``; if no parameter got a gradient; if a gradient is sparse. Every slot is
                then empty and ``.grad`` None, parameters untouched.
        """
        agree(self._entering(name, parameters, accumulate=accumulate))
        slot = self.rows.get(name, [])
        slot += [None] * (len(parameters) - len(slot))  # a parameter group was added since
        for parameter, gradient in zip(parameters, slot, strict=True):
            parameter.grad = gradient
        self.active = name
        try:
            yield
            captured = [_own(parameter.grad, name) for parameter in parameters]
            if all(gradient is None for gradient in captured):
                raise RuntimeError(_no_gradient(name, parameters))
        except BaseException:
            # A backward pass that broke off has already added to the slot: the window cannot be saved, the parameters can.
            self.clear()
            raise
        else:
            self.rows[name] = captured
            self.phase, self.active = Phase.OPEN, None
        finally:
            for parameter in parameters:
                parameter.grad = None

    def _entering(self, name: str, parameters: Sequence[Tensor], *, accumulate: bool) -> str | None:
        """Why this objective cannot be entered now, if it cannot."""
        if self.active is not None:
            return (
                f"objective {name!r}: expected to be entered outside any other, found inside {self.active!r}; a backward pass belongs to "
                "one objective, so leave the first context before entering the next"
            )
        held = any(parameter.grad is not None for parameter in parameters)
        if self.phase is Phase.COMBINED and not held:
            self.clear()  # model.zero_grad() after a step that a GradScaler skipped: these rows were spent
        if self.phase is Phase.COMBINED and not accumulate:
            return (
                f"objective {name!r}: entered after the rows were combined and before step(); pass accumulate=True to GradientSurgery to "
                "combine after every micro-batch (join does), or call combine() once, after the last"
            )
        return f"objective {name!r}: {_STRAY}" if self.phase is Phase.OPEN and held else None

    def combining(self, objectives: Sequence[str], parameters: Sequence[Tensor]) -> str | None:
        """Why the rows cannot be combined now, if they cannot."""
        if missing := [name for name in objectives if name not in self.rows]:
            return (
                f"combine: expected a backward pass for each of {list(objectives)} since the last step, found none for "
                f"{missing}; run it inside optimizer.objective(name)"
            )
        # The update would overwrite them.
        return f"combine: {_STRAY}" if any(parameter.grad is not None for parameter in parameters) else None


def _own(gradient: Tensor | None, name: str) -> Tensor | None:
    """The gradient as a tensor that no later backward pass writes to."""
    if gradient is None:
        return None
    if gradient.is_sparse or gradient.layout.__str__() == "torch.sparse_csr":
        raise RuntimeError(
            f"objective {name!r}: expected dense gradients, found a sparse one of shape {list(gradient.shape)}; build the embedding with "
            "sparse=False"
        )
    DTensor = dtensor_type()
    if DTensor is not None and isinstance(gradient, DTensor):
        return gradient
    # DDP's gradient_as_bucket_view=True hands out views of buckets that the next backward pass overwrites. A bucket may be as large as its
    # only parameter, so that its size alone does not tell.
    shared = gradient._is_view() or gradient.untyped_storage().nbytes() > gradient.numel() * gradient.element_size()
    return gradient.clone() if shared else gradient


def _no_gradient(name: str, parameters: Sequence[Tensor]) -> str:
    found = f"objective {name!r}: expected a backward pass to reach at least one parameter, found no gradient"
    DTensor = dtensor_type()
    if DTensor is not None and any(isinstance(parameter, DTensor) for parameter in parameters):
        return (
            f"{found}; under FSDP2 this means that gradient sync is off, which would mix the objectives: leave "
            "set_requires_gradient_sync at True (Accelerate: sync_each_batch=True)"
        )
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters):
        return (
            f"{found}; a post-accumulate-grad hook took it (an optimizer step in the backward pass?): surgery needs all rows before any "
            "step, so remove the hook"
        )
    return f"{found}; did the context contain a backward() of a loss that depends on the parameters, and zero_grad() stay outside it?"
