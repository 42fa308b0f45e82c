"""What the tables of bad inputs share: a folder of good files, and the check of a row."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lightning_modules import cli
from tests.lightning_modules.evaluation import evaluation_workers
from tests.lightning_modules.run.bad_inputs import QUESTIONS, REFUSED, Row, forbid_work, model_folder, state, status


@pytest.fixture(scope="session")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, `model`."""
    folder = tmp_path_factory.mktemp("kitchen")
    model_folder(folder / "model")
    return folder


@pytest.fixture(scope="session")
def parser() -> ArgumentParser:
    """The command line's parser, made once: it takes longer than most rows."""
    return cli._make_parser()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where scores are kept: a folder of the test's own, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gradsurgery" / "reference"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model as a folder, with its tokenizer."""
    model, tokenizer = evaluation_workers.model_and_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refuse(
    parser: ArgumentParser,
    kitchen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[Row], None]:
    """Run a row in a folder with good files, and check that it is refused as the tables promise."""

    def check(row: Row) -> None:
        folder = tmp_path / "here"
        shutil.copytree(kitchen, folder)
        (folder / "forget.json").write_text(QUESTIONS[0])
        (folder / "retain.json").write_text(QUESTIONS[1])
        monkeypatch.chdir(folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        arguments = row.arguments(folder)
        before = state(folder)
        capsys.readouterr()
        monkeypatch.setattr(cli, "_make_parser", lambda: parser)
        forbid_work(monkeypatch, loading=not row.loads)
        assert status(arguments) in REFUSED  # whatever is no sentence is raised here
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert any(word in said.lower() for word in ("expected", "--help")), said
        place = 0
        for fragment in row.said:
            assert fragment in said[place:], said
            place += said[place:].index(fragment) + len(fragment)
        assert state(folder) == before

    return check
