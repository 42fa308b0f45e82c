"""All that changes while a step is being made, in one object that is changed in place."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gradsurgery.optimizer.capture import Phase, Slots
from gradsurgery.optimizer.record import Record
from gradsurgery.optimizer.update import Rows


@dataclass
class Combined:
    """What `combine` hands to `step`.

    Attributes:
        finite: Whether the update is finite, 0-dim bool.
        healthy: Whether each captured row is, ``[K]`` bool.
        rows: The rows; without their tensors where nothing after the base's step needs them.
    """

    finite: Tensor
    healthy: Tensor
    rows: Rows


@dataclass
class Window:
    """The micro-batches of one step."""

    slots: Slots = field(default_factory=Slots)
    combined: Combined | None = None
    record: Record | None = None

    def clear(self, phase: Phase = Phase.OPEN) -> None:
        """Forget the rows; the record stays for whoever reads it."""
        self.slots.clear(phase)
        self.combined = None
