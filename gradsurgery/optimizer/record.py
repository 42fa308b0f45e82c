"""Record: what happened in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsurgery.optimizer.rows import Rows
from gradsurgery.optimizer.update import Update


@dataclass(frozen=True)
class Record:
    """What one step measured and decided. Tensors stay on the parameters' device until somebody reads them.

    Everything is in unscaled units, whatever the loss scale of the step was.

    Attributes:
        objectives: The K names, in the order of the rows.
        gram: Gram matrix that the rule saw, float64: ``[K, K]`` in the global scope, ``[S, K, K]`` in a scope of S
            blocks.
        coefficients: ``[K]`` or ``[S, K]`` after ``max_norm``: the update is ``sum_k coefficients[k] * row_k``. Where
            an objective has both an EMA and an entry in ``add``, that multiple of its current row comes on top. None
            where the rule is elementwise (`gradsurgery.rules.elementwise`), because its update is no combination of the
            rows; everything else is then measured on the update itself.
        predicted_change: ``[K]``: minus the inner product of each row with the update. This is the first-order change
            of each objective per unit of learning rate under plain gradient descent (in the optimizer's metric, where
            the Gram matrix is).
        update_norm: Norm of the update, 0-dim, in the metric of the Gram matrix.
        blocks: Names of the S blocks, or None in the global scope.
        applied: Whether a step with this update happened (a GradScaler may skip it).
        actual_change: ``[K - 1]``: inner product of each protected row with the parameter change, measured after the
            base's step and the guard. It is the first-order change of that objective. None before the step, and without
            ``guard="measure"`` or ``"update"``.
        unguarded_change: ``[K - 1]``: the same before the guard corrected the change (equal to it with ``"measure"``).
        block_gram: Gram matrices of the R blocks of ``record_scope``, float64 ``[R, K, K]``, whatever the rule saw;
            they add up to the global one. The rows are those of ``gram``: a protected row is its average where it has
            one, else the current gradient. Entry ``[r, 0, k]`` is the G-effect (2502.19301) of block r: where it is
            below 0, a step along the first row raises objective k. None without ``record_scope``.
        block_names: Names of the R blocks.

    Example:
        >>> import gradsurgery as gs
        >>> weights = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gs.GRU(torch.optim.SGD([weights], lr=0.1))
        >>> optimizer.join(forget=3 * weights[0] - 4 * weights[1], retain=weights[1]).backward()
        >>> optimizer.record.gram.round(decimals=3)
        tensor([[25., -4.],
                [-4.,  1.]], dtype=torch.float64)
        >>> optimizer.record.coefficients.round(decimals=3), optimizer.record.conflict
        (tensor([1., 4.], dtype=torch.float64), True)
    """

    objectives: tuple[str, ...]
    gram: Tensor
    coefficients: Tensor | None
    predicted_change: Tensor
    update_norm: Tensor
    blocks: tuple[str, ...] | None = None
    applied: bool = False
    actual_change: Tensor | None = None
    unguarded_change: Tensor | None = None
    block_gram: Tensor | None = None
    block_names: tuple[str, ...] | None = None

    @property
    def norms(self) -> Tensor:
        """Length of each row, ``[K]`` or ``[S, K]``."""
        return self.gram.diagonal(dim1=-2, dim2=-1).sqrt()

    @property
    def cosines(self) -> Tensor:
        """Cosine of every pair of rows, ``[K, K]`` or ``[S, K, K]``; 0 where a row is 0."""
        return _cosines(self.gram)

    @property
    def block_cosines(self) -> Tensor | None:
        """As `cosines` for each block of ``record_scope``, ``[R, K, K]``; None without a ``record_scope``."""
        return None if self.block_gram is None else _cosines(self.block_gram)

    @property
    def conflict(self) -> bool:
        """Whether ``<row_0, row_k> < 0`` for any protected row in any block. Reading it waits for the device."""
        return bool((self.gram[..., 0, 1:] < 0.0).any())


def record_of(objectives: Sequence[str], rows: Rows, update: Update) -> Record:
    """The record of an update that is decided and not yet stepped."""
    one = rows.blocks.names is None
    coefficients = update.coefficients
    return Record(
        objectives=tuple(objectives),
        gram=update.gram[0] if one else update.gram,
        coefficients=coefficients[0] if one and coefficients is not None else coefficients,
        predicted_change=update.predicted_change,
        update_norm=update.norm,
        blocks=rows.blocks.names,
        block_gram=update.block_gram,
        block_names=None if rows.record_blocks is None else rows.record_blocks.names or ("global",),
    )


def _cosines(gram: Tensor) -> Tensor:
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = norms[..., :, None] * norms[..., None, :]
    return torch.where(lengths == 0.0, 0.0, gram / torch.where(lengths == 0.0, 1.0, lengths))
