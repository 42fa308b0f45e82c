"""The door: which mistakes become a sentence, with which status, and which keep their traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import pytest

import gradsurgery as gs
from lightning_modules import cli
from lightning_modules.run import unlearn as unlearn_command

MISTAKES = {
    "a command that is none": ["unlern"],
    "no command": [],
    "a flag that is none": ["unlearn", "--learning-rate", "1"],
    "a number that is none": ["unlearn", "--authors", "ten"],
    "a number outside its domain": ["unlearn", "--authors", "0"],
    "a switch that is none": ["evaluate", "--log", "perhaps"],
    "a name outside a short list": ["unlearn", "--guard", "banana"],
    "a name outside a long list": ["unlearn", "--rule", "banana"],
    "a name outside torch's list": ["unlearn", "--optimizer", "banana"],
    "a file that is not there": ["unlearn", "--forget", "none.json", "--retain", "none.json"],
    "a config that is not there": ["unlearn", "--config", "none.yaml"],
    "a grid that is not there": ["ablate", "--config", "none.yaml"],
    "a folder that is not there": ["report", "none"],
    "no folder": ["report"],
}


@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES)
def test_every_mistake_that_can_be_mended_is_one_sentence_and_status_1(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.startswith("gradsurgery: ")
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_the_statuses_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "exit status: 0 if it is done; 1 if something has to be mended first" in shown
    assert "130 if it was interrupted" in shown


def raised_in(path: Path, error: str = "ValueError('what they expected')") -> Callable[..., None]:
    """A function that raises, and seems to stand in that file."""
    space: dict[str, Any] = {}
    exec(compile(f"def fails(*_, **__): raise {error}", str(path), "exec"), space)
    return space["fails"]


LIGHTNING = Path(lightning.pytorch.callbacks.__file__).parent


@pytest.mark.parametrize(
    "path",
    [
        LIGHTNING / "model_checkpoint.py",
        Path("/somewhere/gradsurgery/rules/gru.py"),  # a checkout of another's, with our folders' names
        Path("/somewhere/lightning_modules/run/options/method.py"),
        Path(gs.__file__).parent.with_name("gradsurgery_extras") / "rule.py",
    ],
    ids=str,
)
def test_an_error_of_somebody_else_keeps_its_traceback(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unlearn_command, "_unlearn", raised_in(path))
    with pytest.raises(ValueError, match="what they expected"):
        cli.main(["unlearn"])


@pytest.mark.parametrize("package", [Path(gs.__file__).parent, Path(cli.__file__).parent], ids=lambda path: path.name)
def test_an_error_of_ours_is_a_sentence_without_control_characters(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = r"ValueError('expected a word, found \x1b[2J\x07one that clears the screen')"
    monkeypatch.setattr(unlearn_command, "_unlearn", raised_in(package / "rules" / "any.py", error))
    assert cli.main(["unlearn"]) == 1
    assert capsys.readouterr().err == "gradsurgery: expected a word, found ␛[2J␇one that clears the screen\n"


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = raised_in(Path(cli.__file__).parent / "run" / "any.py", "KeyError('left')")
    monkeypatch.setattr(unlearn_command, "_unlearn", ours)
    with pytest.raises(KeyError):
        cli.main(["unlearn"])


def test_an_interruption_has_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(unlearn_command, "_unlearn", interrupted)
    assert cli.main(["unlearn"]) == 130
    assert "--resume goes on" in capsys.readouterr().err
