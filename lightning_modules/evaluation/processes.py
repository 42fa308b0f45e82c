"""Work that the processes of a `torch.distributed` group share, with the same result as in one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def several() -> bool:
    """Whether this process is one of a group of at least two."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the first of its group, or has none."""
    return not several() or dist.get_rank() == 0


def first_process() -> bool:
    """Whether this process will be the first of its group, known before there is one.

    Lightning starts the other processes of a run with the same command. They train and score, and write nothing.
    """
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def every_process(work: Callable[[], T]) -> list[T]:
    """Runs the work in every process of the group, and gives all of them what each one found, by rank.

    An error in one is an error in all, so that nobody waits for a process that has gone on to the next thing. What is found
    is pickled. A process that is killed is noticed by the backend, at once (gloo) or when its timeout is over (NCCL).

    Raises:
        RuntimeError: if the work failed in another process. In the process where it failed, its own error is raised.
    """
    if not several():
        return [work()]
    found: list[T] = []
    failure: Exception | None = None
    try:
        found.append(work())
    except Exception as error:
        failure = error
    everything: list[tuple[list[T], str]] = [([], "")] * dist.get_world_size()
    dist.all_gather_object(everything, (found, "" if failure is None else f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    for rank, (_, said) in enumerate(everything):
        if said:
            raise RuntimeError(f"process {rank} of {len(everything)} failed, so this one stops too: {said}")
    return [result for results, _ in everything for result in results]


def from_first(work: Callable[[], T]) -> T:
    """Runs the work in the first process while the others wait, and gives all of them what it found.

    Raises:
        RuntimeError: as `every_process`.
    """
    results = every_process(lambda: [work()] if is_first() else [])
    return results[0][0]


def dealt(lengths: Sequence[int], batch_size: int, work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """Deals whole batches to the processes: the batches that one process would make, so that every number stays the same.

    A batch is `batch_size` entries that follow each other in the order of falling length, which is how `over_answer_tokens`
    and `generate_greedily` make theirs; process r of W takes batches r, r + W, and so on, so that all get long and short ones.

    Args:
        lengths: of n entries, the same in every process.
        batch_size: entries a batch.
        work: from the indices of some entries to one result each, in batches as above.

    Returns:
        n results in the order of the entries, in every process.

    Raises:
        RuntimeError: if the work failed in another process, or if the processes were not given the same lengths.

    Example:
        >>> dealt([3, 1, 2], 2, lambda indices: [10 * index for index in indices])
        [0, 10, 20]
    """
    if not several():
        return list(work(list(range(len(lengths)))))
    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = [index for batch in batches[dist.get_rank() :: dist.get_world_size()] for index in batch]
    shares = every_process(lambda: (list(lengths), dict(zip(mine, work(mine), strict=True))))
    if any(seen != shares[0][0] for seen, _ in shares):
        raise RuntimeError(
            "expected every process to score the same texts, found others in "
            f"{sum(seen != shares[0][0] for seen, _ in shares)} of {len(shares)}: give all of them the same splits"
        )
    results = {index: result for _, share in shares for index, result in share.items()}
    return [results[index] for index in range(len(lengths))]
