"""Whose folder it is, and that --resume goes on with exactly the run that was started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_modules import cli
from lightning_modules import folder as outputs
from lightning_modules.run import unlearn as unlearn_command
from lightning_modules.run.options import UnlearnOptions

STARTED = {"seed": 3, "lr": 1e-3, "rule": "pcgrad", "ema_decay": 0.5, "stop_below": 0.01, "batch_size": 4}


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A folder as an interrupted run leaves it, but for its checkpoints."""
    options = UnlearnOptions.of(**STARTED, output=str(tmp_path)).resolved()
    outputs.write_config(tmp_path, "unlearn", options.recorded())
    return tmp_path


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[UnlearnOptions]:
    """The options of every run that was begun; none is."""
    found: list[UnlearnOptions] = []
    monkeypatch.setattr(unlearn_command, "_unlearn", found.append)
    return found


@pytest.mark.parametrize("name", STARTED)
def test_a_flag_that_is_given_is_noticed_even_if_it_equals_its_default(
    name: str, interrupted: Path, began: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = UnlearnOptions()
    value = {**plain.flat(), "lr": plain.resolved().training.lr, "stop_below": 0.05}[name]
    flag = f"--{name.replace('_', '-')}"
    assert cli.main(["unlearn", "--resume", flag, str(value), "--output", str(interrupted)]) == 1
    said = capsys.readouterr().err
    assert f"{flag} {value} (there it is {STARTED[name]})" in said
    assert said.count("\n") == 1
    assert began == []


@pytest.mark.parametrize("name", ["lr", "stop_below"])
def test_null_means_what_it_meant_at_the_start_and_is_another_value(
    name: str, interrupted: Path, began: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["unlearn", "--resume", f"--{name.replace('_', '-')}", "null", "--output", str(interrupted)]) == 1
    assert f"None (there it is {STARTED[name]})" in capsys.readouterr().err
    assert began == []


def test_what_is_given_again_as_it_was_is_accepted_from_flags_and_from_a_file(
    interrupted: Path, began: list[UnlearnOptions]
) -> None:
    flags = [text for name, value in STARTED.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    for given in (flags, ["--config", str(interrupted / "config.yaml")], ["--epochs", "null", "--authors", "10"], []):
        assert cli.main(["unlearn", "--resume", *given, "--output", str(interrupted)]) == 0
    assert len(set(map(repr, began))) == 1
    assert {name: began[0].flat()[name] for name in STARTED} == STARTED
    assert began[0].training.resume


def test_a_config_file_of_another_run_is_refused(
    interrupted: Path, tmp_path: Path, began: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.yaml").write_text("seed: 0\n")
    arguments = ["unlearn", "--resume", "--config", str(tmp_path / "other.yaml"), "--output", str(interrupted)]
    assert cli.main(arguments) == 1
    assert "--seed 0 (there it is 3)" in capsys.readouterr().err
    assert began == []


@pytest.mark.parametrize("name", outputs.LEFT)
def test_a_folder_with_any_file_of_a_run_is_somebodys(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(FileExistsError, match=f"found {name} of an earlier run in .*; choose another folder"):
        outputs.claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_link_that_points_nowhere_is_somebodys_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").symlink_to(tmp_path / "elsewhere" / "metrics.json")
    with pytest.raises(FileExistsError, match=r"metrics\.json"):
        outputs.claim(tmp_path)


def test_a_folder_with_somebodys_notes_is_free(tmp_path: Path) -> None:
    (tmp_path / "slurm-17.out").touch()
    outputs.claim(tmp_path)
    outputs.claim(tmp_path / "new" / "folder")
