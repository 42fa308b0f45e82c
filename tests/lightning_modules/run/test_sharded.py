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
from torch import Tensor

from lightning_modules.run.options import UnlearnOptions
from tests.gradsurgery.optimizer import distributed_workers
from tests.lightning_modules.run import sharded_workers

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.supports(
        "The command",
        "`--strategy fsdp2`: training, scoring, references, LoRA and `--resume` in shards; probes of the whole model, in the first process",
    ),
]

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
            # Shards read batches with padding, and AdamW's first steps make much of the last digits.
            alone = [*arguments, "--padding-free=false", "--batch-size", "2", "--output", str(folder / f"one{number}")]
            sharded_workers.quickly([*alone, "--reference-cache", "false"])
        half = [*common, "--batch-size", "1", "--precision", "bf16-mixed", "--output", str(folder / "bfloat16")]
        again = [*runs[0][: runs[0].index("--output")], "--output", str(folder / "interrupted")]
        distributed_workers.run(sharded_workers.commands, [*runs, half], again, patience=6)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


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
    ours, theirs, start = (weights(folder) for folder in (two / "model", one / "model", folders / "start"))
    assert ours.keys() == theirs.keys()
    moved = max((theirs[key] - start[key]).abs().max().item() for key in start)
    assert moved > 2e-4
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        torch.testing.assert_close(ours[key], value, rtol=0.0, atol=1e-3 * moved, msg=key)
    found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (two, one))
    assert_same_scores(*({**scores, "seconds": None} for scores in (found, expected)), "metrics.json")
    if "probes" in name:
        found, expected = (json.loads((folder / "probes.json").read_text()) for folder in (two, one))
        assert found.keys() == expected.keys() == {"quantization", "relearn"}
        assert_same_scores(found["quantization"], expected["quantization"], "probes.json")
        batches = [of["relearn"]["model"]["batch_size"] for of in (found, expected)]
        assert batches == [2, 2]  # of all processes
    for log in ("surgery.csv", "curve.csv"):
        rows, others = numbers(two, log), numbers(one, log)
        assert len(rows) == len(others) > 1
        for row, other in zip(rows, others, strict=True):
            for column in other:
                assert float(row[column]) == pytest.approx(float(other[column]), rel=1e-3, abs=1e-5), (log, column)


def test_an_interrupted_run_goes_on_to_the_same_weights_and_scores(folders: Path) -> None:
    whole, resumed = folders / "two0", folders / "interrupted"
    for key, value in weights(whole / "model").items():
        assert torch.equal(weights(resumed / "model")[key], value), key
    for name in ("before", "after"):
        found, expected = (json.loads((folder / "metrics.json").read_text())[name] for folder in (resumed, whole))
        assert found == expected
    assert (resumed / "surgery.csv").read_text() == (whole / "surgery.csv").read_text()


def test_bfloat16_gathers_train_float32_weights_that_are_scored_in_float32(folders: Path) -> None:
    """Near the float32 run, and not it: a policy that nothing reads would give its weights."""
    exact, found, start = (weights(folders / name) for name in ("two0/model", "bfloat16/model", "start"))
    moved = max((exact[key] - start[key]).abs().max().item() for key in start)
    apart = max((found[key] - exact[key]).abs().max().item() for key in start)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert 1e-3 * moved < apart < 2.5 * moved
    before = (json.loads((folders / name / "metrics.json").read_text())["before"] for name in ("two0", "bfloat16"))
    assert next(before) == next(before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "uld"}, "found --method uld, .* use --devices 1"),
        ({"lora_rank": 4, "lora_init": "fila"}, "found --lora-init fila, .* leave --lora-init out"),
        ({"best_below": 0.1}, "found --best-below, .* use --stop-below"),
        ({"precision": "16-mixed"}, "expected --precision 32-true or bf16-mixed, found '16-mixed'"),
    ],
)
def test_what_shards_cannot_do_is_refused_before_any_work(options: dict[str, Any], said: str) -> None:
    UnlearnOptions.of(**options).check()
    with pytest.raises(ValueError, match=f"--strategy fsdp2: .*{said}"):
        UnlearnOptions.of(strategy="fsdp2", **options).check()
