"""What the processes of test_ranks.py and of other tests run, and how they are started.

Processes are forked from a server that has imported torch once, so that a test takes half a second and every test has fresh ones.
A scenario makes its own assertions; `run` raises if one failed in any process, or if a process hangs.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # imported once here for all processes, because the first step of any optimizer imports it
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gradsurgery as gs
from tests.problems import BASES, FOUR, TWO, Losses, batch, contexts, joined, mlp, values
from tests.reference import training
from tests.tolerances import STEPPED, close

WORLD = 2
STEPS = 6
# Nothing here takes a second: a process that waits this long for another hangs.
COLLECTIVE_TIMEOUT, PROCESS_TIMEOUT = 10, 60

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.gradsurgery.optimizer.distributed_workers"])


def run(scenario: Callable[..., None], *arguments: Any, world: int = WORLD, patience: int = 1) -> None:
    """Run ``scenario(rank, *arguments)`` in the processes of one gloo group.

    Args:
        scenario: A function that processes can import.
        arguments: Pickled.
        world: Number of processes.
        patience: Multiple of the time after which a process hangs.

    Raises:
        AssertionError: With the traceback of every process in which it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = (folder, world, patience * COLLECTIVE_TIMEOUT)
        processes = [SERVER.Process(target=_process, args=(rank, place, scenario, arguments)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(patience * PROCESS_TIMEOUT)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        failures = [path.read_text() for path in sorted(Path(folder).glob("failure*"))]
        missing = [rank for rank in range(world) if not (Path(folder) / f"done{rank}").exists()]
    assert not hung, "\n".join([f"ranks {hung} hang", *failures])
    assert not failures, "\n".join(failures)
    assert not missing, f"ranks {missing} died"


def _process(rank: int, place: tuple[str, int, int], scenario: Callable[..., None], arguments: Sequence[Any]) -> None:
    folder, world, seconds = place
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    try:
        timeout = timedelta(seconds=seconds)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout
        )
        scenario(rank, *arguments)
        dist.barrier()
    except SystemExit:
        pass  # a scenario that does not wait for the others
    except BaseException:  # pytest's outcomes are no Exceptions, and a traceback must leave the process
        (Path(folder) / f"failure{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
    finally:
        (Path(folder) / f"done{rank}").touch()
        # Not destroy_process_group(): it waits for collectives that a failed scenario left open.
        os._exit(0)


def each(rank: int, scenario: Callable[..., None], cases: Mapping[str, Sequence[Any]]) -> None:
    """Run a scenario once for each case, in the same processes; a failure names the case."""
    for name, arguments in cases.items():
        try:
            scenario(rank, *arguments)
        except BaseException as error:
            error.add_note(f"case: {name}")
            raise
        dist.barrier()


@contextmanager
def raises_everywhere(sentence: str, *also: str) -> Iterator[None]:
    """The block raises a RuntimeError on this rank, with one of the sentences, long before a collective times out."""
    with pytest.raises(RuntimeError, match="|".join((sentence, *also))):
        yield


# Problems ------------------------------------------------------------------------------------------------------------------------


def of_rank(rank: int, objectives: Sequence[str] = TWO) -> Losses:
    """This rank's share of every batch."""

    def losses(model: nn.Module, step: int, micro: int) -> dict[str, Tensor]:
        found = {}
        for index, name in enumerate(objectives):
            inputs, labels = batch(index, step, WORLD * micro + rank)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            found[name] = -loss if index == 0 else loss
        return found

    return losses


def whole(
    model: nn.Module, step: int, micro_batches: int = 1, objectives: Sequence[str] = TWO
) -> list[dict[str, Tensor]]:
    """Every rank's share, for the oracle."""
    return [of_rank(rank, objectives)(model, step, micro) for micro in range(micro_batches) for rank in range(WORLD)]


def surgeon(model: nn.Module, base: str = "AdamW", **options: Any) -> gs.GradientSurgery:
    return gs.GradientSurgery(BASES[base](model.named_parameters()), **{"ema_dtype": torch.float64, **options})


def assert_ranks_agree(model: nn.Module) -> None:
    """Bit for bit."""
    mine = values(model)
    for rank in range(WORLD):
        theirs = mine.clone()
        dist.broadcast(theirs, rank)
        assert torch.equal(mine, theirs), f"rank {rank} holds other parameters"


def check(model: nn.Module, plain: nn.Module) -> None:
    close(values(model), values(plain), STEPPED)
    assert_ranks_agree(model)


# DistributedDataParallel ---------------------------------------------------------------------------------------------------------

# Smaller than any tensor: every parameter is a bucket of its own, as a large embedding is.
SINGLE = 1e-9
WRAPPERS: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "bucket_view": {"gradient_as_bucket_view": True},
    "bucket_view, one parameter each": {"gradient_as_bucket_view": True, "bucket_cap_mb": SINGLE},
    "bucket_view, find_unused": {"gradient_as_bucket_view": True, "find_unused_parameters": True},
}


def ddp_contexts(rank: int, wrapper: dict[str, Any]) -> None:
    """Forward and backward of one objective after the other."""
    model, plain = mlp(), mlp()
    wrapped = DistributedDataParallel(model, **wrapper)
    optimizer = surgeon(model, objectives=FOUR, ema_decay=0.5)
    reference = training.Surgery(
        plain, BASES["AdamW"](plain.parameters()), FOUR, ema_decay=dict.fromkeys(FOUR[1:], 0.5)
    )
    for step in range(STEPS):
        for index, name in enumerate(FOUR):
            inputs, labels = batch(index, step, rank)
            with optimizer.objective(name):
                loss = nn.functional.cross_entropy(wrapped(inputs), labels)
                (-loss if index == 0 else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step(whole(plain, step, objectives=FOUR))
        check(model, plain)


def ddp_forward_forward(rank: int, wrapper: dict[str, Any]) -> None:
    """Both forward passes first: DDP then reduces only one of the backward passes, and does not say so."""
    model = mlp()
    wrapped = DistributedDataParallel(model, **wrapper)
    optimizer = surgeon(model)
    before = values(model)
    for name, loss in of_rank(rank)(wrapped, 0, 0).items():
        with optimizer.objective(name):
            loss.backward()
    with raises_everywhere(
        "rows differ across ranks: .* run forward and backward of one objective before the forward of the next"
    ):
        optimizer.step()
    assert torch.equal(values(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.zero_grad()
    joined(wrapped, optimizer, of_rank(rank), [1])
    assert_ranks_agree(model)


def ddp_join(rank: int, wrapper: dict[str, Any]) -> None:
    model, plain = mlp(), mlp()
    wrapped = DistributedDataParallel(model, **wrapper)
    optimizer = surgeon(model, objectives=FOUR, ema_decay=0.5)
    reference = training.Surgery(
        plain, BASES["AdamW"](plain.parameters()), FOUR, ema_decay=dict.fromkeys(FOUR[1:], 0.5)
    )
    for step in range(STEPS):
        joined(wrapped, optimizer, of_rank(rank, FOUR), [step])
        reference.step(whole(plain, step, objectives=FOUR))
        check(model, plain)


class Joining(nn.Module):
    """A module whose forward pass returns the joined loss, as Lightning's training_step inside DistributedDataParallel does."""

    def __init__(self, inner: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.inner, self.losses = inner, losses
        self.optimizer = [surgeon(inner, ema_decay=0.5)]

    def forward(self, step: int) -> Tensor:
        return self.optimizer[0].join(**self.losses(self.inner, step, 0))


def ddp_join_inside_forward(rank: int, wrapper: dict[str, Any]) -> None:
    model, plain = mlp(), mlp()
    joining = Joining(model, of_rank(rank))
    wrapped = DistributedDataParallel(joining, **wrapper)
    reference = training.Surgery(plain, BASES["AdamW"](plain.parameters()), TWO, ema_decay={"retain": 0.5})
    for step in range(STEPS):
        wrapped(step).backward()
        joining.optimizer[0].step()
        joining.optimizer[0].zero_grad()
        reference.step(whole(plain, step))
        check(model, plain)


def ddp_static_graph(rank: int, wrapper: dict[str, Any]) -> None:
    """Contexts are exact; join, and no_sync, are refused before anything is computed."""
    model, plain = mlp(), mlp()
    wrapped = DistributedDataParallel(model, static_graph=True, **wrapper)
    optimizer = surgeon(model)
    reference = training.Surgery(plain, BASES["AdamW"](plain.parameters()), TWO)
    for step in range(STEPS):
        for index, name in enumerate(TWO):
            inputs, labels = batch(index, step, rank)
            with optimizer.objective(name):
                loss = nn.functional.cross_entropy(wrapped(inputs), labels)
                (-loss if index == 0 else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step(whole(plain, step))
        check(model, plain)
    with raises_everywhere(r"expected DistributedDataParallel\(static_graph=False\).*drop static_graph"):
        optimizer.join(**of_rank(rank)(wrapped, 0, 0)).backward()
    optimizer.zero_grad()
    sentence = r"static_graph=False\) inside no_sync\(\), found static_graph=True.*or no_sync"
    with raises_everywhere(sentence), wrapped.no_sync(), optimizer.objective("retain"):
        pass


def ddp_no_sync(rank: int, wrapper: dict[str, Any], front_end: str) -> None:
    """Three micro-batches; each objective's row is reduced once, with the last of them."""
    model, plain = mlp(), mlp()
    wrapped = DistributedDataParallel(model, **wrapper)
    optimizer = surgeon(model, ema_decay=0.5, accumulate=front_end == "join, accumulate")
    reference = training.Surgery(plain, BASES["AdamW"](plain.parameters()), TWO, ema_decay={"retain": 0.5})

    def backward(index: int, step: int, micro: int) -> None:
        inputs, labels = batch(index, step, WORLD * micro + rank)
        with optimizer.objective(TWO[index]):
            loss = nn.functional.cross_entropy(wrapped(inputs), labels) / 3
            (-loss if index == 0 else loss).backward()

    for step in range(STEPS):
        if front_end == "blocked":
            for index in (1, 0):
                for micro in range(3):
                    with wrapped.no_sync() if micro < 2 else nullcontext():
                        backward(index, step, micro)
        else:
            for micro in range(3):
                with wrapped.no_sync() if micro < 2 else nullcontext():
                    if front_end == "interleaved":
                        backward(0, step, micro)
                        backward(1, step, micro)
                    else:
                        (optimizer.join(**of_rank(rank)(wrapped, step, micro)) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = reference.step(whole(plain, step, 3))
        check(model, plain)
        assert optimizer.record is not None
        close(optimizer.record.gram, expected.gram[0], STEPPED)


class TwoHeads(nn.Module):
    """A head that only the retain loss uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.double()

    def forward(self, inputs: Tensor, *, both: bool) -> Tensor:
        hidden = self.trunk(inputs).tanh()
        return self.first(hidden) + self.second(hidden) if both else self.first(hidden)


def ddp_unused_head(rank: int, front_end: str) -> None:
    model, plain = TwoHeads(), TwoHeads()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = surgeon(model)
    reference = training.Surgery(plain, BASES["AdamW"](plain.parameters()), TWO)

    def loss(module: nn.Module, name: str, step: int, share: int) -> Tensor:
        inputs, labels = batch(TWO.index(name), step, share)
        found = nn.functional.cross_entropy(module(inputs, both=name == "retain"), labels)
        return -found if name == "forget" else found

    for step in range(STEPS):
        if front_end == "join":
            optimizer.join(**{name: loss(wrapped, name, step, rank) for name in TWO}).backward()
        else:
            for name in TWO:
                with optimizer.objective(name):
                    loss(wrapped, name, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step([{name: loss(plain, name, step, share) for name in TWO} for share in range(WORLD)])
        check(model, plain)


def ddp_copies(rank: int) -> None:
    """The DDP modules that the optimizer has found do not prevent a copy or a pickle, and are not part of it."""
    model = mlp()
    wrapped = DistributedDataParallel(model)
    optimizer = surgeon(model, ema_decay=0.5)
    joined(wrapped, optimizer, of_rank(rank), range(2))
    for twin, other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        again = DistributedDataParallel(twin)
        joined(again, other, of_rank(rank), [2])
        assert_ranks_agree(twin)
        del again
    assert isinstance(other, gs.GradientSurgery)


# Ranks that do not do the same -----------------------------------------------------------------------------------------------------


def unsynchronised(rank: int, front_end: str) -> None:
    """Two plain models, each with its own data: nobody reduced anything."""
    model = mlp()
    optimizer = surgeon(model)
    before = values(model)
    with raises_everywhere("rows differ across ranks.*reduce the gradients inside each objective's context"):
        (joined if front_end == "join" else contexts)(model, optimizer, of_rank(rank), [0])
    assert torch.equal(values(model), before)


def synchronised_by_hand(rank: int) -> None:
    """Gradients that the user reduces inside each context."""
    model, plain = mlp(), mlp()
    optimizer = surgeon(model)
    reference = training.Surgery(plain, BASES["AdamW"](plain.parameters()), TWO)
    for step in range(STEPS):
        for name, loss in of_rank(rank)(model, step, 0).items():
            with optimizer.objective(name):
                loss.backward()
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= WORLD
        optimizer.step()
        optimizer.zero_grad()
        reference.step(whole(plain, step))
        check(model, plain)


def missing_on_one_rank(rank: int, wrap: str, done: str) -> None:
    """Rank 1 leaves out one objective, or both, while rank 0 does all: every rank raises."""
    model = mlp()
    module: nn.Module = DistributedDataParallel(model) if wrap == "ddp" else model
    optimizer = surgeon(model)
    names = ("retain", "forget") if rank == 0 else tuple(name for name in ("retain", "forget") if name in done)
    same = [batch(index, 0) for index in range(2)]  # the same data: only what is missing differs
    with raises_everywhere("expected a backward pass for each of", "objectives differ across ranks"):
        for name in names:
            inputs, labels = same[TWO.index(name)]
            with optimizer.objective(name):
                nn.functional.cross_entropy(module(inputs), labels).backward()
        optimizer.step()


def fsdp1(rank: int) -> None:
    """FSDP1 cannot be built on a CPU, but its class around the parameters is enough to be refused."""

    class Wrapper(FullyShardedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self._fsdp_wrapped_module = module
            self.training_state = None

    model = mlp()
    wrapped = Wrapper(model)
    optimizer = surgeon(model)
    with raises_everywhere(
        r"found a FullyShardedDataParallel \(FSDP1\) wrapper.*use torch.distributed.fsdp.fully_shard"
    ):
        joined(model, optimizer, of_rank(0), [0])
    assert wrapped is not None


# FSDP2 ---------------------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Layers that two ranks share unevenly (5, 3) or that only one of them holds (1)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.gain = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.gain * self.layers(inputs)


def gathered(model: nn.Module) -> Tensor:
    parameters = [p.detach() for p in model.parameters()]
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).flatten() for p in parameters])


def sharded() -> Scaled:
    model = Scaled()
    fully_shard(model.layers[0])
    fully_shard(model)
    return model


def layer(name: str) -> str:
    return name.split(".")[-2] if "." in name else name


# Options of the optimizer, what they mean to the oracle, and the base.
FSDP_VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "plain": ({}, {}, "AdamW"),
    "ema": ({"ema_decay": 0.5}, {"ema_decay": dict.fromkeys(FOUR[1:], 0.5)}, "momentum"),
    "guard, ema": (
        {"guard": "update", "ema_decay": 0.5},
        {"guard": True, "ema_decay": dict.fromkeys(FOUR[1:], 0.5)},
        "AdamW",
    ),
    "tensor, max_norm": (
        {"scope": "tensor", "max_norm": 0.3},
        {"block": lambda name: name, "max_norm": 0.3},
        "momentum",
    ),
    "callable, guard": ({"scope": layer, "guard": "update"}, {"block": layer, "guard": True}, "AdamW"),
    "metric, add": (
        {"metric": "optimizer", "add": {"retain": 0.5}},
        {"preconditioner": training.preconditioner, "add": {"retain": 0.5}},
        "AdamW",
    ),
}


def fsdp(rank: int, name: str, front_end: str) -> None:
    options, meaning, base = FSDP_VARIANTS[name]
    model, plain = sharded(), Scaled()
    optimizer = surgeon(model, base, objectives=FOUR, accumulate=front_end == "join, accumulate", **options)
    reference = training.Surgery(plain, BASES[base](plain.parameters()), FOUR, **meaning)
    micro_batches = 1 if front_end == "join" else 2
    for step in range(STEPS):
        run = contexts if front_end == "contexts" else joined
        run(model, optimizer, of_rank(rank, FOUR), [step], micro_batches=micro_batches)
        expected = reference.step(whole(plain, step, micro_batches, FOUR))
        close(gathered(model), values(plain), STEPPED)
        assert optimizer.record is not None
        gram = optimizer.record.gram.reshape_as(expected.gram)
        close(gram, expected.gram, STEPPED, scale=expected.gram.abs().max())


def fsdp_without_sync(rank: int, front_end: str) -> None:
    """Gradients would pile up, unreduced, across objectives."""
    model = sharded()
    optimizer = surgeon(model)
    joined(model, optimizer, of_rank(rank), [0])
    model.set_requires_gradient_sync(False)
    before = gathered(model)
    with raises_everywhere(
        "under FSDP2 this means that gradient sync is off.*leave set_requires_gradient_sync at True"
    ):
        (joined if front_end == "join" else contexts)(model, optimizer, of_rank(rank), [1])
    assert torch.equal(gathered(model), before)


def fsdp_checkpoint(rank: int, full: bool) -> None:
    """A state_dict in whole tensors or in shards is loaded into a fresh model, which trains on as the original does."""
    settings = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)
    model, resumed = sharded(), sharded()
    optimizer, again = (
        surgeon(each, objectives=FOUR, ema_decay={"retain": 0.5, "style": 0.9}) for each in (model, resumed)
    )
    joined(model, optimizer, of_rank(rank, FOUR), range(3))
    state_dict = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=settings))
    if full and rank == 0:
        average = state_dict["state"]["gain"]["gradsurgery_ema_retain"]
        assert not isinstance(average, DTensor)
        assert average.shape == (1,)
    if full and rank != 0:
        state_dict = {}
    with torch.no_grad():
        for target, source in zip(resumed.parameters(), model.parameters(), strict=True):
            target.copy_(source)
    set_optimizer_state_dict(resumed, again, state_dict, options=settings)
    for each, its in ((model, optimizer), (resumed, again)):
        joined(each, its, of_rank(rank, FOUR), range(3, STEPS))
    assert torch.equal(gathered(model), gathered(resumed))
    found, expected = again.state_dict()["state"], optimizer.state_dict()["state"]
    for index, entries in expected.items():
        mine = found[index]["gradsurgery_ema_style"]
        assert isinstance(mine, DTensor)
        assert torch.equal(mine.to_local(), entries["gradsurgery_ema_style"].to_local())
