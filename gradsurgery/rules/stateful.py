"""Rules with a memory: the protocol that the optimizer asks for, and GradVac."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradsurgery.rules._algebra import of_gram, vaccinated

_LARGEST = 1.0 - 1e-6  # of GradVac's targets


@runtime_checkable
class StatefulRule(Protocol):
    """A rule with a memory.

    `gradsurgery.GradientSurgery` calls `commit` after every step that happened, and saves the rule's state in its own
    ``state_dict``.
    """

    def __call__(self, gram: Tensor, /) -> Tensor:
        """The coefficients of the rows."""
        ...

    def commit(self) -> None:
        """Adopt the state that the latest call computed."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The committed state: plain numbers and lists."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class GradVac:
    r"""GradVac with a moving target: each protected row's target follows the cosines of earlier steps.

    The targets start at 0 and move by $t \leftarrow (1 - \beta) t + \beta \cos$. A call computes the new
    targets, and `commit` adopts them; the optimizer commits once for each step that happened. There is one target per
    protected row; in a scope of several blocks, one per block and protected row. Parallel rows bring it no nearer to 1
    than 1e-6: at 1 the correction of any other row would be infinite.

    Source: Gradient Vaccine (2010.05874), equations 3 and 4; the paper's beta is 1e-2, LibMTL's 0.5.

    Args:
        beta: Weight of the newest cosine, in [0, 1].

    Raises:
        ValueError: If ``beta`` is outside [0, 1].

    Example:
        >>> rule = GradVac(beta=0.5)
        >>> rule(torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64))
        tensor([1., 0.], dtype=torch.float64)
        >>> rule.commit()
        >>> rule.state_dict()
        {'target': [0.3]}
    """

    def __init__(self, beta: float = 1e-2) -> None:
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta: expected a weight in [0, 1], found {beta}")
        self.beta = beta
        self._target: Tensor | None = None
        self._proposed: Tensor | None = None

    def __call__(self, gram: Tensor, /) -> Tensor:
        """Coefficients ``[..., K]`` of ``gram [..., K, K]`` at the committed target.

        Raises:
            ValueError: If the committed target has another shape: the rule was used with other objectives or another
                scope.
        """

        def vaccinate(matrix: Tensor) -> Tensor:
            target = (
                matrix.new_zeros(matrix.shape[:-1])[..., 1:] if self._target is None else self._target.to(matrix.device)
            )
            if target.shape != (*matrix.shape[:-2], matrix.shape[-1] - 1):
                raise ValueError(
                    f"gram: expected the shape that this GradVac's target was made for, {list(target.shape)} targets, found "
                    f"{list(matrix.shape)}; make a new GradVac for other objectives or another scope"
                )
            coefficients, cosines = vaccinated(matrix, target)
            self._proposed = ((1.0 - self.beta) * target + self.beta * cosines).clamp(-_LARGEST, _LARGEST)
            return coefficients

        return of_gram(vaccinate)(gram)

    def commit(self) -> None:
        """Adopt the target that the latest call computed."""
        self._target, self._proposed = self._target if self._proposed is None else self._proposed, None

    def state_dict(self) -> dict[str, Any]:
        """The committed target as (nested) lists of numbers; None before the first step."""
        return {"target": None if self._target is None else self._target.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a target."""
        target = state_dict["target"]
        read = None if target is None else torch.tensor(target, dtype=torch.float64, device="cpu")
        self._target = None if read is None else read.clamp(-_LARGEST, _LARGEST)
        self._proposed = None
