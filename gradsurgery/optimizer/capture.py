"""Capture: how the backward passes of one step become rows.

Inside ``optimizer.objective("retain")`` every ``p.grad`` *is* the tensor of the retain row, and on exit it is taken
out of ``.grad``. Nothing is copied and no hook is installed, and gradients add up in place over micro-batches. Whatever
acts on ``.grad`` during a backward pass (DDP's reducer, FSDP2, gradient checkpointing, compiled graphs, tied weights)
does to the row what it would do to an ordinary gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor

from gradsurgery.gram import dtensor_type
from gradsurgery.optimizer.clipping import rows_are_taken, rows_wait
from gradsurgery.optimizer.join import ANOTHER_TERM, OPTIONS, Joined
from gradsurgery.optimizer.record import Record
from gradsurgery.optimizer.rows import Rows
from gradsurgery.optimizer.spent import Spent, zeroed
from gradsurgery.optimizer.update import Update
from gradsurgery.optimizer.wrapper import parameters_of

_STRAY = (
    "expected every .grad to be None, found gradients that no objective wrote; call zero_grad(), and run every backward pass inside an "
    "objective"
)


class Phase(Enum):
    """Where a window stands, and so what ``.grad`` holds outside the contexts."""

    OPEN = "rows are being captured; .grad holds nothing"
    COMBINED = "the rows are combined; .grad holds the update"
    CLOSED = "a step happened or .grad was zeroed; what .grad holds is spent"


def check_objectives(objectives: Sequence[str]) -> tuple[str, ...]:
    """The objectives' names.

    Raises:
        ValueError: If they are not distinct strings, if there is none, or if one is an option of `join`.
    """
    names = tuple(objectives)
    if isinstance(objectives, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"objectives: expected distinct names, the rectified one first, found {objectives!r}")
    if bad := [name for name in names if not isinstance(name, str) or name in OPTIONS]:
        raise ValueError(
            f"objectives: expected strings that are no options of join ({', '.join(OPTIONS)}), found {bad}; choose other names"
        )
    return names


class Window:
    """All micro-batches of one step: the rows captured so far, where the step stands, and what ``combine`` hands on.

    It is changed in place and never replaced, because Lightning calls the optimizer's methods on a proxy.

    Attributes:
        slots: The captured rows by objective: for each parameter the tensor that was its ``.grad``, or None.
        phase: Where the step stands.
        active: The objective whose context is open.
        joined: What ``join`` knows of its micro-batches.
        spent: What ``.grad`` holds that is in no row to come.
        scale_known: Whether the rows were combined with their loss scale.
        candidates: The next averages by objective, made of rows that `EMA.fold` took out of their slots.
        combined: What ``combine`` hands to ``step``.
        record: Of the latest ``combine``; it outlives the window.
        number: Of the step: it grows whenever the rows are forgotten.
    """

    def __init__(self) -> None:
        self.slots: dict[str, list[Tensor | None]] = {}
        self.phase = Phase.OPEN
        self.active: str | None = None
        self.joined = Joined()
        self.spent = Spent()
        self.scale_known = False
        self.candidates: dict[str, list[Tensor | None]] = {}
        self.combined: tuple[Rows, Update] | None = None
        self.record: Record | None = None
        self.number = 0

    def clear(self, phase: Phase = Phase.OPEN) -> None:
        """Forget every row; the record stays for whoever reads it."""
        self.slots.clear()
        self.phase = phase
        self.active = None
        self.joined.clear()
        self.scale_known = False
        self.candidates.clear()
        self.combined = None
        self.number += 1
        rows_are_taken(self)

    @contextmanager
    def capture(
        self,
        name: str,
        parameters: Sequence[Tensor],
        *,
        objectives: Sequence[str],
        accumulate: bool,
        agree: Callable[[str | None], None],
    ) -> Generator[None]:
        """Let the backward passes inside write, or add to, the row called ``name``.

        Args:
            name: The objective.
            parameters: Every parameter, in the rows' order.
            objectives: All names.
            accumulate: Whether a row may grow after it was combined (the option of that name).
            agree: Called first, with the problem if there is one, which it raises on every rank.

        Raises:
            RuntimeError: If objectives are nested; if ``.grad`` holds a gradient that belongs to no objective; if the
                rows were combined and not yet stepped, without ``accumulate``; if no parameter got a gradient; if a
                gradient is sparse. After the last two every slot is empty and every ``.grad`` None, with the parameters
                untouched.
        """
        agree(self._problem_entering(name, parameters, accumulate=accumulate))
        rows_are_taken(self)
        slot = self.slots.get(name, [])
        slot += [None] * (len(parameters) - len(slot))  # a parameter group was added since
        for parameter, gradient in zip(parameters, slot, strict=True):
            parameter.grad = gradient
        self.active = name
        try:
            yield
            captured = [_owned(parameter.grad, name) for parameter in parameters]
            if all(gradient is None for gradient in captured):
                raise RuntimeError(_no_gradient(name, parameters))
        except BaseException:
            # A backward pass that broke off has already added to the slot: the window cannot be saved, the parameters
            # can.
            self.clear()
            raise
        else:
            self.slots[name] = captured
            self.phase, self.active = Phase.OPEN, None
            if self.slots.keys() >= set(objectives):
                rows_wait(self, parameters)
        finally:
            for parameter in parameters:
                parameter.grad = None

    def rows(self, objectives: Sequence[str], number: int) -> list[list[Tensor | None]]:
        """The slots' own lists in the objectives' order, filled up to ``number`` parameters (some may be new)."""
        for slot in self.slots.values():
            slot += [None] * (number - len(slot))
        return [self.slots[name] for name in objectives]

    def hand_to_step(self, rows: Rows, update: Update, gradients: Sequence[Tensor | None], *, keep_slots: bool) -> None:
        """Write the update to ``.grad``, and keep what ``step`` reads.

        Args:
            rows: The rows.
            update: What was decided.
            gradients: The update, one tensor or None per parameter.
            keep_slots: Whether the rows may grow after this.
        """
        self.combined = rows, update
        rows_are_taken(self)
        for parameter, gradient in zip(rows.parameters, gradients, strict=True):
            parameter.grad = gradient
        if not keep_slots:
            self.slots.clear()
        self.phase = Phase.COMBINED

    def rows_to_step(self, objectives: Sequence[str], parameters: Sequence[Tensor]) -> Rows:
        """The rows that ``combine`` left, if the base may step with the update in ``.grad``. It waits for the device.

        Raises:
            FloatingPointError: If the update is not finite.
            RuntimeError: If there is no update, or a joint loss was not divided by the number of micro-batches.
        """
        if self.combined is None:
            raise RuntimeError("step: expected rows that combine() left, found none; call zero_grad() and start again")
        rows, update = self.combined
        # Two questions to the device, and one answer: the only one that a step waits for.
        if not bool(update.finite & ~self.joined.undivided(update.finite.device)):
            update.check_finite(objectives)
            self.joined.refuse_undivided()
        if all(parameter.grad is None for parameter in parameters):
            raise RuntimeError(
                "step: expected the update in .grad, found none, so something zeroed it after combine(); to drop a batch call "
                "optimizer.zero_grad(), which forgets the rows too (model.zero_grad() does not)"
            )
        return rows

    def refuse_another_term(self, parameters: Sequence[Tensor]) -> None:
        """Refuse gradients that were written since the latest look; the rows are forgotten, so that nobody can step.

        Autograd runs what was built last first, so that a term added to the joint scalar writes before or after it.

        Raises:
            RuntimeError: If there are any.
        """
        written = self.spent.written(parameters)
        if written and not zeroed(written):
            self.clear()
            raise RuntimeError(ANOTHER_TERM)

    def refuse_stray(self, what: str, parameters: Sequence[Tensor]) -> None:
        """Refuse gradients of no objective that were added to spent ones; the next capture would throw them away.

        Raises:
            RuntimeError: If there are any.
        """
        if self._added_to_spent(parameters):
            raise RuntimeError(f"{what}: {_STRAY}")

    def _added_to_spent(self, parameters: Sequence[Tensor]) -> bool:
        """Whether somebody added to the gradients of a step that is over. An update that was zeroed is one of these."""
        # An update that waits for its step may be clipped, and rows captured again with accumulate.
        written = [] if self.phase is Phase.OPEN else self.spent.written(parameters)
        zero = bool(written) and zeroed(written)
        if self.phase is Phase.COMBINED and (zero or all(parameter.grad is None for parameter in parameters)):
            self.clear(Phase.CLOSED)  # model.zero_grad() after a step that a GradScaler skipped: these rows were spent
        return self.phase is Phase.CLOSED and bool(written) and not zero

    def refuse_change(self, option: str, parameters: Sequence[Tensor]) -> None:
        """Refuse to change an option that the rows of this step are measured or combined with.

        Raises:
            RuntimeError: If a row is captured, or an update waits for its step.
        """
        if self._waits(parameters):
            raise RuntimeError(
                f"{option}: expected to be set between steps, found rows of {list(self.slots) or 'a step'} that are captured and not "
                "stepped; set it after step() or zero_grad()"
            )

    def refuse_direct_step(self, base: torch.optim.Optimizer) -> None:
        """Refuse a step of the base that goes around the rows.

        Raises:
            RuntimeError: If a row is captured, or an update waits for its step.
        """
        if self._waits(parameters_of(base)):
            raise RuntimeError(
                f"step() was called on the base optimizer {type(base).__name__} while rows wait: call it on the GradientSurgery, which "
                "combines the rows, guards the change and keeps averages and record (and zero_grad() too); nothing was stepped"
            )

    def _waits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether a row is captured, or an update waits for its step."""
        if self.phase is Phase.COMBINED:
            return self.active is not None or any(parameter.grad is not None for parameter in parameters)
        return self.active is not None or bool(self.slots)

    def refuse_inside(self, what: str) -> None:
        """Refuse what ends or empties the step while an objective is being captured.

        Raises:
            RuntimeError: If one is.
        """
        if self.active is not None:
            raise RuntimeError(
                f"{what}: expected to be called outside of objectives, found it inside {self.active!r}, whose row is not complete; leave "
                "the context first"
            )

    def problem_stepping(self, objectives: Sequence[str]) -> str:
        """What is wrong where no objective ran."""
        return (
            f"step: expected a backward pass for each of {list(objectives)} since the last step, found none; run them inside "
            "optimizer.objective(name), or call backward() on optimizer.join(...)"
        )

    def problem_combining(self, objectives: Sequence[str], parameters: Sequence[Tensor]) -> str | None:
        """Why the rows cannot be combined now; None if they can."""
        if missing := [name for name in objectives if name not in self.slots]:
            return (
                f"combine: expected a backward pass for each of {list(objectives)} since the last step, found none for "
                f"{missing}; run it inside optimizer.objective(name)"
            )
        # Gradients of no objective in .grad would be overwritten by the update.
        return f"combine: {_STRAY}" if any(parameter.grad is not None for parameter in parameters) else None

    def _problem_entering(self, name: str, parameters: Sequence[Tensor], *, accumulate: bool) -> str | None:
        """Why this objective cannot be entered now; None if it can."""
        if self.active is not None:
            return (
                f"objective {name!r}: expected to be entered outside any other, found inside {self.active!r}; a backward pass belongs to "
                "one objective, so leave the first context before entering the next"
            )
        held = any(parameter.grad is not None for parameter in parameters)
        stray = self._added_to_spent(parameters) or (self.phase is Phase.OPEN and held)
        if self.phase is Phase.COMBINED and not accumulate:
            return (
                f"objective {name!r}: entered after the rows were combined and before step(); pass accumulate=True to GradientSurgery to "
                "combine after every micro-batch (join does), or call combine() once, after the last"
            )
        return f"objective {name!r}: {_STRAY}" if stray else None


def _owned(gradient: Tensor | None, name: str) -> Tensor | None:
    """The gradient as a tensor without a graph, and that no later backward pass writes to."""
    if gradient is None:
        return None
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"objective {name!r}: expected dense gradients, found a sparse one of shape {list(gradient.shape)}; build the embedding with "
            "sparse=False"
        )
    DTensor = dtensor_type()
    if DTensor is not None and isinstance(gradient, DTensor):
        return gradient.detach() if gradient.requires_grad else gradient
    # DDP's gradient_as_bucket_view=True hands out views of buckets that the next backward pass overwrites. A bucket may
    # be as large as its only parameter, so that its size alone does not tell.
    shared = gradient._is_view() or gradient.untyped_storage().nbytes() > gradient.numel() * gradient.element_size()
    gradient = gradient.clone() if shared else gradient
    return gradient.detach() if gradient.requires_grad else gradient  # of a backward pass with create_graph=True


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
