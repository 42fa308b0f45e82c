# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
"""Triton kernels over lists of tensors that are read at their addresses: no copy, no concatenation.

A *table* has a line of addresses for each parameter: K rows' tensors, 0 where there is none, and then those that
overwrite rows. A program takes one chunk of one parameter. The addresses are whole numbers in memory; `int.to(pointer)`
makes pointers of them on a device and in Triton's interpreter alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether Triton runs in its interpreter (TRITON_INTERPRET=1), on CPU tensors: tests without a GPU."""

CHUNK = 1 << 15
"""Numbers of each row that a program takes. A lane of float32 sums adds at most 32 products one after another."""

LANES = {number: 2048 if number <= 2 else 1024 if number <= 4 else 512 for number in range(1, 9)}
"""Numbers of each row that a program takes at once, by K. The sums of all pairs are in registers: of more, fewer."""

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_WARPS = 8


def products(
    table: Tensor, sizes: Tensor, chunks: Tensor, rows: tuple[int, tuple[torch.dtype, ...], bool], writes: tuple
) -> Tensor:
    """Float32 sums of the products of every pair of rows, for each chunk, after the writes.

    Args:
        table: Addresses, int64 ``[M, K + W]``.
        sizes: Numbers that each parameter has, int64 ``[M]``.
        chunks: Each chunk's parameter and its number there, int32 ``[C, 2]``.
        rows: K, the type of each column of the table, and whether all its addresses are multiples of 16.
        writes: For each of the W last columns the row that it overwrites, the weight, and whether it is stored, as
            `Write` has them.

    Returns:
        ``[K (K + 1) / 2, C]``.
    """
    number, dtypes, aligned = rows
    # PyTorch's allocator hands the same memory out again on every call, and a graph that is captured its own.
    partial = torch.empty(number * (number + 1) // 2, len(chunks), dtype=torch.float32, device=table.device)
    with torch.cuda.device_of(table):  # Triton launches on the current device, wherever the tensors are
        _products[(len(chunks),)](
            table, sizes, chunks, partial, len(chunks), K=number, TYPES=tuple(TYPES[dtype] for dtype in dtypes),
            WRITES=writes, ALIGNED=aligned, CHUNK=CHUNK, BLOCK=LANES[number], num_warps=_WARPS,
        )  # fmt: skip
    return partial


def sums(partial: Tensor, begins: Tensor, total: Tensor, coefficients: Tensor | None, rule: str, add: bool) -> None:
    """Sum the chunks of each block in float64, and apply a rule where there is one.

    Args:
        partial: From `products`.
        begins: Where the chunks of each block begin, and the last one's end, int32 ``[S + 1]``.
        total: The Gram matrices, float64 ``[S, K, K]``.
        coefficients: What the rule answers, float64 ``[S, 2]``; None without a rule.
        rule: One of `RULES`, or "" for none.
        add: Whether to add to what ``total`` holds; it is overwritten if not.
    """
    number = total.shape[-1]
    block = 2048 if number <= 2 else 512 if number <= 4 else 256
    with torch.cuda.device_of(partial):
        _sums[(len(begins) - 1,)](
            partial, begins, total, total if coefficients is None else coefficients, partial.shape[1],
            K=number, RULE=rule, ADD=add, BLOCK=block, num_warps=_WARPS,
        )  # fmt: skip


def combine(
    table: Tensor,
    sizes: Tensor,
    chunks: Tensor,
    blocks: Tensor,
    coefficients: Tensor,
    rows: tuple[int, tuple[torch.dtype, ...], bool, bool],
) -> None:
    """Overwrite the first tensor of each line of the table by the combination of all.

    Args:
        table: Addresses, int64 ``[M, K]``.
        sizes: As `products` has them.
        chunks: As `products` has them.
        blocks: The block of each parameter, int32 ``[M]``.
        coefficients: Float64 ``[S, K]``.
        rows: As `products` has them, and whether coefficients (1, 0, ..., 0) mean that nothing need be read.
    """
    number, dtypes, aligned, skip = rows
    with torch.cuda.device_of(table):
        _combine[(len(chunks),)](
            table, sizes, chunks, blocks, coefficients, K=number, TYPES=tuple(TYPES[dtype] for dtype in dtypes),
            ALIGNED=aligned, SKIP=skip, CHUNK=CHUNK, BLOCK=LANES[1], num_warps=_WARPS,
        )  # fmt: skip


@triton.jit
def _places(table, at, begin, COLUMNS: tl.constexpr, TYPES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Of each column, its address, and pointers to the first numbers of a chunk."""
    line = ()
    places = ()
    for column in tl.static_range(COLUMNS):
        address = tl.load(table + at + column)
        pointer = address.to(tl.pointer_type(TYPES[column]))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        line = line + (address,)
        places = places + (pointer + (begin + tl.arange(0, BLOCK)),)
    return line, places


# In both passes a mask is alike for all lanes but in a parameter's last numbers: where it may differ from lane to lane,
# each lane loads for itself, instead of 16 bytes at once. It is made of a block of addresses, because the interpreter
# cannot spread a bool.
@triton.jit
def _multiplied(
    sums, line, places, start, mine,
    K: tl.constexpr, TYPES: tl.constexpr, WRITES: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    inside = start + tl.arange(0, BLOCK) < mine
    rows = ()
    for k in tl.static_range(K):
        there = tl.full([BLOCK], line[k], tl.int64) != 0
        if MASKED:
            there = there & inside
        x = tl.load(places[k] + start, mask=there, other=0.0).to(tl.float32)
        for w in tl.static_range(len(WRITES)):
            if WRITES[w][0] == k:
                there = tl.full([BLOCK], line[K + w], tl.int64) != 0
                if MASKED:
                    there = there & inside
                y = tl.load(places[K + w] + start, mask=there, other=0.0).to(tl.float32)
                if WRITES[w][1] is None:
                    written = y - x
                elif WRITES[w][1] < 0.5:
                    written = x + WRITES[w][1] * (y - x)
                else:
                    written = y - (y - x) * (1.0 - WRITES[w][1])
                written = written.to(TYPES[k])
                if WRITES[w][2]:
                    tl.store(places[k] + start, written, mask=there)
                x = tl.where(there, written.to(tl.float32), x)  # rounded as what is stored
        rows = rows + (x,)
    added = ()
    for i in tl.static_range(K):
        for j in tl.static_range(i, K):
            added = added + (sums[i * K - i * (i - 1) // 2 + j - i] + rows[i] * rows[j],)
    return added


@triton.jit
def _piece(sizes, chunks, CHUNK: tl.constexpr):
    # This program's piece: of which parameter, from where on, and how many numbers.
    member = tl.load(chunks + 2 * tl.program_id(0))
    begin = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    return member, begin, tl.minimum(tl.load(sizes + member) - begin, CHUNK).to(tl.int32)


@triton.jit(do_not_specialize=["number"])
def _products(
    table, sizes, chunks, partial, number,
    K: tl.constexpr, TYPES: tl.constexpr, WRITES: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    member, begin, mine = _piece(sizes, chunks, CHUNK)
    columns: tl.constexpr = K + len(WRITES)
    line, places = _places(table, member.to(tl.int64) * columns, begin, columns, TYPES, ALIGNED, BLOCK)
    sums = ()
    for _ in tl.static_range(K * (K + 1) // 2):
        sums = sums + (tl.full([BLOCK], 0.0, tl.float32),)
    whole = mine // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        sums = _multiplied(sums, line, places, start, mine, K, TYPES, WRITES, False, BLOCK)
    if whole < mine:
        sums = _multiplied(sums, line, places, whole, mine, K, TYPES, WRITES, True, BLOCK)
    for pair in tl.static_range(K * (K + 1) // 2):
        tl.store(partial + pair * number + tl.program_id(0), tl.sum(sums[pair], 0))


@triton.jit(do_not_specialize=["number"])
def _sums(
    partial, begins, total, coefficients, number,
    K: tl.constexpr, RULE: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    first, last = tl.load(begins + block), tl.load(begins + block + 1)
    found = ()
    for _ in tl.static_range(K * (K + 1) // 2):
        found = found + (tl.full([BLOCK], 0.0, tl.float64),)
    for begin in range(first, last, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        added = ()
        for pair in tl.static_range(K * (K + 1) // 2):
            part = tl.load(partial + pair * number + at, mask=at < last, other=0.0)
            added = added + (found[pair] + part.to(tl.float64),)
        found = added
    mine = total + block * K * K
    for i in tl.static_range(K):
        for j in tl.static_range(i, K):
            value = tl.sum(found[i * K - i * (i - 1) // 2 + j - i], 0)
            if ADD:
                value += tl.load(mine + i * K + j)
            tl.store(mine + i * K + j, value)
            if i != j:
                tl.store(mine + j * K + i, value)
    if RULE != "":
        a, b = _decided(tl.sum(found[0], 0), tl.sum(found[1], 0), tl.sum(found[2], 0), RULE)
        tl.store(coefficients + 2 * block, a)
        tl.store(coefficients + 2 * block + 1, b)


@triton.jit
def _ratio(numerator, denominator):
    return tl.where(denominator == 0.0, 0.0, numerator / tl.where(denominator == 0.0, 1.0, denominator))


@triton.jit
def _decided(ff, fr, rr, RULE: tl.constexpr):
    # `gradsurgery.rules` on two rows. Where a number is not finite, no coefficient is.
    wrong = (ff - ff) + (fr - fr) + (rr - rr)
    conflict = tl.where(fr < 0.0, -fr, 0.0)
    if RULE == "sum":
        a, b = 1.0 + wrong, 1.0 + wrong
    elif RULE == "gru":
        a, b = 1.0 + wrong, _ratio(conflict, rr) + wrong
    else:
        tl.static_assert(RULE == "pcgrad")
        a, b = 1.0 + _ratio(conflict, ff) + wrong, 1.0 + _ratio(conflict, rr) + wrong
    return a, b


@triton.jit
def _combined(
    line, places, numbers, start, mine,
    K: tl.constexpr, TYPES: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    inside = start + tl.arange(0, BLOCK) < mine
    for k in tl.static_range(K):
        there = tl.full([BLOCK], line[k], tl.int64) != 0
        if MASKED:
            there = there & inside
        term = tl.load(places[k] + start, mask=there, other=0.0).to(tl.float32) * numbers[k]
        if k == 0:
            target, total = there, term
        else:
            total += term
    tl.store(places[0] + start, total.to(TYPES[0]), mask=target)


@triton.jit
def _combine(
    table, sizes, chunks, blocks, coefficients,
    K: tl.constexpr, TYPES: tl.constexpr, ALIGNED: tl.constexpr, SKIP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    member, begin, mine = _piece(sizes, chunks, CHUNK)
    line, places = _places(table, member.to(tl.int64) * K, begin, K, TYPES, ALIGNED, BLOCK)
    at = coefficients + tl.load(blocks + member) * K
    numbers = (tl.load(at).to(tl.float32),)
    changes = (numbers[0] != 1.0).to(tl.int32)
    for k in tl.static_range(1, K):
        # A row that is not there adds nothing, whatever its coefficient.
        numbers = numbers + (tl.where(line[k] == 0, 0.0, tl.load(at + k)).to(tl.float32),)
        changes += (numbers[k] != 0.0).to(tl.int32)
    if SKIP and changes == 0:
        return
    whole = mine // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _combined(line, places, numbers, start, mine, K, TYPES, False, BLOCK)
    if whole < mine:
        _combined(line, places, numbers, whole, mine, K, TYPES, True, BLOCK)
