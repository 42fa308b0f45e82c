"""Lets the processes of a `torch.distributed` group share work, with the same result as in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
)

_INTERACTIVE = ("bash", "interactive")  # names of jobs in which Lightning takes a process for one that is alone

T = TypeVar("T")


def several() -> bool:
    """Whether this process belongs to a group of at least two."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the first of its group, or has no group.

    Before the group exists every process has none, so this is True in each of them: ask `will_be_first` there.
    """
    return not several() or dist.get_rank() == 0


def will_be_first() -> bool:
    """Whether this process will be the first of its group, read from the environment before the group exists.

    The others train and score, and write nothing. Once the group exists, `is_first` asks the group itself.
    """
    return rank_ahead() == 0


def rank_ahead() -> int:
    """The rank that this process will have in its group, as Lightning will find it; 0 for a process that is alone.

    | launched by | read from |
    |---|---|
    | torchrun, `accelerate launch` | `RANK`, which counts over all machines, unlike `LOCAL_RANK` |
    | Lightning itself, from the first process of each machine | `NODE_RANK` and `LOCAL_RANK` |
    | srun | `SLURM_PROCID`; not in an interactive shell, where Lightning does not listen to Slurm either |
    | jsrun, mpirun | Lightning's `LSFEnvironment` and `MPIEnvironment`; the second needs mpi4py |

    Every task of a Slurm array is a job of its own, whose first process has rank 0. What Lightning starts on a machine
    knows its place there, and not how many there are on the other machines: its rank here is 0 or a number above.
    """
    environment = os.environ
    if "RANK" in environment:
        return int(environment["RANK"])
    if "LOCAL_RANK" in environment or "NODE_RANK" in environment:
        lightning = LightningEnvironment()
        return lightning.node_rank() + lightning.local_rank()
    if "SLURM_NTASKS" in environment and SLURMEnvironment.job_name() not in _INTERACTIVE:
        return int(environment.get("SLURM_PROCID", 0))
    if LSFEnvironment.detect():
        return int(environment["JSM_NAMESPACE_RANK"])
    return MPIEnvironment().global_rank() if MPIEnvironment.detect() else 0


def processes_ahead() -> int:
    """How many processes there will be, read from the environment as `rank_ahead` reads the rank; 1 for one alone.

    A Lightning that starts processes itself says so only to those that it starts: options tell the first. What a Slurm
    job's script starts without srun is alone, however many tasks the job may have.
    """
    environment = os.environ
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    if {"SLURM_NTASKS", "SLURM_PROCID"} <= environment.keys() and SLURMEnvironment.job_name() not in _INTERACTIVE:
        return int(environment["SLURM_NTASKS"])
    if LSFEnvironment.detect():
        return int(environment["JSM_NAMESPACE_SIZE"])
    return MPIEnvironment().world_size() if MPIEnvironment.detect() else 1


def every_process(work: Callable[[], T]) -> list[T]:
    """Runs the work in every process of the group, and returns the results of all, by rank, in each of them.

    If the work fails in one process, all raise, so that none waits for a process that will not come. Results are
    pickled. If a process is killed, the backend raises in the others, at once (gloo) or after its timeout (NCCL).

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
    """Runs the work in the first process while the others wait, and returns its result in all of them.

    Raises:
        RuntimeError: as `every_process`.
    """
    results = every_process(lambda: [work()] if is_first() else [])
    return results[0][0]


def dealt(
    lengths: Sequence[int], batches: Sequence[Sequence[int]], work: Callable[[list[Sequence[int]]], Sequence[T]]
) -> list[T]:
    """Divides batches among the processes, so that every number is the same as in one process.

    Process r of W takes the batches r, r + W, and so on: sorted by length, each gets long and short ones.

    Args:
        lengths: the lengths of n entries, the same in every process.
        batches: the entries in each batch, every entry in one batch.
        work: takes some of the batches and returns one result for each of their entries, in their order.

    Returns:
        n results in the order of the entries, in every process.

    Raises:
        RuntimeError: if the work failed in another process, or if the processes were given different lengths.

    Example:
        >>> dealt([3, 1, 2], [[0, 2], [1]], lambda batches: [10 * entry for batch in batches for entry in batch])
        [0, 10, 20]
    """
    share = batches[dist.get_rank() :: dist.get_world_size()] if several() else batches
    mine = [entry for batch in share for entry in batch]
    shares = every_process(lambda: (list(lengths), dict(zip(mine, work(list(share)), strict=True))))
    if any(seen != shares[0][0] for seen, _ in shares):
        raise RuntimeError(
            "expected every process to score the same texts, found others in "
            f"{sum(seen != shares[0][0] for seen, _ in shares)} of {len(shares)}: give all of them the same splits"
        )
    results = {entry: result for _, found in shares for entry, result in found.items()}
    return [results[entry] for entry in range(len(lengths))]


def portions_of(
    batches: Sequence[Sequence[int]], answers: Sequence[int], size: int
) -> list[tuple[list[int], list[Sequence[int]]]]:
    """Batches that one process scores together: which answers are generated together depends on no number of processes.

    Args:
        batches: the rows of each batch.
        answers: for each row, how many answers in it may have to be generated.
        size: so many of them make a portion; a batch without any is one.

    Returns:
        For each portion its rows, and its batches.

    Example:
        >>> portions_of([[0], [1, 2], [3]], answers=[1, 1, 0, 1], size=2)
        [([0, 1, 2], [[0], [1, 2]]), ([3], [[3]])]
    """
    portions: list[tuple[list[int], list[Sequence[int]]]] = []
    count = size
    for batch in batches:
        mine = sum(answers[row] for row in batch)
        if count >= size or not mine:
            portions.append(([], []))
            count = 0
        portions[-1][0].extend(batch)
        portions[-1][1].append(batch)
        count = count + mine if mine else size
    return portions
