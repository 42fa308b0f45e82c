"""The job array of examples/ablation/slurm.sh: together its tasks do every run of the grid, and none twice."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from lightning_modules.ablation.reading import read_grid

GRIDS = Path(__file__).parents[3] / "examples" / "ablation"
SCRIPT = GRIDS / "slurm.sh"

# In its place there is a command that says what it was asked to do. Run 5 fails.
STUB = """#!/bin/bash
if [ "${@: -1}" = --list ]; then
    for ((run = 0; run < RUNS; run++)); do echo "$run run-$run"; done
else
    echo "${@: -1}" >> done
    [ "${@: -1}" != 5 ]
fi
"""


def array_of(script: str) -> int:
    """How many tasks the script's own array has."""
    (last,) = re.findall(r"^#SBATCH --array=0-(\d+)$", script, re.MULTILINE)
    return int(last) + 1


def test_the_array_has_a_task_for_every_run_of_its_grid() -> None:
    script = SCRIPT.read_text()
    (grid,) = set(re.findall(r"examples/ablation/(\w+\.yaml)", script))
    assert array_of(script) == len(read_grid(GRIDS / grid).runs())


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_grid_says_how_many_runs_it_has(path: Path) -> None:
    said = re.findall(r"(\d+) runs", path.read_text())
    assert {int(number) for number in said} <= {len(read_grid(path).runs())}


def did(folder: Path, tasks: list[int], runs: int) -> tuple[Counter[int], dict[int, int]]:
    """How often every run was done by these tasks, and the status of each task."""
    stub = folder / "gradsurgery"
    stub.write_text(STUB)
    stub.chmod(0o755)
    status: dict[int, int] = {}
    for task in tasks:
        slurm = {"ID": task, "MIN": min(tasks), "MAX": max(tasks), "COUNT": len(tasks)}
        environment = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in slurm.items()}
        environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "RUNS": str(runs)}
        command = ["bash", str(SCRIPT), "grid.yaml", "tofu", "out"]
        status[task] = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    done = folder / "done"
    return Counter(map(int, done.read_text().split()) if done.exists() else ()), status


@pytest.mark.parametrize("tasks", [1, 3, 7, 9], ids=lambda tasks: f"{tasks} tasks")
def test_an_array_of_any_length_does_every_run_once_and_tells_of_a_failure(tasks: int, tmp_path: Path) -> None:
    done, status = did(tmp_path, list(range(tasks)), runs=7)
    assert done == Counter(range(7))
    assert [task for task, code in status.items() if code] == [5 % tasks]


def test_single_runs_can_be_asked_for(tmp_path: Path) -> None:
    done, status = did(tmp_path, [1, 4], runs=7)
    assert done == Counter([1, 4])
    assert set(status.values()) == {0}
