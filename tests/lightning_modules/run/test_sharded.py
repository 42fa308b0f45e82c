"""`--strategy fsdp2` on two processes of a CPU leaves what one process leaves."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.gradsurgery.optimizer import distributed_workers
from tests.lightning_modules.run import sharded_workers

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

# What is asked of the command, beside the tiny model and its data.
RUNS: dict[str, list[str]] = {
    "guard, probes, a reference": ["--guard", "update", "--probes", "true", "--reference", "start"],
    "a copy to compare with": ["--retain-loss", "kl_divergence", "--start-model", "copy"],
    "numbers to compare with": ["--forget-loss", "npo", "--max-norm", "0.1"],
    "adapters": ["--forget-loss", "npo", "--start-model", "adapters_off", "--lora-rank", "2"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        common = sharded_workers.prepare(folder)
        runs = []
        for number, own in enumerate(RUNS.values()):
            arguments = [*common, *(str(folder / "start") if word == "start" else word for word in own)]
            runs.append([*arguments, "--batch-size", "1", "--output", str(folder / f"two{number}")])
            alone = [*arguments, "--batch-size", "2", "--output", str(folder / f"one{number}")]
            sharded_workers.quickly([*alone, "--reference-cache", "false"])
        distributed_workers.run(sharded_workers.commands, runs, patience=6)
    return folder


def numbers(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_scores(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same_scores(found[key], value, f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_same_scores(found[number], value, f"{where}, {number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-9), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_with_shards_leave_what_one_process_leaves(folders: Path, name: str) -> None:
    number = list(RUNS).index(name)
    one, two = folders / f"one{number}", folders / f"two{number}"
    assert {path.name for path in two.rglob("*")} == {path.name for path in one.rglob("*")}
    ours, theirs, start = (
        load_file(folder / "model.safetensors") for folder in (two / "model", one / "model", folders / "start")
    )
    assert ours.keys() == theirs.keys()
    moved = max((theirs[key] - start[key]).abs().max().item() for key in start)
    assert moved > 2e-4
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        torch.testing.assert_close(ours[key], value, rtol=0.0, atol=1e-3 * moved, msg=key)
    found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (two, one))
    assert_same_scores(*({**scores, "seconds": None} for scores in (found, expected)), "metrics.json")
    if "probes" in name:  # teaching again takes batches of --batch-size, of which each process has half
        found, expected = (json.loads((folder / "probes.json").read_text()) for folder in (two, one))
        assert found.keys() == expected.keys() == {"quantization", "relearn"}
        assert_same_scores(found["quantization"], expected["quantization"], "probes.json")
    for log in ("surgery.csv", "curve.csv"):
        rows, others = numbers(two, log), numbers(one, log)
        assert len(rows) == len(others) > 1
        for row, other in zip(rows, others, strict=True):
            for column in other.keys() - {"loss_forget", "loss_retain"}:  # those are each process's own
                assert float(row[column]) == pytest.approx(float(other[column]), rel=1e-3, abs=1e-5), (log, column)
