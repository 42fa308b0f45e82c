"""Whole commands on a CUDA device that is not there (`tests/reference/pretend_cuda.py`): nothing of them meets what is on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_modules import cli
from lightning_modules.run import unlearn as unlearn_command
from lightning_modules.training.callbacks import Checkpoints
from tests.lightning_modules.ablation.test_ablation import write_grid
from tests.lightning_modules.evaluation.evaluation_workers import SPLITS
from tests.lightning_modules.ledger import requests
from tests.lightning_modules.run.bad_inputs import model_folder
from tests.lightning_modules.run.small_runs import small_run
from tests.reference.pretend_cuda import PretendedCuda, pretended_cuda

SHORT = ("--epochs", "1", "--stop-below", "0")
RUNS: dict[str, tuple[str, ...]] = {
    "deep, its radius measured": (
        *("--recipe", "deep", "--epochs", "1", "--radius", "auto", "--finish-steps", "1", "--retain-anchor", "100"),
    ),
    "a teacher and noise": ("--recipe", "imitate", "--teacher", "@/reference", *SHORT, "--retain-noise", "0.1"),
    "ULD": ("--method", "uld", "--epochs", "1", "--uld", "{num_layers: 1}"),
    "FILA": ("--lora-rank", "2", "--lora-init", "fila", *SHORT),
}
SLOW: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "float16 with a scaler": ("--precision", "16-mixed", *SHORT),
    "gradient checkpointing": ("--gradient-checkpointing", "--precision", "32-true", *SHORT),
    "start model by log-likelihoods": ("--forget-loss", "npo", "--retain-inside", "0.5", *SHORT),
    "start model by its adapters": ("--lora-rank", "2", "--retain-loss", "kl_divergence", "--save", "adapter", *SHORT),
    "another model's answers": ("--forget-loss", "dpo", *SHORT),
    "a rule of coordinates": ("--rule", "graddrop", *SHORT),
    "the best step": ("--best-below", "0.9", "--guard", "measure", "--scope", "tensor", *SHORT),
    "a rate that is found": ("--lr", "auto", "--epochs", "1"),
    "taught first": ("--finetune-first", *SHORT),
}
TRAINED: dict[str, dict[str, Any]] = {
    "deep": {"radius": {"start": 0.2}, "substitute_weight": 1, "finish_steps": 1, "guard": "update", "steps": 1}
    | {"retain_anchor": 100},
    "UNDO": {"undo": {"alpha": 0.5, "beta": 0.1, "steps": 1, "lr": 7e-4}, "steps": 1},
    "adversary": {"adversary": {"lr": 0.1, "every": 20}, "rule": "sign_agreement", "ema_decay": 0.7, "steps": 1},
    "many rows": {"retain_rows": 3, "ema_decay": 0.9, "steps": 1},
}
WEIGHTED: dict[str, dict[str, Any]] = {
    "ULD": {"kind": "uld", "lr": 5e-3, "epochs": 1, "uld": {"num_layers": 1}, "max_weight": 3},
    "task vector": {"kind": "task_vector", "lr": 1e-3, "epochs": 1, "max_weight": 2},
    "TRU": {"kind": "rectified_task_vector", "lr": 1e-3, "epochs": 1, "max_weight": 2},
}


@pytest.fixture(autouse=True)
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    """A mix of devices raises at once; at the end no model may have read a text on the CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(unlearn_command, "draw", lambda *_: None)
    with pretended_cuda() as mode:
        mode.lookups = []
        yield mode
    assert mode.operations > 1000
    assert not mode.lookups


def run(folder: Path, options: tuple[str, ...]) -> None:
    assert cli.main([text.replace("@", str(folder)) for text in small_run(folder, *options)]) == 0


def grid(folder: Path, rows: dict[str, dict[str, Any]], **targets: Any) -> None:
    """An ablation of these methods, with an attack at the end of those that have one."""
    model_folder(folder / "model", max_position_embeddings=256)
    scored: dict[str, Any] = {"generated_examples": 2, "max_new_tokens": 2}
    if "end" in targets:
        scored["attacks"] = {"short": {"steps": 1, "lr": 1e-3}}
    methods = [{"name": name, **options} for name, options in rows.items()]
    config = write_grid(
        folder, model=str(folder / "model"), targets=targets, evaluate=scored, methods=methods, seeds={"data": [0]}
    )
    assert cli.main(["ablate", "--config", config, "--output", str(folder / "out")]) == 0


@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_everything_on_the_device(name: str, tmp_path: Path) -> None:
    run(tmp_path, RUNS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_further_runs_keep_everything_on_the_device(name: str, tmp_path: Path) -> None:
    run(tmp_path, SLOW[name])


@pytest.mark.slow
def test_every_probe_keeps_everything_on_the_device(tmp_path: Path) -> None:
    run(tmp_path, (*SHORT, "--probes", "all", "--reference", str(tmp_path / "reference")))


def test_a_resumed_run_with_dropout_ends_in_the_weights_of_one_in_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device draws for dropout, from a generator of its own."""
    command = small_run(tmp_path, "--lora-rank", "2", "--lora-dropout", "0.3", "--stop-below", "0")
    assert cli.main(command) == 0
    (tmp_path / "run").rename(tmp_path / "whole")

    def dies(self: Checkpoints, trainer: Any, _: Any) -> None:
        self._save(trainer)
        raise KeyError("the power")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_epoch_end", dies)
        with pytest.raises(KeyError):
            cli.main(command)
    assert cli.main([*command, "--resume"]) == 0
    found, expected = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_ledger_keeps_everything_on_the_device(tmp_path: Path) -> None:
    """A request whose text is kept, one of which a sketch is, and one that protects both."""
    criteria = ("--criteria", str(tmp_path / "criteria.yaml"))
    assert requests.run(tmp_path, 1, "--ledger-keep-text", *criteria) == 0
    assert requests.run(tmp_path, 2, "--ledger-sketch", "2", *criteria) == 0
    assert requests.run(tmp_path, 3, *criteria) == 0
    assert cli.main(["ledger", "verify", str(tmp_path / "ledger"), "--rescore"]) == 0


def test_teaching_and_scoring_keep_everything_on_the_device(tmp_path: Path) -> None:
    small_run(tmp_path)
    (tmp_path / "unseen.json").write_text(json.dumps(SPLITS["holdout"]))
    files = {name: str(tmp_path / f"{name}.json") for name in ("forget", "retain", "unseen")}
    taught, reference = str(tmp_path / "taught"), str(tmp_path / "reference")
    given = ["finetune", "--model", str(tmp_path / "model"), "--data", files["retain"], "--epochs", "1"]
    assert cli.main([*given, "--batch-size", "2", "--output", taught]) == 0
    given = ["evaluate", "--model", f"{taught}/model", "--reference", reference, "--max-new-tokens", "2"]
    given += ["--forget", files["forget"], "--retain", files["retain"], "--holdout", files["unseen"]]
    assert cli.main([*given, "--output", str(tmp_path / "scored")]) == 0


def test_the_end_of_an_ablation_s_methods_is_scored_and_attacked_on_the_device(tmp_path: Path) -> None:
    """Lightning leaves a model on the CPU."""
    grid(tmp_path, {"deep": TRAINED["deep"]}, end=["own"])


@pytest.mark.slow
def test_further_methods_are_scored_and_attacked_on_the_device(tmp_path: Path) -> None:
    grid(tmp_path, TRAINED, end=["own"])


@pytest.mark.parametrize(
    "name", ["task vector", pytest.param("ULD", marks=pytest.mark.slow), pytest.param("TRU", marks=pytest.mark.slow)]
)
def test_every_weight_of_a_method_is_scored_on_the_device(name: str, tmp_path: Path) -> None:
    grid(tmp_path, {name: WEIGHTED[name]}, forget_probability=[0.5], retained=[0.5])
