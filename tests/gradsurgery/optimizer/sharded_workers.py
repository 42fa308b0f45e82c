"""What two and four processes of test_sharded.py run: every division of one problem is that of one process.

A step has four shares of every batch, whatever the number of processes: each takes its own, one micro-batch after the
other where there are several.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gradsurgery as gs
from tests.gradsurgery.optimizer.distributed_workers import (
    FSDP_VARIANTS,
    STEPS,
    Scaled,
    each,
    gathered,
    raises_everywhere,
    surgeon,
)
from tests.problems import BASES, FOUR, TWO, batch, values
from tests.reference import training
from tests.tolerances import STEPPED, close

SHARES = 4


def loss(model: nn.Module, name: str, step: int, share: int) -> Tensor:
    index = FOUR.index(name)
    inputs, labels = batch(index, step, share)
    found = nn.functional.cross_entropy(model(inputs), labels)
    return -found if index == 0 else found


def whole(model: nn.Module, step: int, names: tuple[str, ...] = FOUR) -> list[dict[str, Tensor]]:
    """Every share, for the oracle."""
    return [{name: loss(model, name, step, share) for name in names} for share in range(SHARES)]


def train(
    model: nn.Module,
    optimizer: gs.GradientSurgery,
    steps: range,
    *,
    front_end: str = "join",
    shares: range | None = None,
    names: tuple[str, ...] = FOUR,
) -> None:
    """This rank's shares of every batch, of which ranks of one tensor-parallel group have the same."""
    mine = list(shares or range(dist.get_rank(), SHARES, dist.get_world_size()))
    for step in steps:
        for share in mine:
            if front_end == "join":
                losses = {name: loss(model, name, step, share) for name in names}
                (optimizer.join(**losses) / len(mine)).backward()
            else:
                for name in names:
                    with optimizer.objective(name):
                        (loss(model, name, step, share) / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()


def mesh(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])


def sharded(over: DeviceMesh, seed: int = 0) -> Scaled:
    torch.manual_seed(seed)
    model = Scaled()
    fully_shard(model.layers[0], mesh=over)
    fully_shard(model, mesh=over)
    return model


def assert_replicas_agree(model: nn.Module) -> None:
    """Bit for bit."""
    mine = gathered(model)
    for rank in range(dist.get_world_size()):
        theirs = mine.clone()
        dist.broadcast(theirs, rank)
        assert torch.equal(mine, theirs), f"rank {rank} holds other parameters"


def every_division_is_one_process(rank: int) -> None:
    """DDP, FSDP2 over one and two dimensions, with every option, by both front ends. Some ranks hold no part of a tensor."""
    world = dist.get_world_size()
    meshes = [mesh(world)] + ([mesh(2, 2)] if world == 4 else [])
    for name, (options, meaning, base) in FSDP_VARIANTS.items():
        plain = Scaled()
        reference = training.Surgery(plain, BASES[base](plain.parameters()), FOUR, **meaning)
        found: list[tuple[str, nn.Module, gs.GradientSurgery, str, nn.Module]] = []
        for over in meshes:
            for front_end in ("contexts", "join"):
                model = sharded(over)
                optimizer = surgeon(model, base, objectives=FOUR, accumulate=True, **options)
                found.append((f"{name}, {over.ndim}-D, {front_end}", model, optimizer, front_end, model))
        model = Scaled()
        optimizer = surgeon(model, base, objectives=FOUR, accumulate=True, **options)
        found.append((f"{name}, DDP", DistributedDataParallel(model), optimizer, "join", model))
        for step in range(4):
            expected = reference.step(whole(plain, step))
            for what, module, optimizer, front_end, model in found:
                train(module, optimizer, range(step, step + 1), front_end=front_end)
                try:
                    close(gathered(model), values(plain), STEPPED)
                    assert optimizer.record is not None
                    gram = optimizer.record.gram.reshape_as(expected.gram)
                    close(gram, expected.gram, STEPPED, scale=expected.gram.abs().max())
                    assert_replicas_agree(model)
                except AssertionError as error:
                    error.add_note(f"{what}, step {step}, rank {rank} of {world}")
                    raise
    empty = [p for p in sharded(meshes[0]).parameters() if isinstance(p, DTensor) and not p.to_local().numel()]
    assert bool(empty) == (rank > 0)  # the gain has one number


class Even(Scaled):
    """Layers that two ranks share evenly, as tensor parallelism wants it, and a gain that is whole on each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def tensor_parallel(_: int) -> None:
    """Layers divided by columns and by rows, on four processes in shards as well; the gain is a plain tensor on two."""
    world = dist.get_world_size()
    plan = {"layers.0": ColwiseParallel(), "layers.2": RowwiseParallel()}
    over = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    options: dict[str, Any] = {"ema_decay": 0.5, "guard": "update", "max_norm": 0.5}
    meaning: dict[str, Any] = {"ema_decay": {"retain": 0.5}, "guard": True, "max_norm": 0.5}
    plain = Even()
    reference = training.Surgery(plain, BASES["AdamW"](plain.parameters()), TWO, **meaning)
    model = Even()
    parallelize_module(model, over["tensor"], plan)
    if world > 2:
        fully_shard(model, mesh=over["data"])
    optimizer = surgeon(model, accumulate=True, **options)
    shares = range(over["data"].get_local_rank(), SHARES, world // 2)
    for step in range(4):
        train(model, optimizer, range(step, step + 1), shares=shares, names=TWO)
        expected = reference.step(whole(plain, step, TWO))
        close(gathered(model), values(plain), STEPPED)
        assert optimizer.record is not None
        close(optimizer.record.gram, expected.gram[0], STEPPED, scale=expected.gram.abs().max())


# Checkpoints of one number of processes in another ----------------------------------------------------------------------------------

AVERAGED: dict[str, Any] = {"objectives": FOUR, "ema_decay": {"retain": 0.5, "style": 0.9}, "accumulate": True}
FROZEN = "layers.2.weight"  # in the first two steps, so that its averages have two steps less behind them


def frozen(model: nn.Module, yes: bool) -> None:
    model.get_parameter(FROZEN).requires_grad_(not yes)


def save(_: int, folder: str) -> None:
    """Three steps, and a checkpoint in shards."""
    model = sharded(mesh(dist.get_world_size()))
    optimizer = surgeon(model, **AVERAGED)
    frozen(model, True)
    train(model, optimizer, range(2))
    frozen(model, False)
    train(model, optimizer, range(2, 3))
    dcp.save(
        {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder
    )


def load(_: int, folder: str) -> None:
    """The checkpoint goes on, in another number of processes, as the run of one process does."""
    model = sharded(mesh(dist.get_world_size()), seed=1)
    optimizer = surgeon(model, **AVERAGED)
    found = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(found, checkpoint_id=folder)
    model.load_state_dict(found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"])
    steps = {key: int(entries["gradsurgery_steps"]) for key, entries in optimizer.state_dict()["state"].items()}
    names = [name for name, _ in model.named_parameters()]
    assert {names[key]: number for key, number in steps.items()} == {name: 1 if name == FROZEN else 3 for name in names}
    train(model, optimizer, range(3, STEPS))
    plain = Scaled()
    reference = training.Surgery(
        plain, BASES["AdamW"](plain.parameters()), FOUR, ema_decay={"retain": 0.5, "style": 0.9}
    )
    for step in range(STEPS):
        frozen(plain, step < 2)
        reference.step(whole(plain, step))
    close(gathered(model), values(plain), STEPPED)


def flattened(_: int) -> None:
    """A flattened checkpoint would lose the averages; without any it is right."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = sharded(mesh(dist.get_world_size()))
    optimizer = surgeon(model, **AVERAGED)
    train(model, optimizer, range(1))
    said = r"expected StateDictOptions\(flatten_optimizer_state_dict=False\), found True"
    with pytest.raises(ValueError, match=said):
        get_optimizer_state_dict(model, optimizer, options=options)
    model, resumed = sharded(mesh(dist.get_world_size())), sharded(mesh(dist.get_world_size()), seed=1)
    optimizer, again = (surgeon(each, objectives=FOUR, accumulate=True) for each in (model, resumed))
    train(model, optimizer, range(2))
    state_dict = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=said):
        set_optimizer_state_dict(resumed, surgeon(resumed, **AVERAGED), copy.deepcopy(state_dict), options=options)
    set_optimizer_state_dict(resumed, again, state_dict, options=options)
    for module, its in ((model, optimizer), (resumed, again)):
        train(module, its, range(2, 4))
    assert torch.equal(gathered(model), gathered(resumed))


# Ranks that part later ---------------------------------------------------------------------------------------------------------------


def part_at_a_late_step(rank: int) -> None:
    """At step 5 one rank enters other objectives, or less of them: every rank says so at once, under DDP and FSDP2."""
    for wrap in ("ddp", "fsdp2"):
        for names in (("forget", "retain"), ("retain",), ()):
            model: nn.Module = Scaled() if wrap == "ddp" else sharded(mesh(dist.get_world_size()))
            module = DistributedDataParallel(model) if wrap == "ddp" else model
            optimizer = surgeon(model)
            for _ in range(5):
                train(module, optimizer, range(1), front_end="contexts", names=("retain", "forget"))
            before = gathered(model)
            with raises_everywhere("objectives differ across ranks", "expected a backward pass for each of"):
                for name in names if rank == 1 else ("retain", "forget"):
                    with optimizer.objective(name):
                        loss(module, name, 5, rank).backward()
                optimizer.step()
            assert torch.equal(gathered(model), before)
            optimizer.zero_grad()


def one_batch_less(rank: int) -> None:
    """A rank that has no batch left leaves; the other is told so in a sentence."""
    module = DistributedDataParallel(Scaled())
    optimizer = surgeon(module, accumulate=True)
    train(module, optimizer, range(4), names=TWO)
    if rank == 0:
        losses = {name: loss(module, name, 4, rank) for name in TWO}
        with raises_everywhere("found one that left or did something else.*give every rank the same number of batches"):
            optimizer.join(**losses).backward()
    raise SystemExit  # no waiting for each other at the end


def uneven_inputs(_: int) -> None:
    """DDP's own context for uneven inputs is refused by every rank that has a batch."""
    model = Scaled()
    module = DistributedDataParallel(model)
    optimizer = surgeon(model)
    with raises_everywhere(r"found DistributedDataParallel.join\(\).*drop join\(\)"), module.join():
        train(module, optimizer, range(1), front_end="contexts", names=TWO)


# Several scenarios in one group of processes, which are dear to start -----------------------------------------------------------------


def four_processes(rank: int, folder: str) -> None:
    each(rank, every_division_is_one_process, {"divisions": ()})
    each(rank, tensor_parallel, {"tensor parallelism": ()})
    each(rank, save, {"saving": (folder,)})


def two_processes(rank: int, folder: str) -> None:
    each(rank, load, {"loading": (folder,)})
    for scenario in (every_division_is_one_process, tensor_parallel, flattened, part_at_a_late_step, uneven_inputs):
        each(rank, scenario, {scenario.__name__: ()})
