"""Two processes on gloo: every pattern of DDP and FSDP2 is exact or raises on every rank, and none hangs."""

from __future__ import annotations

import pytest
import torch

from tests.gradsurgery.optimizer import distributed_workers as workers
from tests.gradsurgery.optimizer.distributed_workers import FSDP_VARIANTS, WRAPPERS, run

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.supports(
        "DDP", "contexts and `join`, find_unused_parameters, bucket views, no_sync, static_graph with contexts"
    ),
    pytest.mark.supports(
        "FSDP2 (`fully_shard`)", "contexts and `join`, uneven and empty shards, scopes, guard, metric, accumulation"
    ),
    pytest.mark.supports("Checkpoints", "`torch.distributed.checkpoint` with shards"),
    pytest.mark.refuses("FSDP1", "it does not support several backward passes a step: use `fully_shard`"),
    pytest.mark.refuses("DDP `static_graph` with `join`", "its reducer allows one backward pass: use contexts"),
    pytest.mark.refuses(
        "Rows that were not reduced, objectives that differ across ranks", "every rank raises, and none hangs"
    ),
    pytest.mark.refuses(
        "FSDP2 without gradient sync", "it would mix the objectives: leave it on (Accelerate: `sync_each_batch=True`)"
    ),
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ddp_contexts_are_the_single_process_run(wrapper: str) -> None:
    run(workers.ddp_contexts, WRAPPERS[wrapper])


@pytest.mark.parametrize("wrapper", ["default", "find_unused", "bucket_view"])
def test_ddp_two_forwards_before_two_backwards_raise_on_every_rank(wrapper: str) -> None:
    run(workers.ddp_forward_forward, WRAPPERS[wrapper])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ddp_join_is_the_single_process_run(wrapper: str) -> None:
    run(workers.ddp_join, WRAPPERS[wrapper])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ddp_join_inside_one_forward_is_the_single_process_run(wrapper: str) -> None:
    run(workers.ddp_join_inside_forward, WRAPPERS[wrapper])


def test_ddp_static_graph_takes_contexts_and_refuses_join() -> None:
    run(workers.ddp_static_graph)


@pytest.mark.parametrize("front_end", ["interleaved", "blocked", "join", "join, accumulate"])
@pytest.mark.parametrize("wrapper", ["default", "bucket_view", "bucket_view, one parameter each"])
def test_ddp_no_sync_accumulates_and_reduces_once(wrapper: str, front_end: str) -> None:
    run(workers.ddp_no_sync, WRAPPERS[wrapper], front_end)


@pytest.mark.parametrize("front_end", ["contexts", "join"])
def test_ddp_with_a_head_that_one_loss_does_not_use(front_end: str) -> None:
    run(workers.ddp_unused_head, front_end)


def test_ddp_does_not_stop_a_copy() -> None:
    run(workers.ddp_copies)


@pytest.mark.parametrize("front_end", ["contexts", "join"])
def test_models_that_nobody_synchronises_raise_on_every_rank(front_end: str) -> None:
    run(workers.unsynchronised, front_end)


def test_gradients_that_are_reduced_inside_the_contexts() -> None:
    run(workers.synchronised_by_hand)


@pytest.mark.parametrize("done", ["retain", "forget", "nothing"])
@pytest.mark.parametrize("wrap", ["ddp", "plain"])
def test_an_objective_missing_on_one_rank_raises_on_every_rank(wrap: str, done: str) -> None:
    run(workers.missing_on_one_rank, wrap, done)


def test_fsdp1_is_refused() -> None:
    run(workers.fsdp1)


@pytest.mark.parametrize("front_end", ["contexts", "join", "join, accumulate"])
@pytest.mark.parametrize("name", FSDP_VARIANTS)
def test_fsdp2_is_the_single_process_run(name: str, front_end: str) -> None:
    run(workers.fsdp, name, front_end)


@pytest.mark.parametrize("front_end", ["contexts", "join"])
def test_fsdp2_without_gradient_sync_is_refused(front_end: str) -> None:
    run(workers.fsdp_without_sync, front_end)


@pytest.mark.parametrize("full", [False, True])
def test_fsdp2_checkpoints_keep_the_averages(full: bool) -> None:
    run(workers.fsdp_checkpoint, full)
