"""Model utility in an ablation: the nine numbers of TOFU at a match, in results.csv and in the table."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import cli
from lightning_modules.ablation.reading import read_grid
from lightning_modules.ablation.scoring import Scorer
from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate
from lightning_modules.metrics.functional import UTILITY_SPLITS
from lightning_modules.run.loading import make_data
from tests.lightning_modules.run.bad_inputs import model_folder

Rows = list[dict[str, Any]]


def rows(name: str, count: int, wrong: int) -> Rows:
    """Questions with answers of several words, some of which the model of `model_folder` may say by chance."""
    return [
        {
            "question": f"{name} {index}?",
            "answer": f"the {name} of {index}",
            "perturbed_answer": [f"a {name} {index + other}" for other in range(1, wrong + 1)],
        }
        for index in range(count)
    ]


FILES = {
    "forget01": rows("f", 40, 0),
    "forget01_perturbed": rows("f", 40, 2),
    "retain99": rows("r", 40, 0),
    "retain_perturbed": rows("r", 20, 2),
    "real_authors_perturbed": rows("a", 7, 3),
    "world_facts_perturbed": rows("w", 9, 3),
}


def grid_in(folder: Path, files: dict[str, Rows], **changes: Any) -> Path:
    (folder / "tofu").mkdir()
    for name, found in files.items():
        kept = [{key: value for key, value in row.items() if value} for row in found]
        (folder / "tofu" / f"{name}.json").write_text("\n".join(map(json.dumps, kept)))
    grid: dict[str, Any] = {
        "data": {"tofu": "forget01", "tofu_dir": str(folder / "tofu")},
        "model": str(model_folder(folder / "model", max_position_embeddings=256)),
        "methods": [{"name": "CE-U", "steps": 1}],
        "targets": {"end": ["own"]},
        "evaluate": {
            "forget_examples": 4,
            "retain_examples": 10,
            "generated_examples": 5,
            "max_new_tokens": 4,
            "utility": True,
        },
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid | changes))
    return folder / "grid.yaml"


def test_model_utility_is_the_harmonic_mean_of_nine_scores_on_evenly_spaced_examples(tmp_path: Path) -> None:
    config, out = grid_in(tmp_path, FILES), tmp_path / "out"
    assert cli.main(["ablate", "--config", str(config), "--output", str(out)]) == 0
    start = json.loads((out / "models" / "m0.json").read_text())["start"]
    splits = {
        "retain": [FILES["retain_perturbed"][index] for index in (0, 4, 8, 12, 16)],  # of 20, by tens, then by fives
        "real_authors": [FILES["real_authors_perturbed"][index] for index in (0, 1, 2, 4, 5)],
        "world_facts": [FILES["world_facts_perturbed"][index] for index in (0, 1, 3, 5, 7)],
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    scored = evaluate(model, tokenizer, splits, EvaluationSettings(batch_size=3, max_new_tokens=4), progress=False)
    nine = []
    for split in UTILITY_SPLITS:
        found = scored.examples[split]
        chances = [math.exp(-row["nll"]) for row in found]
        if split != "retain":  # the answer's share among the options
            wrong = [sum(math.exp(-nll) for nll in row["perturbed_nll"]) for row in found]
            chances = [right / (right + others) for right, others in zip(chances, wrong, strict=True)]
            assert start[f"{split}_probability"] == pytest.approx(fmean(chances), rel=1e-4)
            assert start[f"{split}_n"] == 5
        nine += [fmean(chances), *(fmean(row[name] for row in found) for name in ("rouge_l_recall", "truth_ratio"))]
    assert start["model_utility"] == pytest.approx(harmonic_mean(nine), rel=1e-4)
    with (out / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0.0 <= float(row["model_utility"]) < 1.0
    assert 0.0 < float(row["world_facts_probability"]) < 1.0
    text = (out / "table.md").read_text()
    assert "| model utility | real authors probability |" in text
    assert "harmonic mean of nine scores" in text


def test_it_says_which_files_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lacking = {
        name: found for name, found in FILES.items() if name not in ("world_facts_perturbed", "retain_perturbed")
    }
    config = grid_in(tmp_path, lacking)
    assert cli.main(["ablate", "--config", str(config), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "found no world_facts and no perturbed answers of retain" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("changes", [{"model": {}}, {"data": {"forget": "f.json", "retain": "r.json"}}])
def test_only_tofu_and_a_ready_model_have_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"utility: expected data\.tofu and a ready model"):
        read_grid(grid_in(tmp_path, FILES, **changes))


def test_scores_under_autocast_are_those_of_bfloat16(tmp_path: Path) -> None:
    grid = read_grid(grid_in(tmp_path, FILES))
    cast = replace(grid, evaluate=replace(grid.evaluate, autocast=True))
    splits = make_data(grid.runs()[0].options(), None).read()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    exact, half = (Scorer(of, splits, tokenizer).thoroughly(model) for of in (grid, cast))
    for name in ("forget_nll", "retain_nll", "world_facts_probability"):
        assert half[name] != exact[name]
        assert half[name] == pytest.approx(exact[name], rel=0.02), name  # a few products, each exact to 4e-3
    assert half["examples"]["forget_nll"] != exact["examples"]["forget_nll"]


def test_a_row_can_keep_asked_words(tmp_path: Path) -> None:
    (run,) = read_grid(
        grid_in(tmp_path, FILES, methods=[{"name": "CE-U", "steps": 1, "keep_asked_words": True}])
    ).runs()
    assert run.options().method.keep_asked_words
