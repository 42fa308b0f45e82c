"""GRU keeps more than the same loss alone at equal forgetting, and a placebo does not: `gradsurgery ablate` on the real TOFU text.

Run it: pytest -m slow -s tests/experiments
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

import pytest
import yaml

from lightning_modules import cli

ROOT = Path(__file__).parents[2]
TOFU = ROOT.parent / "shared" / "tofu"
SEEDS = [0, 1, 2]
METHODS = [f"{loss}{rest}" for loss in ("GA", "CE-U") for rest in ("", " + GRU", " + GRU + guard", " + placebo")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not TOFU.is_dir(), reason=f"needs TOFU's files in {TOFU}"),
]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], float]:
    """Retain probability by method and data seed, in a part of examples/ablation/grid_s.yaml."""
    folder = tmp_path_factory.mktemp("ablation")
    grid = yaml.safe_load((ROOT / "examples" / "ablation" / "grid_s.yaml").read_text(encoding="utf-8"))
    grid |= {"seeds": {"data": SEEDS, "model": [0]}, "targets": {"forget_probability": [0.05]}, "baseline": None}
    grid["methods"] = [row for row in grid["methods"] if row["name"] in METHODS]
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    command = ["ablate", "--config", str(folder / "grid.yaml"), "--tofu-dir", str(TOFU), "--output", str(folder)]
    assert cli.main([*command, "--jobs", "2"]) == 0
    print((folder / "table.md").read_text(encoding="utf-8"))
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(METHODS) * len(SEEDS)
    assert all(row["reached"] == "True" and abs(float(row["forget_probability"]) - 0.05) <= 0.0021 for row in rows)
    return {(row["method"], int(row["data_seed"])): float(row["retain_probability"]) for row in rows}


@pytest.mark.parametrize("loss", ["GA", "CE-U"])
def test_gru_keeps_more_in_every_pair(kept: dict[tuple[str, int], float], loss: str) -> None:
    gains = [kept[f"{loss} + GRU", seed] - kept[loss, seed] for seed in SEEDS]
    assert min(gains) > 0.03
    assert mean(gains) > 0.06


@pytest.mark.parametrize("loss", ["GA", "CE-U"])
def test_the_guard_keeps_more_still(kept: dict[tuple[str, int], float], loss: str) -> None:
    assert mean(kept[f"{loss} + GRU + guard", seed] - kept[f"{loss} + GRU", seed] for seed in SEEDS) > 0.0


@pytest.mark.parametrize("loss", ["GA", "CE-U"])
def test_a_placebo_of_the_same_length_does_not(kept: dict[tuple[str, int], float], loss: str) -> None:
    assert abs(mean(kept[f"{loss} + placebo", seed] - kept[loss, seed] for seed in SEEDS)) < 0.04
