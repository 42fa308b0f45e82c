"""--resume goes on with the same texts and the same models, and refuses others under the same names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules import cli
from lightning_modules.training.callbacks import Checkpoints
from tests.lightning_modules.run.bad_inputs import ROWS, model_folder

FEW = ["--epochs", "2", "--lr", "1e-3", "--devices", "1", "--precision", "32-true", "--padding-free", "false"]
UNLEARN = ["unlearn", "--model", "start", "--forget", "forget.json", "--retain", "retain.json", *FEW]
UNLEARN += ["--max-new-tokens", "1", "--stop-below", "0", "--accumulate", "1"]
FINETUNE = ["finetune", "--model", "start", "--data", "retain.json", *FEW]


def change_text(path: Path) -> None:
    path.write_text(path.read_text().replace("did", "never did"))


def change_model(path: Path) -> None:
    model_folder(path, tie_word_embeddings=False)


CASES: dict[str, tuple[list[str], str, Callable[[Path], None], str]] = {
    "the taught examples": (FINETUNE, "retain.json", change_text, "the examples: "),
    "the taught model": (FINETUNE, "start", change_model, "the files of --model: "),
    "refusals": (
        [*UNLEARN, "--forget-loss", "idk", "--refusals", "refusals.txt"],
        "refusals.txt",
        change_text,
        "the texts in --refusals: ",
    ),
    "substitutes": (
        [*UNLEARN, "--finish-steps", "1", "--substitutes", "substitutes.json"],
        "substitutes.json",
        change_text,
        "the answers in --substitutes: ",
    ),
    "the start model": (UNLEARN, "start", change_model, "the files of --model: "),
    "the teacher": (
        [*UNLEARN, "--forget-loss", "kl_divergence", "--teacher", "teacher"],
        "teacher",
        change_model,
        "the files of --teacher: ",
    ),
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("start", "teacher"):
        model_folder(tmp_path / name, tie_word_embeddings=False)
    (tmp_path / "forget.json").write_text(json.dumps(ROWS[:2]))
    (tmp_path / "retain.json").write_text(json.dumps(ROWS[2:]))
    substitutes = [row | {"answer": f"Somebody {number} did."} for number, row in enumerate(ROWS[:2])]
    (tmp_path / "substitutes.json").write_text(json.dumps(substitutes))
    (tmp_path / "refusals.txt").write_text("I never did know.\n")
    return tmp_path


def interrupt(arguments: list[str]) -> None:
    """The run dies when its first epoch is saved."""

    def dies(self: Checkpoints, trainer: Any, _: Any) -> None:
        self._save(trainer)
        raise KeyError("the power")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_epoch_end", dies)
        with pytest.raises(KeyError):
            cli.main([*arguments, "--output", "out"])


@pytest.mark.parametrize("case", CASES)
def test_what_changed_meanwhile_is_one_sentence(case: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, name, change, said = CASES[case]
    interrupt(arguments)
    change(world / name)
    assert cli.main([arguments[0], "--resume", "--output", "out"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "expected a checkpoint of this run, found one of another (" in error
    assert said in error


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_an_earlier_version_which_does_not_say_it_is_gone_on_with(case: str, world: Path) -> None:
    arguments, *_ = CASES[case]
    interrupt(arguments)
    path = world / "out" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (run,) = (state["run"] for state in checkpoint["callbacks"].values() if "run" in state)
    for entry in [name for name in run if name.startswith("the ")]:
        del run[entry]
    torch.save(checkpoint, path)
    assert cli.main([arguments[0], "--resume", "--output", "out"]) == 0
