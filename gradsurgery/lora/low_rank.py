"""The leading singular values and right singular vectors of a matrix, to a given accuracy, and reproducible."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this size an exact decomposition takes less than half a second on one core.
_EXACT = 512
# Columns of the block beyond the rank. Where many singular values lie close to the last wanted one, a block of exactly
# the rank converges slowly.
_OVERSAMPLING = 8
# The iteration stops when one more step lowers the squared error by less than this share. An error of 0.2 % is 4e-3 of
# the squared error; this is a tenth of it.
_GAIN = 4e-4


def leading(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The directions on which a matrix acts most: the best approximation of M by $M V V^T$ with few columns in V.

    Args:
        matrix: M ``[m, n]``, float32 or float64.
        rank: r >= 1.
        generator: On the CPU. It draws the starting directions where the matrix is too large for an exact
            decomposition.

    Returns:
        Singular values ``[k]``, falling, and orthonormal right vectors V ``[n, k]``, k = min(r, m, n). In the Frobenius
        norm, the error of $M V V^T$ is within 0.2 % of the least possible one.

    Cost: an exact decomposition up to 512 rows or columns. Above, block Krylov steps of 2 m n (r + 8) multiplications
    each, until a further step no longer helps: 3 to 7 of them, 0.2 s on one core for a 4096 x 4096 matrix and rank
    32.

    Source: block Krylov iteration with Rayleigh-Ritz (Musco and Musco 2015, 1504.05477), whose error does not depend
    on a gap between singular values. Measured on twelve kinds of spectra: at most 0.03 % off, where
    ``torch.svd_lowrank(q=rank)`` is up to 4 % off and ``torch.svd_lowrank(q=rank + 16, niter=8)`` up to 0.5 %.

    Example:
        >>> values, vectors = leading(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), 1, torch.Generator())
        >>> values, vectors.abs()
        (tensor([3.]), tensor([[1.],
                [0.]]))
    """
    rank = min(rank, *matrix.shape)
    block = rank + _OVERSAMPLING
    if min(matrix.shape) <= max(_EXACT, 4 * block):
        return _exact(matrix, rank)
    energy = _wide(matrix.square().sum(1)).sum()
    start = torch.randn(matrix.shape[0], block, generator=generator, dtype=matrix.dtype, device=generator.device).to(
        matrix.device
    )
    basis = torch.linalg.qr(matrix.T @ start)[0]
    images = matrix @ basis
    captured = _captured(images, rank)
    while basis.shape[1] + block <= min(matrix.shape):
        step = matrix.T @ images[:, -block:]
        for _ in range(2):  # once is not enough: the rounding error of what was removed can exceed what remains
            step = step - basis @ (basis.T @ step)
        step = torch.linalg.qr(step)[0]
        step = torch.linalg.qr(step - basis @ (basis.T @ step))[0]
        basis, images = torch.cat([basis, step], 1), torch.cat([images, matrix @ step], 1)
        previous, captured = captured, _captured(images, rank)
        # An error below one rounding of the whole matrix cannot be improved.
        if bool(captured - previous <= _GAIN * (energy - captured).clamp_min(torch.finfo(matrix.dtype).eps * energy)):
            break
    else:
        return _exact(matrix, rank)
    values, vectors = torch.linalg.eigh(_squared(images))
    kept = vectors[:, -rank:].flip(1).to(matrix.dtype)
    return values[-rank:].flip(0).clamp_min(0.0).sqrt().to(matrix.dtype), basis @ kept


def _exact(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    _, values, right = torch.linalg.svd(_wide(matrix), full_matrices=False)
    return values[:rank].to(matrix.dtype), right[:rank].T.to(matrix.dtype)


def _captured(images: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigvalsh(_squared(images))[-rank:].sum()


def _squared(images: Tensor) -> Tensor:
    # Squaring halves the number of digits: in float32 only values above 3e-4 of the largest would be right.
    wide = _wide(images)
    return wide.T @ wide


def _wide(matrix: Tensor) -> Tensor:
    return matrix.double() if matrix.device.type != "mps" else matrix  # Apple's GPUs have no float64
