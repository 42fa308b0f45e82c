"""Linear combinations of rows, written into the first of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.gram.choice import kernel_for
from gradsurgery.gram.device import DeviceKernel
from gradsurgery.gram.eager import combine_on_device, combine_on_host
from gradsurgery.gram.rows import Row, check_blocks, check_rows, local_parts


def combine_(rows: Sequence[Row], coefficients: Tensor) -> list[Tensor | None]:
    r"""Overwrite the first row by $\sum_k c_k\, \mathrm{row}_k$.

    Args:
        rows: K rows over the same parameters. Tensors of ``rows[0]`` are overwritten in place, so no other row may
            share their memory. Where it holds None and another row does not, a new tensor is put there, so ``rows[0]``
            must then be a list.
        coefficients: The c_k, ``[K]``.

    Returns:
        ``rows[0]``.

    Raises:
        ValueError: If the rows differ in length or ``coefficients`` is not ``[K]``.

    Where a parameter has no gradient in any row it stays None. Low-precision rows are combined in float32 and rounded
    once. A NaN coefficient gives NaN, and so does 0 times inf.

    Cost: reads every row once and writes one; no temporaries beyond one chunk.

    Example:
        >>> forget, retain = [torch.tensor([3.0, 0.0]), None], [torch.tensor([-1.0, 2.0]), torch.tensor([1.0])]
        >>> combine_([forget, retain], torch.tensor([1.0, 2.0]))
        [tensor([1., 4.]), tensor([2.])]
    """
    if coefficients.shape != (len(rows),):
        raise ValueError(
            f"coefficients: expected one for each of {len(rows)} rows, [{len(rows)}], found {list(coefficients.shape)}"
        )
    return combine_blocks_(rows, coefficients[None])


@torch.no_grad()
def combine_blocks_(
    rows: Sequence[Row], coefficients: Tensor, *, blocks: Sequence[int] | None = None, finite: bool = False
) -> list[Tensor | None]:
    """As `combine_` with one set of coefficients for each block of parameters.

    Args:
        rows: K rows over P parameters; ``rows[0]`` is overwritten.
        coefficients: ``[S, K]``.
        blocks: The block of each parameter; all in block 0 when None.
        finite: Whether rows with the coefficient 0 are known to be finite, as they are where the coefficients come from
            a Gram matrix. Triton's kernels read nothing then where the coefficients are (1, 0, ..., 0).

    Returns:
        ``rows[0]``.

    Raises:
        ValueError: As `combine_`, or if a parameter's block is none of the S. Nothing is overwritten then.
        RuntimeError: If Triton's kernels were chosen and a tensor is on the CPU. Nothing is overwritten then.
    """
    num_rows, num_parameters = check_rows(rows)
    if coefficients.dim() != 2 or coefficients.shape[1] != num_rows:
        raise ValueError(
            f"coefficients: expected [S, {num_rows}], one for each block and row, found {list(coefficients.shape)}"
        )
    check_blocks(blocks, num_parameters, len(coefficients))
    first = rows[0]
    members: list[tuple[int, list[Tensor | None]]] = []
    given: dict[int, Tensor] = {}
    for index, tensors in enumerate(map(list, zip(*rows, strict=True))):
        placed = tensors[0]
        if placed is None:
            placed = next((tensor for tensor in tensors if tensor is not None), None)
        if placed is None:
            continue
        if tensors[0] is None:
            if not isinstance(first, list):
                raise TypeError(
                    f"rows[0]: expected a list, because it is given a tensor at {index}, found {type(first).__name__}"
                )
            tensors[0] = given[index] = torch.zeros_like(placed)
        members.append((index, local_parts(placed, tensors, index)[1]))
    # On an accelerator the coefficients stay where they are, because reading them would make the host wait.
    on_host = coefficients.device.type == "cpu"
    by_kernel = kernel_for([members], blocks, device=coefficients.device)
    if isinstance(first, list):
        for index, tensor in given.items():
            first[index] = tensor
    if by_kernel is not None:
        kernel, (batch,) = by_kernel
        kernel.combine(batch, coefficients.double(), **({"skip": finite} if isinstance(kernel, DeviceKernel) else {}))
        members = batch.left
    numbers = coefficients.tolist() if on_host else None
    for index, local in members:
        block = 0 if blocks is None else blocks[index]
        target = local[0]
        assert target is not None
        others = [(k, other) for k, other in enumerate(local) if k > 0 and other is not None]
        if numbers is not None:
            combine_on_host(target, numbers[block][0], [(numbers[block][k], other) for k, other in others])
        else:
            row = coefficients[block].to(target.device)
            combine_on_device(target, row[0], [(row[k], other) for k, other in others])
    return first if isinstance(first, list) else list(first)
