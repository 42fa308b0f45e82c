"""A process that is killed at any moment, and resumed, ends as the one that nobody disturbed: weights, scores, tables."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lightning_modules import cli
from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.report import figures
from lightning_modules.training.scratch import ScratchSettings, scratch_model
from tests.lightning_modules.run import kills
from tests.lightning_modules.run.kills import Kill, in_a_process

PICTURE = b"\x89PNG, and so on, IEND\xaeB`\x82"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class World:
    """A tiny model with dropout, its data, and the run that nobody disturbs."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
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
        steps = ["--epochs", "2", "--batch-size", "1", "--accumulate", "2", "--checkpoint-every", "1", "--lr", "1e-3"]
        scores = ["--best-below", "0.9", "--score-every", "1", "--probes", "true", "--max-new-tokens", "2"]
        models = ["--model", str(root / "start"), "--reference", str(root / "start"), "--reference-cache", "false"]
        self.command = ["unlearn", *models, *data, *steps, *scores, "--forget-loss", "npo", "--precision", "32-true"]
        self.command += ["--devices", "1", "--guard", "measure"]
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
            assert status < 0, (death, log.read_text())
            assert kills.broken(folder) == [], death
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
        yield World(tmp_path_factory.mktemp("kills"), patch)


@pytest.mark.parametrize("count", [5, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(world: World, count: int) -> None:
    for number, deaths in enumerate(world.moments(count)):
        world.survives(f"{count}-{number}", *deaths)
