"""What surgery costs where rows are sharded over processes, as FSDP2 shards them: the optimizer itself, on gloo.

Every process has a `GradientSurgery` over DTensors, whose gradients are ready. A round enters both objectives, in which
the processes tell each other what they do, and combines: the Gram matrix with its all_reduce, the rule, the combination.
The processes start together. The cost of a round is that of the process that has most, in CPU time and on the wall; on
the wall, processes that have no core to themselves wait for each other.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.benchmarks import limit
from tests.benchmarks.growth import TENSORS, Plan, Work, cut
from tests.benchmarks.power_law import Series, Study

_WARM_UP = 4  # the optimizer compares the ranks' Gram matrices on its first three steps
_SERVER = multiprocessing.get_context("forkserver")
_PATIENCE = 600


def import_once() -> None:
    """Let the processes that this one starts be forked from a server that has imported what they need."""
    _SERVER.set_forkserver_preload(["tests.benchmarks.processes", "torch.distributed.tensor", "torch._dynamo"])


def processes(plan: Plan) -> Study:
    """The same numbers on more and more processes, and the same numbers on each of them.

    Raises:
        RuntimeError: If a process failed; its own words are on the terminal.
    """
    lines: dict[str, dict[int, list[float]]] = {}
    for world in plan.processes:
        for line, seconds in _started(world, plan).items():
            lines.setdefault(line, {})[world] = seconds
    note = (
        f"Two rows of {plan.numbers / 1e6:g}M float32 numbers in {TENSORS} tensors, as shards on gloo: divided among the "
        "processes, or so many on each; the process that takes longest. Processes of different numbers are not interleaved."
    )
    return Study("Processes", "processes", [Series(line, found) for line, found in lines.items()], note)


def _started(world: int, plan: Plan) -> dict[str, list[float]]:
    """Line -> the longest seconds of any process, in every round."""
    with tempfile.TemporaryDirectory() as folder:
        started = [_SERVER.Process(target=_process, args=(rank, world, folder, plan)) for rank in range(world)]
        for process in started:
            process.start()
        for process in started:
            process.join(_PATIENCE)
        found = [Path(folder, f"{rank}.json") for rank in range(world)]
        for process in started:
            process.kill()
        if missing := [rank for rank, path in enumerate(found) if not path.exists()]:
            raise RuntimeError(
                f"processes: expected {world} to measure on gloo, found none of ranks {missing}; see what they said above, or "
                "choose fewer by --processes"
            )
        times: list[dict[str, list[float]]] = [json.loads(path.read_text()) for path in found]
    return {line: [max(each) for each in zip(*(one[line] for one in times), strict=True)] for line in times[0]}


def _process(rank: int, world: int, folder: str, plan: Plan) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    works = {"divided": sharded(plan.numbers // world, mesh), "on each": sharded(plan.numbers, mesh)}
    # Between two works, and in none of their times, the processes wait for each other.
    apart = {key: one for name, work in works.items() for key, one in ((f"before {name}", _wait), (name, work))}
    found: dict[str, list[float]] = {}
    for kind, clock in (("CPU", time.process_time), ("wall", time.perf_counter)):
        times = limit.interleaved(apart, plan.repeats, clock)
        found |= {f"{name}, {kind}": times[name] for name in works}
    torch.distributed.destroy_process_group()
    written = Path(folder, f"{rank}.json")
    written.with_suffix(".part").write_text(json.dumps(found))
    written.with_suffix(".part").rename(written)


def _wait() -> None:
    torch.distributed.barrier()


def sharded(numbers: int, mesh: Any) -> Work:
    """A round of the optimizer whose parameters and gradients have so many numbers on each process of the mesh."""
    from torch.distributed.tensor import DTensor, Shard

    def on_mesh(tensors: list[Tensor]) -> list[Tensor]:
        return [DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for tensor in tensors]

    rows = [on_mesh(cut(flat, numbers, TENSORS)) for (flat,) in limit.filled([(numbers,)], 2)]
    weights = [nn.Parameter(weight) for weight in on_mesh(cut(torch.zeros(numbers), numbers, TENSORS))]
    optimizer = gs.GradientSurgery(torch.optim.SGD(weights, lr=0.0))

    def once() -> None:
        for name, row in zip(reversed(optimizer.objectives), reversed(rows), strict=True):
            with optimizer.objective(name):
                for weight, gradient in zip(weights, row, strict=True):
                    weight.grad = gradient
        optimizer.combine()
        optimizer.zero_grad()

    for _ in range(_WARM_UP):
        once()
    return once
