"""A result is kept for the examples, models and versions that it was made with, and is not taken for another."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

import gradsurgery as gs
from lightning_modules import cli
from lightning_modules.ablation.grid import Grid
from lightning_modules.ablation.reading import read_grid
from lightning_modules.ablation.run import RUNS, content
from lightning_modules.ablation.sweep import finished

ROWS = [{"question": f"Who is {name}?", "answer": f"{name} writes."} for name in ("Ada", "Bo", "Cy", "Di")]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def grid_of(folder: Path, model: str | None = None, **data: Any) -> Grid:
    values: dict[str, Any] = {"methods": [{"name": "GA"}], "targets": {"forget_probability": [0.3]}, "data": data}
    values |= {} if model is None else {"model": model}
    (folder / "grid.yaml").write_text(yaml.safe_dump(values))
    return read_grid(folder / "grid.yaml")


def done(grid: Grid, folder: Path, status: str = "finished") -> Path:
    (run,) = grid.runs()
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    path = folder / RUNS / f"{run.id}.json"
    path.write_text(json.dumps({"status": status, "config": run.config, "content": content(grid)}))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {"forget": written(tmp_path / "f.json", ROWS[:2]), "retain": written(tmp_path / "r.json", ROWS[2:])}


def test_a_finished_run_stays_finished_while_nothing_changes(files: dict[str, str], tmp_path: Path) -> None:
    grid = grid_of(tmp_path, **files)
    done(grid, tmp_path / "out")
    os.utime(files["forget"], ns=(1, 1))  # another time, the same text
    assert finished(grid.runs()[0], tmp_path / "out", content(grid))
    done(grid, tmp_path / "out", status="failed")
    assert not finished(grid.runs()[0], tmp_path / "out", content(grid))


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_a_changed_file_is_noticed_before_any_work(
    name: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = grid_of(tmp_path, **files)
    kept = done(grid, tmp_path / "out").read_text()
    written(Path(files[name]), [{**ROWS[0], "answer": "Somebody else."}])
    command = ["ablate", "--config", str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "out")]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "examples:" in said
    assert "give another --output, or remove what is to be done again" in said
    assert [path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()] == [kept]


@pytest.mark.parametrize("changed", ["forget01.json", "retain99.json", "model/config.json", None])
def test_a_changed_folder_of_tofu_or_of_a_model_is_noticed(changed: str | None, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name, rows in (("forget01", ROWS[:2]), ("retain99", ROWS[2:])):
        written(tmp_path / f"{name}.json", rows)
    grid = grid_of(tmp_path, str(tmp_path / "model"), tofu="forget01", tofu_dir=str(tmp_path))
    done(grid, tmp_path / "out")
    if changed is None:
        assert finished(grid.runs()[0], tmp_path / "out", content(grid))
        return
    written(tmp_path / changed, ROWS[:1])
    name = "model" if "model" in changed else "examples"
    with pytest.raises(ValueError, match=f"made with other settings.*{name}: .*another --output"):
        finished(grid.runs()[0], tmp_path / "out", content(grid))


def test_another_version_is_noticed(files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = grid_of(tmp_path, **files)
    done(grid, tmp_path / "out")
    monkeypatch.setattr(gs, "__version__", "99.0")
    with pytest.raises(ValueError, match=r"versions: .*there, .*99\.0.* now.*another --output"):
        finished(grid.runs()[0], tmp_path / "out", content(grid))


def test_a_result_that_does_not_say_what_it_was_made_of_is_not_taken(files: dict[str, str], tmp_path: Path) -> None:
    grid = grid_of(tmp_path, **files)
    path = done(grid, tmp_path / "out")
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "content"}))
    with pytest.raises(ValueError, match="examples: None there"):
        finished(grid.runs()[0], tmp_path / "out", content(grid))
