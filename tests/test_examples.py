"""Every example runs as its first line says, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@cache  # two tests look at one run
def run(name: str) -> tuple[str, Path]:
    """What the example printed, and the folder that it ran in."""
    folder = Path(tempfile.mkdtemp())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name)]
    finished = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    if needs := re.search(r"^this example needs .*", finished.stderr, re.MULTILINE):
        pytest.skip(needs.group())
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_and_its_first_lines_say_how(name: str) -> None:
    assert f"python examples/{name}" in (ROOT / "examples" / name).read_text()
    run(name)


def test_the_plain_loop_forgets_and_keeps() -> None:
    learned, unlearned = re.findall(r"forget (\S+), retain (\S+)", run("plain_loop.py")[0])
    assert float(learned[0]) > 0.95
    assert float(unlearned[0]) < 0.3
    assert float(unlearned[1]) > 0.9


def test_the_toy_draws_its_picture() -> None:
    _, folder = run("toy_2d.py")
    assert (folder / "toy_2d.png").read_bytes().startswith(b"\x89PNG")


def test_sft_trainer_forgets_and_keeps() -> None:
    learned, unlearned = re.findall(r"forget (\S+), retain (\S+)", run("sft_trainer.py")[0])
    assert float(learned[0]) > 0.9
    assert float(unlearned[0]) < 0.5
    assert float(unlearned[1]) > 0.8
