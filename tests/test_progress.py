"""Long work says where it stands in a log: every stage of a run by one mechanism, at a clock that need not be waited for."""

from __future__ import annotations

import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from lightning_modules import cli, progress
from lightning_modules.ablation import sweep
from lightning_modules.progress import EVERY, Log, Stage
from lightning_modules.training.scratch import ScratchSettings, scratch_model
from tests.lightning_modules.evaluation.evaluation_workers import SPLITS
from tests.lightning_modules.run.small_runs import small_run


class Clock:
    """Seconds that pass when the test says so, or at every look."""

    def __init__(self, pace: float = 0.0) -> None:
        self.now, self.pace = 1000.0, pace

    def __call__(self) -> float:
        self.now += self.pace
        return self.now


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this process would write to its log if every step took longer than the pause between two lines."""
    written: list[str] = []
    monkeypatch.setattr(progress, "LOG", Log(Clock(EVERY + 1), written.append))
    return written


@pytest.mark.parametrize("step", [0.1, 7.0, 29.0, 45.0])
def test_no_silence_is_longer_than_half_a_minute_and_one_step_and_no_line_comes_early(step: float) -> None:
    clock, times = Clock(), [1000.0]
    log = Log(clock, lambda _: times.append(clock.now))
    for _ in range(40):  # many short stages, each shorter than the pause, are not silent together either
        stage = Stage("Any", 5, log=log)
        for _ in range(5):
            clock.now += step
            stage.advance()
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert len(times) > 1 or 200 * step < EVERY
    assert all(EVERY - 1e-6 <= pause < max(EVERY + step, step) + 1e-6 for pause in pauses)


@pytest.mark.parametrize(
    ("done", "total", "seconds", "said"),
    [
        ((0, 30), 120, 60, "Work: 30 of 120 done in 1 min 0 s, about 3 min 0 s left"),
        ((0, 120), 120, 60, "Work: 120 of 120 done in 1 min 0 s"),
        ((0, 3), None, 7265, "Work: 3 done in 2 h 1 min"),
        ((0, 0), 9, 31, "Work: 0 of 9 done in 31 s, nobody knows how much left"),
        ((90, 100), 120, 60, "Work: 100 of 120 done in 1 min 0 s, about 2 min 0 s left"),  # resumed at 90
    ],
)
def test_a_line_says_stage_done_and_left(done: tuple[int, int], total: int | None, seconds: float, said: str) -> None:
    clock, written = Clock(), list[str]()
    stage = Stage("Work", total, done=done[0], log=Log(clock, written.append))
    clock.now += seconds
    stage.advance(done[1] - done[0])
    assert written == [said]


def test_only_the_first_process_without_a_terminal_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def written() -> str:
        Stage("Work", 2, log=Log(Clock(EVERY))).advance()
        return capsys.readouterr().err

    assert written().startswith("Work: 1 of 2 done")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert written() == ""
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert written() == ""


def stages(lines: list[str]) -> set[str]:
    for line in lines:
        assert re.fullmatch(
            r"[^:]+: \d+ of \d+ done in [\dhmins ]+(, (about [\dhmins ]+|nobody knows how much) left)?", line
        ), line
    return {line.partition(":")[0] for line in lines}


def test_every_stage_of_a_run_says_where_it_stands(tmp_path: Path, lines: list[str]) -> None:
    # Without the reference's target: it has the same weights, so that rounding would decide whether there is a step.
    given = ("--forget-loss", "npo", "--probes", "true", "--stop-below", "0")
    arguments = small_run(tmp_path, *given, "--reference", str(tmp_path / "reference"))
    assert not Console(stderr=True).is_terminal
    assert cli.main([*arguments, "--reference-cache", "false"]) == 0
    expected = {
        "Scoring answers",
        "Generating answers",
        "Scoring answers under the start model",
        "Unlearning, optimizer steps",
    }
    assert stages(lines) == expected | {
        "Teaching the forgotten answers to a copy, steps",
        "Rounding copies to fewer bits",
    }
    steps = [line for line in lines if line.startswith("Unlearning")]
    assert [line.partition(" done")[0] for line in steps] == [
        f"Unlearning, optimizer steps: {n} of 6" for n in range(1, 7)
    ]


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (["--lora-rank", "2", "--lora-init", "fila"], "Fisher information for FILA, batches"),
        (["--method", "uld", "--uld", "{num_layers: 1}"], "Training ULD's assistant, optimizer steps"),
    ],
)
def test_so_do_those_that_only_some_runs_have(further: list[str], said: str, tmp_path: Path, lines: list[str]) -> None:
    assert cli.main([*small_run(tmp_path, *further, "--epochs", "1"), "--probes", "false"]) == 0
    assert said in stages(lines)


def test_so_does_the_small_model(tmp_path: Path, lines: list[str]) -> None:
    sizes = ScratchSettings(hidden_size=16, num_layers=1, num_heads=2, epochs=2)
    scratch_model(SPLITS["forget"], sizes, cache_dir=tmp_path, description="Training a small one")
    assert [line.partition(" done")[0] for line in lines] == [
        "Training a small one: 1 of 2",
        "Training a small one: 2 of 2",
    ]


def test_whoever_waits_for_other_processes_says_so(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with ThreadPoolExecutor(2) as pool:
        seconds = [0.2, 0.0]
        futures: list[Any] = [pool.submit(lambda s=s: sleep(s) or s) for s in seconds]
        assert list(sweep.as_they_come(futures)) == [0.0, 0.2]
    assert sum("Runs: 1 of 2" in line for line in lines) > 1
    assert lines[-1].startswith("Runs: 2 of 2")
