"""A ledger of two requests: the text of the first is kept, a sketch of the second; made once, and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.lightning_modules.ledger.requests import run


@pytest.fixture(scope="session")
def two_requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only to be read."""
    folder = tmp_path_factory.mktemp("requests")
    criteria = ("--criteria", str(folder / "criteria.yaml"))
    assert run(folder, 1, "--ledger-keep-text", *criteria) == 0
    assert run(folder, 2, "--ledger-sketch", "2", "--request", "the second", *criteria) == 0
    return folder


@pytest.fixture
def ledger(two_requests: Path, tmp_path: Path) -> Path:
    """A copy of the folder with the ledger and its runs."""
    shutil.copytree(two_requests, tmp_path / "copy")
    return tmp_path / "copy"
