"""Inner products and linear combinations of rows, for plain tensors, DTensors and every device.

A *row* is one objective's gradient: a list with one tensor (or ``None``) per parameter, never flattened into one
vector. A coordinate-free rule sees nothing of K rows but their Gram matrix ``gram[i, j] = <row_i, row_j>``, and it can
do nothing with them but a linear combination. This module computes the matrix and applies the combination.

There are three backends. Plain PyTorch works chunk by chunk on every device and type. Large float32 and bfloat16 rows
on a CPU are read once by a kernel, at the speed of the memory; a C++ compiler builds it in a second and its cache keeps
it. Triton's kernels take all tensors of a CUDA device in few launches; they run only where they are chosen. `backend`
says which one runs and why, and chooses.
"""

from __future__ import annotations

from gradsurgery.gram.choice import backend, kernel_number
from gradsurgery.gram.combination import combine_, combine_blocks_
from gradsurgery.gram.eager import chunk_size, chunks
from gradsurgery.gram.fused import update_
from gradsurgery.gram.products import block_gram, gram
from gradsurgery.gram.rows import Metric, Row, Write, check_rows, dtensor_type, local_parts, local_tensor, numbers_on
from gradsurgery.native import Backend

__all__ = [
    "Backend",
    "Metric",
    "Row",
    "Write",
    "backend",
    "block_gram",
    "check_rows",
    "chunk_size",
    "chunks",
    "combine_",
    "combine_blocks_",
    "dtensor_type",
    "gram",
    "kernel_number",
    "local_parts",
    "local_tensor",
    "numbers_on",
    "update_",
]
