"""The compiled kernel in a group of two processes: replicas stay the same bit for bit, with it and where one cannot build it."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gradsurgery.gram import backend, block_gram, choice
from gradsurgery.gram.kernel import Unavailable, build
from tests import tolerances
from tests.gradsurgery.optimizer.distributed_workers import WORLD, assert_ranks_agree, run, surgeon
from tests.tolerances import close

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.skipif(isinstance(choice.built(), str), reason="needs a C++ compiler"),
]


def model_of(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(37, 41, dtype=dtype)


def trained(rank: int) -> nn.Module:
    model = model_of()
    wrapped, optimizer = DistributedDataParallel(model), surgeon(model, ema_decay=0.5)
    for step in range(3):
        for sign, name in ((-1.0, "forget"), (1.0, "retain")):
            inputs = torch.randn(5, 37, generator=torch.Generator().manual_seed(10 * step + rank))
            with optimizer.objective(name):
                (sign * wrapped(inputs).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def replicas(rank: int) -> None:
    choice.SMALLEST = 1
    assert backend().name == "compiled"
    assert_ranks_agree(trained(rank))
    if rank == 1:  # as in a container without a compiler
        choice.built = lambda: "no C++ compiler was found"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = trained(rank)
    assert backend().name == "eager"
    said = [str(warning.message) for warning in caught if "same kernel on every rank" in str(warning.message)]
    assert len(said) == 1
    assert_ranks_agree(model)
    backend("auto")


def shards(rank: int) -> None:
    """The kernel multiplies what a rank holds, and the sum is that of whole rows; 37 columns do not divide by ranks."""
    model = model_of(torch.bfloat16)
    whole = [[torch.randn_like(p, dtype=torch.float32) for p in model.parameters()] for _ in range(2)]
    for row in whole:
        for tensor in row:
            dist.broadcast(tensor, 0)
    fully_shard(model)
    parameters = list(model.parameters())
    rows = []
    for row in whole:
        local = [tensor.chunk(WORLD)[rank].contiguous() for tensor in row]
        rows.append(
            [
                DTensor.from_local(t, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                for t, p in zip(local, parameters, strict=True)
                if isinstance(p, DTensor)
            ]
        )
    with backend("compiled"):
        found = block_gram(rows, like=parameters)
        expected = block_gram(whole)
    close(found, expected, tolerances.KERNEL_GRAM[torch.float32], scale=expected.diagonal(dim1=-2, dim2=-1).amax())
    totals = [torch.empty_like(found) for _ in range(WORLD)]
    dist.all_gather(totals, found)
    assert torch.equal(*totals)


def both(rank: int) -> None:
    choice.built.cache_clear()
    try:
        build()
    except Unavailable as reason:
        pytest.fail(str(reason))
    shards(rank)
    replicas(rank)


def test_replicas_and_shards_with_the_kernel_and_where_a_rank_has_none() -> None:
    run(both)
