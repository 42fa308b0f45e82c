"""Gram matrix, rule and combination in three launches, for the rules that two rows' three inner products decide."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsurgery.gram.choice import chosen_device_kernel
from gradsurgery.gram.device import RULES
from gradsurgery.gram.rows import Row, check_blocks, check_rows, local_parts


@torch.no_grad()
def update_(
    rows: Sequence[Row], rule: str, *, blocks: Sequence[int] | None = None, num_blocks: int = 1
) -> tuple[Tensor, Tensor] | None:
    r"""Overwrite the forget row by a rule's update, where Triton's kernels can do all of it without the host.

    As `block_gram`, the rule, and `combine_blocks_` with its coefficients. The kernel that sums the products applies
    the rule, and the one that combines reads the coefficients on the device; where they are (1, 0) it reads no row.

    Args:
        rows: Two rows over P parameters; ``rows[0]`` is overwritten.
        rule: "sum", "gru" (of two rows it is "a_gem" too) or "pcgrad", as `gradsurgery.rules` has them.
        blocks: The block of each parameter; all in block 0 when None.
        num_blocks: S.

    Returns:
        Gram matrices ``[S, 2, 2]`` and coefficients ``[S, 2]``, float64 on the rows' device. None, and nothing is done,
        where "triton" was not chosen (see `gradsurgery.gram.backend`), the rule is another, there are not two rows, or
        the kernels do not take all tensors in one launch: of one device, each row of one type, contiguous, no shards,
        and none missing in the forget row alone.

    Raises:
        ValueError: As `block_gram`.
        RuntimeError: If "triton" was chosen and a tensor is on the CPU, or a CUDA graph is captured of what never ran.

    Cost: three launches; reads each row twice and writes one.
    """
    num_rows, num_parameters = check_rows(rows)
    check_blocks(blocks, num_parameters, num_blocks)
    if (kernel := chosen_device_kernel()) is None or rule not in RULES or num_rows != 2:
        return None
    members: list[tuple[int, list[Tensor | None]]] = []
    for index, (forget, retain) in enumerate(zip(*rows, strict=True)):
        if forget is None and retain is None:
            continue
        if forget is None:
            return None
        sharding, local = local_parts(forget, [forget, retain], index)
        if sharding is not None:
            return None
        members.append((index, local))
    batch = kernel.batch(members, blocks)
    if batch.left or len(batch.groups) != 1 or not batch.numbers:
        return None
    return kernel.update(batch, rule, num_blocks)
