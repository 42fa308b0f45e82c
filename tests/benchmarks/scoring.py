"""What scoring costs against another version of this code: the same examples, the same numbers, seconds of one core.

Run it: git worktree add ../before 12447b0 && python -m tests.benchmarks.scoring --before ../before --model FOLDER
        [--tofu-dir ../shared/tofu] [--questions 12] [--rounds 1] [--quick]

As many questions are taken from TOFU's forget set as from its retain set, 2 + 10 authors. Each version runs
in processes of its own, in turn and with one thread; seconds are the processor's, because a machine that does other work
too says little by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("likelihoods", "likelihoods and answers")
NUMBERS = ("nll", "probability", "truth_ratio", "rouge_l_recall")


def once(model_folder: str, tofu: str, questions: int) -> dict[str, Any]:
    """Scores the examples by the version that Python finds; runs in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_modules.data.examples import evenly_spaced
    from lightning_modules.data.tofu import tofu_examples
    from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = tofu_examples("forget10", tofu, 12, 2)
    splits = {split: evenly_spaced(rows[split], questions) for split in ("forget", "retain")}
    found: dict[str, Any] = {}
    for kind in KINDS:
        started = time.process_time()
        scores = evaluate(model, tokenizer, splits, EvaluationSettings(generate=kind != KINDS[0]), progress=False)
        found[kind] = time.process_time() - started
        found["examples"] = [row for rows in scores.examples.values() for row in rows]
    return found


def in_process(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", "--tofu-dir", arguments.tofu_dir]
    command += ["--questions", str(arguments.questions), "--model", arguments.model]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--tofu-dir", default="../shared/tofu", help="TOFU's files")
    parser.add_argument("--questions", type=int, default=12, help="of each split")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one question of each: whether it runs at all")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(once(arguments.model, arguments.tofu_dir, arguments.questions)))
        return
    import torch

    from tests.benchmarks.telling import conditions, progress, table  # not at the top: another version may have none

    if arguments.quick:
        arguments.questions = 1
    for option, folder in (
        ("--model", arguments.model),
        ("--tofu-dir", arguments.tofu_dir),
        ("--before", arguments.before),
    ):
        if folder is not None and not Path(folder).is_dir():
            parser.error(f"{option}: expected a folder, found none at {folder}; say where it is")
    torch.set_num_threads(1)
    print(conditions("transformers"))
    versions = {"before": arguments.before, "now": ROOT} if arguments.before else {"now": ROOT}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in versions}
    for _ in range(arguments.rounds):
        for name, root in versions.items():
            progress(name)
            runs[name].append(in_process(root.resolve(), arguments))
    seconds = {name: {kind: median(run[kind] for run in found) for kind in KINDS} for name, found in runs.items()}
    columns = {name: {kind: f"{took:.1f}" for kind, took in found.items()} for name, found in seconds.items()}
    print(f"\n2 x {arguments.questions} questions, medians of {arguments.rounds} rounds.\n")
    print(table("seconds of one core", columns))
    if arguments.before:
        gains = {kind: f"{seconds['before'][kind] / seconds['now'][kind]:.2f}" for kind in KINDS}
        print(f"\n{table('seconds before / now', {'ratio': gains})}\n")
        pairs = list(zip(runs["before"][0]["examples"], runs["now"][0]["examples"], strict=True))
        for number in NUMBERS:
            print(f"Largest difference of {number}: {max(abs(a[number] - b[number]) for a, b in pairs):.1e}")
        print(f"Answers that are the same: {sum(a['generation'] == b['generation'] for a, b in pairs)} of {len(pairs)}")


if __name__ == "__main__":
    main()
