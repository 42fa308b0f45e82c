"""A run that is killed goes on with the ledger and the request that it began with, wherever and whenever that is."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_modules import cli
from lightning_modules.folder import CHECKPOINTS, REQUEST
from lightning_modules.ledger.chain import read_chain
from lightning_modules.run import deletion, methods
from lightning_modules.run import unlearn as unlearn_command
from tests.lightning_modules.ledger.requests import arguments, run


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def resumed(folder: Path, *further: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearn_command, "draw", lambda *_: None)
        return cli.main(["unlearn", "--resume", "--output", str(folder), *further])


def count(ledger: Path) -> int:
    return len(read_chain(ledger / "ledger.jsonl"))


def test_a_run_goes_on_with_its_ledger_from_whatever_folder_the_command_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with monkeypatch.context() as patch:
        patch.setattr(methods, "fit", killed)
        assert run(tmp_path, 1, "--ledger", "requests") == 130
    monkeypatch.chdir(tmp_path / "there")
    with deletion.held(tmp_path / "here" / "requests"):  # another run is at work with it
        assert resumed(tmp_path / "run_1") == 1
        assert "expected a ledger that no other run works with" in capsys.readouterr().err
    assert resumed(tmp_path / "run_1", "--ledger", "../here/requests") == 0
    assert list((tmp_path / "there").iterdir()) == []
    assert count(tmp_path / "here" / "requests") == 1


@pytest.mark.parametrize("when", ["training", "whole"])
def test_a_run_whose_request_is_gone_does_not_end_without_an_entry(
    ledger: Path, when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, name = (methods, "finish") if when == "training" else (unlearn_command, "enter")
    further = ["--finish-steps", "1"] if when == "training" else []
    with monkeypatch.context() as patch:
        patch.setattr(place, name, killed)
        assert run(ledger, 3, "--checkpoint-every", "1", *further) == 130
    path = ledger / "run_3" / REQUEST
    path.rename(ledger / "aside.json")
    assert resumed(ledger / "run_3") == 1
    assert f"expected {REQUEST}" in capsys.readouterr().err
    assert (ledger / "run_3" / CHECKPOINTS).exists()
    assert count(ledger / "ledger") == 2
    (ledger / "aside.json").rename(path)
    assert resumed(ledger / "run_3") == 0
    assert count(ledger / "ledger") == 3


def test_a_request_that_is_removed_while_the_run_goes_on_is_missed_at_its_end(
    ledger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def removes(*values: Any) -> float:
        (ledger / "run_3" / REQUEST).unlink()
        return fit(*values)

    fit = methods.fit
    monkeypatch.setattr(methods, "fit", removes)
    assert run(ledger, 3) == 1
    assert f"expected {REQUEST}" in capsys.readouterr().err
    assert count(ledger / "ledger") == 2


@pytest.mark.parametrize("memorised", [True, False])
def test_killed_at_any_moment_before_the_training_a_run_can_be_begun_or_gone_on_with(
    ledger: Path, memorised: bool
) -> None:
    """A process dies before the first, second or third file in the output folder takes its place."""
    further = [] if memorised else ["--stop-below", "0.5"]
    for event in range(3):
        shutil.rmtree(ledger / "run_3", ignore_errors=True)
        assert in_a_child(lambda event=event: dying(ledger, event, further)) == -signal.SIGKILL
        begun = (ledger / "run_3" / "config.yaml").exists()
        again = (lambda: resumed(ledger / "run_3")) if begun else (lambda: run(ledger, 3, *further))
        assert in_a_child(lambda again=again: to_training(again)) == 0, event


def dying(folder: Path, event: int, further: list[str]) -> int:
    done, replace = 0, Path.replace

    def counted(self: Path, target: Any) -> Path:
        nonlocal done
        if Path(target).is_relative_to(folder / "run_3"):
            if done == event:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
        return replace(self, target)

    Path.replace = counted
    return to_training(lambda: run(folder, 3, *further))


def to_training(command: Callable[[], int]) -> int:
    """0 once the training, or in its place the entry, is reached."""
    methods.fit = unlearn_command.enter = killed
    return 0 if command() == 130 else 1


def in_a_child(work: Callable[[], int]) -> int:
    child = os.fork()
    if not child:
        code = 9
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_stranger_in_the_folder_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(tmp_path, 1)
    (tmp_path / "run_1").mkdir()
    (tmp_path / "run_1" / REQUEST).write_text("{}")
    assert cli.main(command) == 1
    assert f"found {REQUEST} of an earlier run" in capsys.readouterr().err
    assert (tmp_path / "run_1" / REQUEST).read_text() == "{}"
