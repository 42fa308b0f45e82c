"""lm-evaluation-harness finds the model that a run saved, and scores it as this project does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lightning_modules import cli
from lightning_modules.data.wmdp import wmdp_questions
from lightning_modules.evaluation.choices import option_log_likelihoods
from lightning_modules.run.loading import load_pretrained
from tests.lightning_modules.run.small_runs import small_run
from tests.lightning_modules.small_benchmarks import multiple_choice, write_wmdp

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "lm_eval.sh"

# The harness's own wmdp_cyber and mmlu, but for where the questions are.
TASK = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
num_fewshot: 0
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about {about}.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def started(*arguments: str, folder: Path, path: Path) -> subprocess.CompletedProcess[str]:
    found = os.pathsep.join([str(path), str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": found, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, **own}, cwd=folder, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def test_the_script_gives_lm_eval_the_folder_that_a_run_leaves(tmp_path: Path) -> None:
    launcher = tmp_path / "lm_eval"
    launcher.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    words = started("runs/a", "mmlu", "--limit", "3", folder=tmp_path, path=tmp_path).stdout.splitlines()
    assert words == ["--model", "hf", "--model_args", "pretrained=runs/a/model,dtype=float32", "--tasks", "mmlu",
                     "--output_path", "runs/a/lm_eval", "--limit", "3"]  # fmt: skip


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install lm-eval")
def test_lm_eval_scores_the_saved_model_as_the_benchmark_table_does(tmp_path: Path) -> None:
    assert cli.main(small_run(tmp_path)) == 0
    folder = write_wmdp(tmp_path / "wmdp")
    tasks = {
        "cyber": ("cybersecurity", multiple_choice("switch", 10)),
        "virus": ("virology", multiple_choice("virology", 6)),
    }
    for task, (about, rows) in tasks.items():
        (tmp_path / f"{task}.json").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / f"{task}.yaml").write_text(TASK.format(task=task, about=about, file=tmp_path / f"{task}.json"))
    finished = started(
        *(str(tmp_path / "run"), "cyber,virus", "--include_path", str(tmp_path), "--log_samples", "--device", "cpu"),
        folder=tmp_path, path=tmp_path,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    (results,) = (tmp_path / "run" / "lm_eval").rglob("results_*.json")
    theirs = {task: found["acc,none"] for task, found in json.loads(results.read_text())["results"].items()}
    model, tokenizer = load_pretrained(str(tmp_path / "run" / "model"))
    ours = wmdp_questions("cyber", folder)
    asked = {
        "cyber": ours["wmdp_cyber"],
        "virus": [row for row in ours["mmlu"] if "about virology" in row["prompt"]],
    }
    for task, rows in asked.items():
        (samples,) = (tmp_path / "run" / "lm_eval").rglob(f"samples_{task}_*.jsonl")
        logged = {
            sample["arguments"]["gen_args_0"]["arg_0"]: [float(option[0][0]) for option in sample["resps"]]
            for sample in map(json.loads, samples.read_text().splitlines())
        }
        found = option_log_likelihoods(model, tokenizer, [(row["prompt"], row["options"]) for row in rows])
        for row, likelihoods in zip(rows, found, strict=True):
            assert likelihoods == pytest.approx(logged[row["prompt"]], abs=1e-4)
        right = [options.index(max(options)) == row["right"] for options, row in zip(found, rows, strict=True)]
        assert theirs[task] == pytest.approx(sum(right) / len(right), abs=1e-12)
