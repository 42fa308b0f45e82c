"""Two and four processes on gloo: however a problem is divided, the steps are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gradsurgery.optimizer import sharded_workers as workers
from tests.gradsurgery.optimizer.distributed_workers import run

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.supports("DDP", "on 2 and 4 processes"),
    pytest.mark.supports("FSDP2 (`fully_shard`)", "on 2 and 4 processes, in one dimension and HSDP"),
    pytest.mark.supports("Tensor parallelism", "alone, and with FSDP2"),
    pytest.mark.supports("Checkpoints", "saved by 4 processes and loaded by 2"),
]


def test_divisions_checkpoints_and_refusals_on_four_and_then_two_processes(tmp_path: Path) -> None:
    """DDP, FSDP2, HSDP, tensor parallelism; a checkpoint of four processes goes on in two; ranks that part later are told."""
    run(workers.four_processes, str(tmp_path / "checkpoint"), world=4, patience=3)
    run(workers.two_processes, str(tmp_path / "checkpoint"), patience=3)


def test_a_rank_with_a_batch_less_is_a_sentence_for_the_other() -> None:
    run(workers.one_batch_less)
