"""Which process is the first one, before there is a group that could be asked; and what they divide."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from lightning_modules import cli
from lightning_modules.evaluation import processes
from lightning_modules.run import evaluate as evaluate_command
from lightning_modules.run import report as report_command

# What launchers set; the variables are those of their manuals.
TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "unlearn", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
ARRAY = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_JOB_NAME": "ablate", "SLURM_NTASKS": "1"}
FIRST = {
    "alone": {},
    "torchrun": TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"},
    "torchrun in a Slurm job, one task a machine": TORCHRUN | SRUN | {"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"},
    "the process that starts Lightning's others": {"NODE_RANK": "0"},
    "srun": SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
    "the batch script itself": SRUN,
    "task 0 of an array": ARRAY | {"SLURM_ARRAY_TASK_ID": "0", "SLURM_PROCID": "0"},
    "task 2 of an array": ARRAY | {"SLURM_ARRAY_TASK_ID": "2", "SLURM_PROCID": "0"},
    "a shell of salloc": SRUN | {"SLURM_JOB_NAME": "interactive", "SLURM_PROCID": "0"},
    "a second shell in it": SRUN | {"SLURM_JOB_NAME": "bash", "SLURM_PROCID": "1"},
    "jsrun": {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "f", "JSM_NAMESPACE_LOCAL_RANK": "0", "JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0"},
}  # fmt: skip
FURTHER = {
    "torchrun": TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"},
    "torchrun's first on the second machine": TORCHRUN | {"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1"},
    "torchrun in a Slurm job, one task a machine": TORCHRUN | SRUN | {"RANK": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "0"},
    "started by Lightning": {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"},
    "Lightning's first on the second machine": {"NODE_RANK": "1", "MASTER_ADDR": "a"},
    "srun": SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"},
    "srun's first on the second machine": SRUN | {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"},
    "jsrun": FIRST["jsrun"] | {"JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_RANK": "1"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith(("SLURM_", "TORCHELASTIC", "JSM_", "LSB_", "OMPI_")) or name.endswith("RANK"):
            monkeypatch.delenv(name)


def launch(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("environment", FIRST.values(), ids=FIRST)
def test_the_first_process_is_known_before_the_group(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(monkeypatch, environment)
    assert processes.will_be_first()


@pytest.mark.parametrize("environment", FURTHER.values(), ids=FURTHER)
def test_and_no_other_takes_itself_for_it(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, environment)
    assert not processes.will_be_first()


ALONE = ("alone", "the process that starts", "the batch script", "task 0", "task 2", "a shell", "a second shell")


@pytest.mark.parametrize(("name", "environment"), [*FIRST.items(), *FURTHER.items()], ids=[*FIRST, *FURTHER])
def test_whether_there_will_be_others_is_known_in_the_first_process_too(
    name: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(monkeypatch, environment)
    if name == "Lightning's first on the second machine":  # whose options say --num-nodes
        return
    assert (processes.processes_ahead() == 1) == name.startswith(ALONE)
    if TorchElasticEnvironment.detect():
        assert processes.processes_ahead() == TorchElasticEnvironment().world_size()


@pytest.mark.parametrize("environment", [*FIRST.values(), *FURTHER.values()])
def test_where_lightning_listens_to_a_launcher_it_finds_the_same_rank(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(monkeypatch, environment)
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect() and ("SLURM_PROCID" in environment or kind is TorchElasticEnvironment):
            assert processes.rank_ahead() == kind().global_rank()
            break


@pytest.mark.parametrize("environment", FURTHER.values(), ids=FURTHER)
def test_evaluate_is_refused_in_a_further_process(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(monkeypatch, environment)
    monkeypatch.setattr(evaluate_command, "load_model", lambda *_: pytest.fail("work was begun"))
    assert cli.main(["evaluate", "--output", str(tmp_path / "run")]) == 1
    assert "evaluate: expected one process, found several" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_a_group_that_a_command_made_is_left_at_its_end_and_an_older_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def report(*_: object) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    monkeypatch.setattr(report_command, "draw", report)
    assert cli.main(["report", "folder"]) == 0
    assert not dist.is_initialized()
    report()
    try:
        assert cli.main(["report", "folder"]) == 0
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=9), st.integers(1, 4))
def test_a_batch_without_answers_is_a_portion_of_its_own_and_the_others_fill_theirs(
    counts: list[list[int]], size: int
) -> None:
    answers = [count for batch in counts for count in batch]
    numbers = iter(range(len(answers)))
    batches = [[next(numbers) for _ in batch] for batch in counts]
    portions = processes.portions_of(batches, answers, size)
    assert [batch for _, held in portions for batch in held] == batches
    for rows, held in portions:
        assert rows == [row for batch in held for row in batch]
        of_each = [sum(answers[row] for row in batch) for batch in held]
        assert 0 not in of_each or len(held) == 1
        assert sum(of_each[:-1]) < size
