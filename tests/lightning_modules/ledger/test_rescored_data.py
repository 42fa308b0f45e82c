"""Scoring again reads the rows that the run read, although it shares no code with the training that read them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules.folder import write_config
from lightning_modules.ledger.rescore import alike, data_of
from lightning_modules.run.loading import read_splits
from lightning_modules.run.options import UnlearnOptions
from tests.lightning_modules.ledger.requests import rows

FILES = {"model": "m", "retain": "retain.json"}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "files": FILES | {"forget": "forget.json"},
    "files and held-out ones": FILES | {"forget": "forget.json", "retain_heldout": "heldout.json"},
    "several requests": FILES | {"requests": "requests.yaml", "retain_heldout": "heldout.json", "ledger": "ledger"},
    "files of a model from scratch": FILES | {"forget": "forget.json", "model": "scratch"},
    "fictional authors": {},
    "some fictional authors": {"authors": 7, "forget_authors": 2, "heldout_authors": 3},
    "TOFU": {"model": "m", "tofu": "forget01", "tofu_dir": "tofu"},
    "TOFU, held out": {"model": "m", "tofu": "forget01", "tofu_dir": "tofu", "heldout_authors": 1},
    "some of TOFU, from scratch": {"tofu": "forget01", "tofu_dir": "tofu", "authors": 3, "forget_authors": 1},
    "some of TOFU, taught first": {
        "model": "m",
        "finetune_first": True,
        "heldout_authors": 1,
        "tofu": "forget01",
        "tofu_dir": "tofu",
        "authors": 3,
        "forget_authors": 1,
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    turns = [{"role": of, "content": text} for of, text in (("system", "S."), ("user", "Who?"), ("assistant", "Ada."))]
    forget = [*rows(1), {"text": "Plain."}, {"messages": turns}, rows(9)[0] | {"perturbed_answer": ["No."]}]
    for name, found in {"forget": forget, "retain": rows(2), "heldout": rows(3), "other": rows(4)}.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    (folder / "requests.yaml").write_text("b: other.json\na: forget.json\n")
    (folder / "tofu").mkdir()
    of_split = {"forget01": rows(5, 40), "retain99": rows(6, 80), "real_authors_perturbed": rows(7, 2)}
    of_split |= {"forget01_perturbed": [row | {"perturbed_answer": ["No."]} for row in of_split["forget01"]]}
    for name, found in of_split.items():
        (folder / "tofu" / f"{name}.json").write_text("\n".join(map(json.dumps, found)))
    return folder


@pytest.mark.parametrize("given", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_rows_are_those_of_the_run(
    world: Path, tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    options = UnlearnOptions.of(**given).resolved()
    write_config(tmp_path, "unlearn", options.recorded())
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    expected = read_splits(options)
    assert {split: rows for split, rows in data_of(config).items() if split in expected} == expected
    del config["requests"]  # as before there was such an option
    if "requests" not in given:
        assert data_of(config)["forget"] == expected["forget"]


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (0.5, 0.5009, True),
        (0.5, 0.502, False),
        (40.0, 40.03, True),  # a number above 1 may differ by a share of itself
        (40.0, 40.1, False),
        (None, None, True),
        (None, 0.0, False),
        (0.0, None, False),
        (math.nan, "NaN", True),  # as JSON has it
        (math.nan, 0.5, False),
        (0.5, "NaN", False),
    ],
)
def test_scores_are_the_same_up_to_rounding_and_nan_only_beside_nan(found: Any, expected: Any, same: bool) -> None:
    assert alike(found, expected) is same
