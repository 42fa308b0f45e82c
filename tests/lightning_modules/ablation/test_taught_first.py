"""A grid over a ready model that is taught first: one start model and one reference for each model seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules import cli
from lightning_modules.ablation.reading import read_grid
from lightning_modules.ablation.run import load_start, prepare
from lightning_modules.run.loading import make_data
from lightning_modules.run.teaching import teach_first
from tests.lightning_modules.ablation.test_ablation import write_grid
from tests.lightning_modules.run.bad_inputs import model_folder
from tests.lightning_modules.training.test_perturbed import weights


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("first")
    model_folder(folder / "model", max_position_embeddings=256)
    grid: dict[str, Any] = {
        "model": str(folder / "model"),
        "first": {"finetune_first": True, "finetune": {"epochs": 2, "lr": 1e-2}},
        "methods": [{"name": "CE-U", "steps": 1}],
        "targets": {"end": ["own"]},
        "seeds": {"data": [5], "model": [0, 1]},
        "evaluate": {"generated_examples": 2, "max_new_tokens": 2, "attacks": {"A1": {"steps": 1, "lr": 1e-3}}},
    }
    return write_grid(folder, **grid)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_each_model_seed_has_a_taught_model_and_a_reference_that_never_saw_the_forget_set(
    config: str, tmp_path: Path
) -> None:
    assert cli.main(["ablate", "--config", config, "--output", str(tmp_path)]) == 0
    known = [json.loads((tmp_path / "models" / f"m{seed}.json").read_text()) for seed in (0, 1)]
    for scores in known:
        assert scores["start"]["forget_nll"] < scores["reference"]["forget_nll"]
        assert scores["reference"]["attacks"]["A1"] > 0.0
    assert known[0]["start"]["forget_nll"] != known[1]["start"]["forget_nll"]
    first, second = (run for run in read_grid(config).runs())
    starts = []
    for run in (first, second):
        splits = make_data(run.options(), None).read()
        teach_first(run.start, splits)  # from the cache
        starts.append(weights(load_start(run, splits)[0]))
    assert status_of(tmp_path, "ce-u-m0-d5") == status_of(tmp_path, "ce-u-m1-d5") == "finished"
    assert not starts[0].equal(starts[1])


def test_scores_of_models_that_were_taught_in_another_precision_are_not_taken(config: str, tmp_path: Path) -> None:
    exact, other = read_grid(config), tmp_path / "bf16.yaml"
    prepare(exact.runs()[0], tmp_path)
    other.write_text(yaml.safe_dump(yaml.safe_load(Path(config).read_text()) | {"train": {"precision": "bf16-mixed"}}))
    with pytest.raises(ValueError, match=r"precision: 32-true there, bf16-mixed now"):
        prepare(read_grid(other).runs()[0], tmp_path)


def status_of(folder: Path, name: str) -> str:
    return json.loads((folder / "runs" / f"{name}.json").read_text())["status"]


def test_without_teaching_a_ready_model_has_one_model_seed(config: str, tmp_path: Path) -> None:
    text = Path(config).read_text().replace("finetune_first: true", "finetune_first: false").replace("finetune:\n    epochs: 2\n    lr: 0.01", "finetune: {}")  # fmt: skip
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match="one model seed for the ready model"):
        read_grid(tmp_path / "grid.yaml")
