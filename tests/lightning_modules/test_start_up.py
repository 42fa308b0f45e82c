"""What the command imports before it has work to do: an answer about options needs none of what takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gradsurgery as gs
from lightning_modules.run.options import names
from lightning_modules.training import objectives

ROOT = Path(__file__).parents[2]
HEAVY = (
    *("torch", "gradsurgery", "transformers", "tokenizers", "lightning", "torchmetrics", "peft", "datasets", "numpy"),
    *("scipy", "sklearn", "pandas", "matplotlib", "rouge_score", "nltk", "rich", "jinja2"),
)

ASKED = {
    "help": ["--help"],
    "no command": [],
    "an unknown command": ["unlern"],
    **{f"help of {name}": [name, "--help"] for name in ("unlearn", "evaluate", "finetune", "ablate", "report")},
    "no number": ["unlearn", "--lr", "banana"],
    "no flag": ["unlearn", "--nosuch", "1"],
    "half a flag": ["unlearn", "--epo", "3"],
    "no rule": ["unlearn", "--rule", "gruu"],
    "no loss": ["unlearn", "--forget-loss", "banana"],
    "a number outside its domain": ["unlearn", "--batch-size", "0"],
    "two that contradict each other": ["unlearn", "--epochs", "3", "--steps", "4"],
    "adapters without a rank": ["unlearn", "--lora-dropout", "0.1"],
    "one file of two": ["unlearn", "--forget", "forget.json"],
    "a model with nothing to forget": ["unlearn", "--model", "m"],
    "surgery of ULD": ["unlearn", "--method", "uld", "--rule", "gem"],
    "ULD's settings": ["unlearn", "--method", "uld", "--uld", "{foo: 1}"],
    "a model that is not taught": ["unlearn", "--finetune", "{epochs: 2}"],
    "no such file of options": ["unlearn", "--config", "none.yaml"],
    "nothing to evaluate": ["evaluate", "--model", "m"],
    "nobody to teach": ["finetune"],
    "nothing to teach": ["finetune", "--model", "m"],
    "shards to teach": ["finetune", "--model", "m", "--data", "d", "--strategy", "fsdp2"],
    "no grid": ["ablate"],
    "a job of none": ["ablate", "--config", "grid.yaml", "--jobs", "0"],
}

ASK = """
import contextlib, io, json, sys
from lightning_modules import cli

def ask(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(words)
        except SystemExit as ended:
            status = ended.code
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "heavy": [h for h in heavy if h in sys.modules]}

asked, heavy = json.loads(sys.stdin.read())
print(json.dumps({name: ask(words) for name, words in asked.items()}))
"""


def python(code: str, folder: Path, given: str = "") -> str:
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    run = subprocess.run(
        words, cwd=folder, env=paths, input=given, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case in one process: what one imports, all later ones have, so the first with a fault names it."""
    return json.loads(python(ASK, tmp_path_factory.mktemp("empty"), json.dumps([ASKED, HEAVY])))


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_about_options_imports_nothing_heavy(name: str, answers: dict[str, Any]) -> None:
    answer = answers[name]
    assert answer["heavy"] == []
    if name.startswith("help"):
        assert answer["status"] == 0
        assert "usage: " in answer["out"]
    else:
        assert answer["status"] == 1
        assert answer["err"].startswith("gradsurgery: ")
        assert answer["err"].count("\n") == 1


def test_importing_gradsurgery_imports_nothing_but_itself_beyond_torch(tmp_path: Path) -> None:
    code = "import sys, torch; known = set(sys.modules); import gradsurgery; print(*(set(sys.modules) - known))"
    imported = {
        name for name in python(code, tmp_path).split() if name.partition(".")[0] not in sys.stdlib_module_names
    }
    assert {name.partition(".")[0] for name in imported} == {"gradsurgery"}


def test_the_names_of_the_command_line_are_those_of_the_tables() -> None:
    assert list(names.RULES) == [*gs.rules.RULES, *gs.elementwise.ELEMENTWISE]
    assert names.LOSSES == objectives.NAMES
    assert names.IMITATING == objectives.IMITATING
    losses = {name: objectives.by_name(name) for name in names.LOSSES}
    teaching = {n for n, loss in losses.items() if objectives.needs_refusals(loss) or objectives.needs_target(loss)}
    assert set(names.REFUSING) == teaching


def test_half_a_flag_is_refused_with_the_whole_ones_that_it_may_mean(answers: dict[str, Any]) -> None:
    assert answers["half a flag"]["err"] == (
        "gradsurgery: unrecognized arguments: --epo 3; did you mean --epochs? gradsurgery unlearn --help lists what there is\n"
    )
    assert "did you mean" not in answers["no flag"]["err"]
