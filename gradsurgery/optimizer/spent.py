"""Spent: gradients that stand in ``.grad`` and belong to no row to come, and what somebody else writes to them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor

from gradsurgery.gram import local_tensor


class Spent:
    """What stood in ``.grad`` at the latest look. It keeps no gradient alive."""

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref[Tensor] | None, int]] = []

    def look(self, parameters: Sequence[Tensor]) -> None:
        """Remember it."""
        gradients = [parameter.grad for parameter in parameters]
        self._seen = [
            (None, 0) if gradient is None else (weakref.ref(gradient), _version(gradient)) for gradient in gradients
        ]

    def written(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The gradients that were written since; the device is not asked."""
        unseen = [(None, 0)] * (len(parameters) - len(self._seen))  # of a parameter group that was added since
        found: list[Tensor] = []
        for parameter, (seen, version) in zip(parameters, [*self._seen, *unseen], strict=False):
            gradient = parameter.grad
            # Python has one plain weak reference of an object; a dead one is nobody else's.
            if gradient is not None and (weakref.ref(gradient) is not seen or _version(gradient) != version):
                found.append(gradient)
        return found


def zeroed(gradients: Sequence[Tensor]) -> bool:
    """Whether all are 0, as ``zero_grad(set_to_none=False)`` leaves them. The host waits for the device."""
    return not any(bool(local_tensor(gradient).any()) for gradient in gradients)


def _version(gradient: Tensor) -> int:
    # Autograd writes to a DTensor, FSDP2 to the local part of one; each counts what was written to itself.
    local = None if type(gradient) is Tensor else getattr(gradient, "_local_tensor", None)
    return sum(tensor._version for tensor in (gradient, local) if tensor is not None and not tensor.is_inference())
