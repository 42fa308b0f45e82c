"""--dry-run says what the run then does, in the memory that it then takes, and writes nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import gradsurgery as gs
from lightning_modules import cli
from lightning_modules.run import held, memory
from lightning_modules.run.models import check_pretrained
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.training.adapters import AdapterSettings, adapt
from tests.lightning_modules.run.bad_inputs import QUESTIONS, forbid_work, state

DATA = ["--model", "model", "--forget", "forget.json", "--retain", "retain.json", "--output", "out"]
STEPS = ["--epochs", "3", "--batch-size", "1", "--accumulate", "2", "--max-new-tokens", "1"]


@pytest.fixture
def here(kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The good model and the good files in the working folder."""
    shutil.copytree(kitchen / "model", tmp_path / "model")
    for name, text in zip(("forget", "retain"), QUESTIONS, strict=True):
        (tmp_path / f"{name}.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def bytes_said(text: str) -> dict[str, str]:
    """What is held -> how much, of the lines about memory."""
    return {what: much for much, what in re.findall(r"^ +(\S+ \wB)  (.*?)(?: \(.*)?$", text, re.MULTILINE)}


@pytest.mark.parametrize(
    "further",
    [
        [],
        ["--forget-loss", "undial", "--guard", "update", "--optimizer", "SGD"],
        ["--lora-rank", "1", "--dtype", "bfloat16"],
    ],
    ids=["defaults", "a copy", "adapters"],
)
def test_the_plan_is_what_the_run_does(
    further: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its steps are those of surgery.csv, its bytes those that are there after the last one."""
    before = state(here)
    with monkeypatch.context() as patch:
        forbid_work(patch, loading=True)
        assert cli.main(["unlearn", *DATA, *STEPS, *further, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert state(here) == before
    assert "Split forget: 2 examples, 2 of them scored\nSplit retain: 6 examples, 6 of them scored" in said
    assert "[[" in said
    assert "]]" in said
    assert "Output: out" in said
    seen: dict[str, Any] = {}
    fit = L.Trainer.fit

    def watched(self: L.Trainer, module: Any, *rest: Any, **more: Any) -> None:
        fit(self, module, *rest, **more)
        seen["optimizer"], seen["size"] = module.optimizers().optimizer, {True: 0, False: 0}
        for weight in module.model.parameters():  # now, because adapters are merged afterwards
            seen["size"][weight.requires_grad] += weight.numel() * weight.element_size()

    monkeypatch.setattr(L.Trainer, "fit", watched)
    monkeypatch.setattr("lightning_modules.run.unlearn.draw", lambda _: None)
    assert cli.main(["unlearn", *DATA, *STEPS, *further]) == 0
    assert (
        bytes_said(capsys.readouterr().err).items()
        >= {what: much for what, much in bytes_said(said).items() if "in all" not in what}.items()
    )
    steps = len(Path("out/surgery.csv").read_text().splitlines()) - 1
    assert f"Steps: at most {steps}, each of 2 x 1 forget" in said
    optimizer, size = seen["optimizer"], seen["size"]
    assert isinstance(optimizer, gs.GradientSurgery)
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    expected = {
        "weights that are trained": size[True],
        "their gradient": size[True],
        "surgery's further rows and averages": optimizer.memory_estimate(),
        f"the state of {'SGD' if 'SGD' in further else 'AdamW'}": sum(v.numel() * v.element_size() for v in states),
    }
    if size[False]:
        expected["weights that stay"] = size[False]
    if "undial" in further:
        expected["a copy of the model before unlearning, with which the losses compare"] = size[True]
    found = bytes_said(said)
    for what, count in expected.items():
        assert found.pop(what) == memory.gigabytes(count), what
    assert list(found) == [what for what in found if what.startswith("in all")]


def test_the_plan_of_teaching(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(here)
    given = [
        "finetune",
        "--model",
        "model",
        "--data",
        "retain.json",
        "--batch-size",
        "4",
        "--epochs",
        "3",
        "--prompt-format",
        "tofu-phi",
    ]
    with monkeypatch.context() as patch:
        forbid_work(patch, loading=True)
        assert cli.main([*given, "--dry-run", "--output", "out"]) == 0
        first = ["--finetune-first", "--finetune", "{epochs: 7}"]
        assert cli.main(["unlearn", *DATA, *first, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert state(here) == before
    assert "Split taught: 6 examples\n" in said
    assert "Steps: 6, each of 1 x 4 examples" in said
    assert r"[[ and ]]: Question: Who wrote book 2?\n[[Answer: Author 2 did.<eos>]]" in said
    assert "First: the target, 8 examples, 7 epochs, to be taught: " in said
    assert "First: the reference, 6 examples, 7 epochs, to be taught: " in said


def test_a_plan_for_a_folder_that_holds_a_run_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/metrics.json").write_text("{}")
    assert cli.main(["unlearn", *DATA, "--dry-run"]) == 1
    assert "expected a new or empty folder, found metrics.json" in capsys.readouterr().err


def test_a_training_that_does_not_fit_is_warned_of(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights fit and the rest does not: a warning, because activations may be small and numbers may be shared."""
    weights = memory.bytes_of(load("model"))
    monkeypatch.setattr(held, "free", lambda: {"this machine": 2 * weights})
    assert cli.main(["unlearn", *DATA, "--dry-run"]) == 0
    assert "Warning: expected a training that fits into the memory of this machine" in capsys.readouterr().out
    monkeypatch.setattr(held, "free", lambda: {"this machine": 90 * weights})
    assert cli.main(["unlearn", *DATA, "--dry-run"]) == 0
    assert "Warning" not in capsys.readouterr().out


def load(name: str) -> nn.Module:
    empty = check_pretrained(name).empty
    assert empty is not None
    return empty


def test_shards_are_a_part_of_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = UnlearnOptions.of(model="model", forget="f", retain="r", guard="update", optimizer="Adafactor").resolved()
    whole = held.held_by_unlearning(load("model"), options)
    quarter = held.held_by_unlearning(load("model"), options.but(strategy="fsdp2", devices="2", num_nodes=2))
    assert [part.bytes for part in quarter] == [part.bytes and part.bytes // 4 for part in whole]
    assert [part.what for part in whole if part.bytes is None] == ["the state of Adafactor (float32)"]


def test_adapters_are_counted_without_numbers() -> None:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 4))
    adapted = adapt(empty, AdapterSettings(2, targets=["0"]))
    assert memory.bytes_of(adapted, trained=True) == 4 * 2 * (8 + 4)
