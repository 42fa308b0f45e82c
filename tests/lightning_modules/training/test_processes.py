"""Two processes train as one does, and where their scores differ they decide alike, and end together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gradsurgery.optimizer.distributed_workers import run
from tests.lightning_modules.training import callback_workers as workers
from tests.lightning_modules.training import shared_batch_workers

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def test_processes_whose_scores_differ_end_together(tmp_path: Path) -> None:
    run(workers.processes_that_disagree_end_together, str(tmp_path))


def test_every_process_knows_the_start_model_of_npo(tmp_path: Path) -> None:
    run(workers.every_process_finds_the_start_model, str(tmp_path))


def test_two_processes_replace_the_tokens_that_one_would() -> None:
    run(shared_batch_workers.the_noise_of_the_whole_batch)


def test_two_processes_take_the_deep_steps_of_one_and_log_its_rows() -> None:
    run(shared_batch_workers.the_steps_and_the_rows_of_one_process, patience=3)
