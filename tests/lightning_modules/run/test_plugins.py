"""Loggers and callbacks that a user plugs in: made as they are named, told what a run finds, refused before any work."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from lightning_modules import cli
from lightning_modules.run import plugins
from lightning_modules.run import unlearn as unlearn_command
from lightning_modules.run.options import TrainingOptions
from tests.lightning_modules.run.small_runs import small_run

HERE = __name__


class Told(L.Callback):
    """A callback of somebody's own, with arguments."""

    made: list[Told] = []  # noqa: RUF012 (every one that is made)

    def __init__(self, greeting: str, times: int = 1) -> None:
        self.greeting, self.times, self.steps = greeting, times, 0
        Told.made.append(self)

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


class NoCallback:
    def __init__(self) -> None:
        pytest.fail("it was made")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plugged_in", sys.modules[HERE])
    for kind in (Told, NoCallback):
        monkeypatch.setattr(kind, "__module__", "plugged_in")
    Told.made.clear()


def test_a_run_with_a_logger_and_callbacks_from_its_config(tmp_path: Path) -> None:
    told = [{"class_path": "plugged_in.Told", "init_args": {"greeting": "hello", "times": 3}}]
    (tmp_path / "plugs.yaml").write_text(yaml.safe_dump({"callbacks": told, "logger": "csv", "guard": "measure"}))
    assert cli.main([*small_run(tmp_path, "--probes", "false"), "--config", str(tmp_path / "plugs.yaml")]) == 0
    (made,) = Told.made
    assert (made.greeting, made.times, made.steps) == ("hello", 3, 6)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["callbacks"] == told  # so that the config repeats it
    logs = tmp_path / "run" / "logs" / "csv" / "version_0"
    assert yaml.safe_load((logs / "hparams.yaml").read_text())["guard"] == "measure"
    with (logs / "metrics.csv").open(newline="") as file:
        found = {(name, int(row["step"])): float(v) for row in csv.DictReader(file) for name, v in row.items() if v}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for model in ("before", "after"):
        for split, scores in metrics[model].items():
            for name, value in scores.items():
                assert value is None or math.isclose(found[f"{model}/{split}/{name}", 6], value, rel_tol=1e-12)
    with (tmp_path / "run" / "surgery.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        for name in ("cosine", "conflict", "norm_forget", "coefficient_retain", "actual_change_retain"):
            assert math.isclose(
                found[f"surgery/{name}", int(row["step"]) - 1], float(row[name]), rel_tol=1e-6, abs_tol=1e-7
            )


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_logger_whose_package_is_absent_is_refused_in_a_sentence_before_any_work(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plugins, "find_spec", lambda name: None)
    monkeypatch.setattr(unlearn_command, "_unlearn", lambda _: pytest.fail("work was begun"))
    assert cli.main(["unlearn", "--logger", package, "--output", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said == (
        f"gradsurgery: --logger {package}: expected the package {package}, found it not installed; pip install {package}, or --logger csv, "
        "which needs none\n"
    )


WRONG = {
    "a class that is none": [{"class_path": "plugged_in.Missing"}],
    "a module that is none": [{"class_path": "no.such.module.Callback"}],
    "no callback": [{"class_path": "plugged_in.NoCallback"}],
    "a function": [{"class_path": "os.system", "init_args": {"command": "touch owned"}}],
    "an argument that is none": [{"class_path": "plugged_in.Told", "init_args": {"greeting": "hello", "volume": 3}}],
    "an argument of another type": [{"class_path": "plugged_in.Told", "init_args": {"greeting": "hello", "times": "often"}}],
    "an argument too few": [{"class_path": "plugged_in.Told"}],
    "no class path": [{"init_args": {"greeting": "hello"}}],
}  # fmt: skip


@pytest.mark.parametrize("callbacks", WRONG.values(), ids=WRONG)
def test_callbacks_that_cannot_be_made_are_refused_before_any_work_and_nothing_is_called(
    callbacks: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unlearn_command, "_unlearn", lambda _: pytest.fail("work was begun"))
    Path("plugs.yaml").write_text(yaml.safe_dump({"callbacks": callbacks}))
    assert cli.main(["unlearn", "--config", "plugs.yaml", "--output", "run"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gradsurgery: --callbacks: expected a list of {class_path: ..., init_args: {...}}")
    assert said.count("\n") == 1
    assert Told.made == []
    assert [path.name for path in tmp_path.iterdir()] == ["plugs.yaml"]


def test_a_config_is_checked_without_making_anything() -> None:
    training = TrainingOptions(callbacks=[{"class_path": "plugged_in.Told", "init_args": {"greeting": "hello"}}])
    plugins.check_plugins(training)
    assert Told.made == []
    assert [type(made) for made in plugins.make_callbacks(training)] == [Told]
    assert len(Told.made) == 1
