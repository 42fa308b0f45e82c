"""Every example runs as its first line says, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(name: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name)]
    finished = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_and_its_first_lines_say_how(name: str, tmp_path: Path) -> None:
    assert f"python examples/{name}" in (ROOT / "examples" / name).read_text()
    run(name, tmp_path)


def test_the_plain_loop_forgets_and_keeps(tmp_path: Path) -> None:
    learned, unlearned = re.findall(r"forget (\S+), retain (\S+)", run("plain_loop.py", tmp_path))
    assert float(learned[0]) > 0.95
    assert float(unlearned[0]) < 0.3
    assert float(unlearned[1]) > 0.9


def test_the_toy_draws_its_picture(tmp_path: Path) -> None:
    run("toy_2d.py", tmp_path)
    assert (tmp_path / "toy_2d.png").read_bytes().startswith(b"\x89PNG")
