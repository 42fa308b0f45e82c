"""A process that is killed at any moment, and resumed, ends as the one that nobody disturbed: weights, scores, tables."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from lightning_modules import cli
from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.folder import locked
from lightning_modules.report import figures
from lightning_modules.training.scratch import ScratchSettings, scratch_model
from tests.lightning_modules.run import kills
from tests.lightning_modules.run.kills import Kill, in_a_process

SURGERY = ("--accumulate", "2", "--forget-loss", "npo", "--guard", "measure", "--probes", "true", "--score-every", "1")
SURGERY += ("--best-below", "0.9")
ULD = ("--method", "uld", "--uld", "{num_layers: 1, weight: 1.0}", "--lora-rank", "2")
PICTURE = b"\x89PNG, and so on, IEND\xaeB`\x82"

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.supports("The command", "killed at any moment, `--resume` ends in the same weights, scores and tables"),
]


class World:
    """A tiny model with dropout, its data, and the run that nobody disturbs."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, method: Sequence[str]) -> None:
        self.root = root
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads would be missing in a forked process
        rows = fictional_authors(1)
        model, tokenizer = scratch_model(
            rows[:11], ScratchSettings(hidden_size=16, num_layers=1, num_heads=2, epochs=1), cache_dir=root / "scratch"
        )
        model.config.attention_dropout = 0.3  # so that every batch draws random numbers
        model.save_pretrained(root / "start")
        tokenizer.save_pretrained(root / "start")
        for name, part in (("forget", rows[:6]), ("retain", rows[6:11])):
            (root / f"{name}.json").write_text(json.dumps(part))
        data = ["--forget", str(root / "forget.json"), "--retain", str(root / "retain.json")]
        models = ["--model", str(root / "start"), "--reference", str(root / "start"), "--reference-cache", "false"]
        steps = [
            "--epochs",
            "2",
            "--batch-size",
            "1",
            "--checkpoint-every",
            "1",
            "--lr",
            "1e-3",
            "--max-new-tokens",
            "2",
        ]
        self.command = ["unlearn", *models, *data, *steps, "--precision", "32-true", "--devices", "1", *method]
        patch.setattr(figures, "drawn", lambda _: {})  # two thirds of the time, and no file of its own
        patch.setattr(Figure, "savefig", lambda _, path, **options: Path(path).write_bytes(PICTURE))
        # In this process first, so that the forked ones have nothing to import.
        assert cli.main([*self.command, "--output", str(root / "first")]) == 0
        status, self.events = in_a_process([*self.command, "--output", str(root / "whole")], root / "whole.log")
        assert status == 0, (root / "whole.log").read_text()
        self.whole = kills.contents(root / "whole")

    def survives(self, name: str, *deaths: Kill) -> None:
        """Kill a run and those that resume it, and compare what the last one leaves."""
        folder, log = self.root / name, self.root / f"{name}.log"
        for death in (*deaths, None):
            given = ["unlearn", "--resume"] if (folder / "config.yaml").exists() else self.command
            status, _ = in_a_process([*given, "--output", str(folder)], log, death)
            if status == 0:
                break  # a resumed run is shorter, and may end before its turn to die
            # Some ways to write are told that there is no room, instead of being killed: a full disk, in one sentence.
            told = (
                death is not None and death.bytes_left is not None and "File too large (os error 27)" in log.read_text()
            )
            assert status < 0 or (status == 1 and told), (death, log.read_text())
            assert "Traceback" not in log.read_text(), death
            assert kills.broken(folder) == [], death
            if (folder / "metrics.json").exists() and not (folder / "checkpoints").exists():
                status = 0  # it died when all was done
                break
        assert status == 0, (deaths, log.read_text())
        found = kills.contents(folder)
        assert found.keys() == self.whole.keys(), deaths
        other = [file for file, value in self.whole.items() if found[file] != value]
        assert not other, (deaths, other)

    def moments(self, count: int) -> list[list[Kill]]:
        """Seeded: writes and everything else alike, a third of them in the middle of a write, some of resumed runs."""
        draw, found = random.Random(10), list[list[Kill]]()
        files = [number for number, event in enumerate(self.events) if event != "forward"]
        steps = [number for number, event in enumerate(self.events) if event == "forward"]
        while len(found) < count:
            deaths: list[Kill] = []
            for _ in range(1 if draw.random() < 0.75 else 2):
                event = draw.choice(files if draw.random() < 0.6 else steps)
                deaths.append(Kill(event, draw.choice((1, 100, 1000, 10000)) if draw.random() < 0.34 else None))
            found.append(deaths)
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield World(tmp_path_factory.mktemp("kills"), patch, SURGERY)


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(world: World, count: int) -> None:
    for number, deaths in enumerate(world.moments(count)):
        world.survives(f"{count}-{number}", *deaths)


@pytest.mark.slow
def test_uld_that_is_killed_and_resumed_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, monkeypatch, ULD)
    for number, deaths in enumerate(world.moments(10)):
        world.survives(str(number), *deaths)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    share: float, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, left = world.root / f"full{share}", int(share * world.events.count("fsync"))

    def fsync(_: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert cli.main([*world.command, "--output", str(folder)]) == 1
    error = capsys.readouterr().err
    assert f"gradsurgery: {folder}/" in error
    assert "found: No space left on device; what was there before is whole" in error
    assert "Traceback" not in error
    assert kills.broken(folder) == []
    world.survives(folder.name)


@pytest.fixture(scope="module")
def interrupted(world: World) -> Path:
    """A run that died in its second epoch."""
    middle = len(world.events) // 2
    folder = world.root / "interrupted"
    in_a_process([*world.command, "--output", str(folder)], world.root / "interrupted.log", Kill(middle))
    assert (folder / "checkpoints" / "last.ckpt").exists()
    return folder


def of_another_run(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["Checkpoints"]["run"]["rule"] = "pcgrad"
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "expected a whole checkpoint that holds tensors and numbers only"),
        (lambda path: path.write_bytes(pickle.dumps(os.getcwd)), "nothing in it was run: remove it to train from the start"),
        (of_another_run, "expected a checkpoint of this run, found one of another (rule: pcgrad there, gru here); remove it"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_the_runs_own_is_one_sentence(
    spoil: Callable[[Path], Any],
    said: str,
    world: World,
    interrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    spoil(folder / "checkpoints" / "last.ckpt")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert cli.main(["unlearn", "--resume", "--output", str(folder)]) == 1
    # Before it a warning, as the tiny model knows nothing, and where its kept scores are from; or that the machine is slow.
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"gradsurgery: {folder / 'checkpoints' / 'last.ckpt'}: expected ")
    assert said in error
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_data_that_changed_meanwhile_is_one_sentence(
    world: World, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / "run", world.root / "forget.json"
    shutil.copytree(interrupted, folder)
    there = file.read_text()
    rows = json.loads(there)
    rows[0]["answer"] = "Nobody knows that."
    file.write_text(json.dumps(rows))
    try:
        assert cli.main(["unlearn", "--resume", "--output", str(folder)]) == 1
    finally:
        file.write_text(there)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "expected a checkpoint of this run, found one of another (the examples in these files: " in error


def test_without_its_checkpoint_a_run_is_trained_from_the_start(world: World, interrupted: Path) -> None:
    shutil.copytree(interrupted, world.root / "without")
    (world.root / "without" / "checkpoints" / "last.ckpt").unlink()
    world.survives("without")


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_in_one_folder_are_refused(
    resume: bool, world: World, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if resume:
        shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    command = ["unlearn", "--resume"] if resume else world.command
    with locked(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main([*command, "--output", str(tmp_path)]) == 1
        assert sorted(tmp_path.rglob("*")) == before
    said = f"--output: expected a folder in which no other run works, found process {os.getpid()} on "
    assert said in capsys.readouterr().err
