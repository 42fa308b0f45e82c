"""Does `gradsurgery ledger plan` tell which requests are cheap to forget together? Steps together against steps apart.

Run it: python examples/ledger/together.py [--tofu-dir FOLDER]   (16 short runs a seed; about 8 minutes of one core)
It goes on where it was interrupted, and writes together.md into --output.

A Llama of 1.7M parameters learns 8 authors to keep and two to forget, each of whom is two requests of 10 questions:
some pairs are about one author, and others are not. Of every pair the estimate from the gradients at the start is
compared with what was saved: 1 - (steps of one run for both) / (steps for the first, and after it for the second).
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from scipy.stats import spearmanr

from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.data.pairs import encoded_rows
from lightning_modules.data.tofu import ROWS_PER_AUTHOR, tofu_examples
from lightning_modules.data.tokenization import padding_id
from lightning_modules.files import replacing, write_text
from lightning_modules.folder import CHECKPOINTS, METRICS, SURGERY
from lightning_modules.ledger.planned import gram_of, plan_of, probabilities
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.quiet import quiet
from lightning_modules.run.unlearn import unlearn
from lightning_modules.training.scratch import ScratchSettings, scratch_model

KEPT, PARTS, LIMIT = 8, 2, 0.05
OPTIONS: dict[str, Any] = {
    "recipe": "balanced",
    "retain_weight": 200.0,
    "lr": 3e-4,
    "warmup_steps": 5,
    "epochs": 60,
    "batch_size": 8,
    "accumulate": 1,
    "stop_below": LIMIT,
    "score_every": 1,
    "max_new_tokens": 1,
    "probes": "none",
    "precision": "32-true",
}


def data(seed: int, requests: int, tofu_dir: str | None) -> tuple[list[Any], dict[str, list[Any]]]:
    """The rows to keep, and those of each request by name, other authors for each seed."""
    people = -(-requests // PARTS)
    if tofu_dir is None:
        rows = fictional_authors((seed + 1) * (KEPT + people))[-(KEPT + people) * ROWS_PER_AUTHOR :]
    else:
        rows = tofu_examples("forget10", tofu_dir)["forget"]
        start = seed * people * ROWS_PER_AUTHOR % len(rows)
        rows = (rows[start:] + rows[:start])[: (KEPT + people) * ROWS_PER_AUTHOR]
    asked, size = rows[: people * ROWS_PER_AUTHOR], ROWS_PER_AUTHOR // PARTS
    names = [f"author {number // PARTS + 1}, part {number % PARTS + 1}" for number in range(requests)]
    return rows[len(asked) :], {name: asked[number * size : (number + 1) * size] for number, name in enumerate(names)}


def steps(run: Path, model: Path, forget: list[Any], retain: list[Any], seed: int) -> int:
    """The optimizer steps of a run of the command, or the rest of it, until the rows are forgotten."""
    if not (run / METRICS).exists() or (run / CHECKPOINTS).exists():
        files = {name: run.parent / f"{run.name}_{name}.json" for name in ("forget", "retain")}
        for name, rows in {"forget": forget, "retain": retain}.items():
            write_text(files[name], json.dumps(rows))
        given: dict[str, Any] = {name: str(path) for name, path in files.items()} | OPTIONS
        given |= {"model": str(model), "output": str(run), "seed": seed}
        resume = {"resume": True} if (run / "config.yaml").exists() else {}
        unlearn(UnlearnOptions.of(**given, **resume), stated=given)
    path = run / SURGERY  # not there where nothing was left to forget
    return len(path.read_text(encoding="utf-8").splitlines()) - 1 if path.exists() else 0


def measured(folder: Path, seed: int, requests: int, tofu_dir: str | None) -> list[dict[str, Any]]:
    """Every pair of a seed: what the plan says of it, and what it took."""
    kept, asked = data(seed, requests, tofu_dir)
    place = folder / "model"
    if not place.exists():
        model, tokenizer = scratch_model(
            [*kept, *(row for rows in asked.values() for row in rows)], ScratchSettings(seed=seed)
        )
        with replacing(place) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    plan = planned(place, asked, kept)
    write_text(folder / "plan.json", json.dumps(plan))
    names = list(asked)
    alone = [steps(folder / f"alone_{i}", place, asked[name], kept, seed) for i, name in enumerate(names)]
    pairs: list[dict[str, Any]] = []
    for i, j in combinations(range(requests), 2):
        one, other = asked[names[i]], asked[names[j]]
        both = steps(folder / f"both_{i}_{j}", place, [*one, *other], kept, seed)
        after = steps(folder / f"after_{i}_{j}", folder / f"alone_{i}" / "model", other, kept, seed)
        apart = alone[i] + after
        pair = {"seed": seed, "one": names[i], "other": names[j], "cosine": plan["cosines"][i][j]}
        pairs.append(pair | {"predicted": plan["saved_by_pair"][i][j], "together": both, "apart": apart})
        pairs[-1]["saved"] = 1 - both / apart if apart else 0.0
        print(pairs[-1], flush=True)
    return pairs


def planned(place: Path, asked: dict[str, list[Any]], kept: list[Any]) -> dict[str, Any]:
    """What `gradsurgery ledger plan` computes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    encoded = {name: encoded_rows(tokenizer, name, rows, None) for name, rows in asked.items()}
    retain = encoded_rows(tokenizer, "retain", kept[:: max(1, len(kept) // 64)], None)
    how = {"pad_token_id": padding_id(tokenizer), "batch_size": 8}
    gram = gram_of(model, encoded, retain, **how)
    return plan_of(gram, asked, kept, probabilities(model, encoded, **how), LIMIT)


def table(pairs: list[dict[str, Any]]) -> str:
    """Markdown: every pair, and the rank correlation of what was predicted with what was saved, seed by seed."""
    ranks: list[float] = []
    for seed in sorted({pair["seed"] for pair in pairs}):
        of_seed = [pair for pair in pairs if pair["seed"] == seed]
        found: Any = spearmanr([pair["predicted"] for pair in of_seed], [pair["saved"] for pair in of_seed])
        ranks.append(float(found.statistic))
    lines = [
        f"Rank correlation (Spearman) of the estimated with the measured saving, by seed: {', '.join(f'{r:.2f}' for r in ranks)}; mean",
        f"{fmean(ranks):.2f} ± {pstdev(ranks):.2f} (population). Written by `python examples/ledger/together.py`.",
        "",
        "| seed | requests | cosine | estimated saving | steps together | apart | saved |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for pair in pairs:
        cells = [
            str(pair["seed"]),
            f"{pair['one']}; {pair['other']}",
            f"{pair['cosine']:.2f}",
            f"{pair['predicted']:.0%}",
        ]
        lines.append(
            f"| {' | '.join([*cells, str(pair['together']), str(pair['apart']), format(pair['saved'], '.0%')])} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tofu-dir", help="folder with TOFU's files; invented authors of our own if not given")
    parser.add_argument("--output", type=Path, default=Path("runs/together"))
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    quiet()
    every = [
        pair
        for seed in given.seeds
        for pair in measured(given.output / f"seed_{seed}", seed, given.requests, given.tofu_dir)
    ]
    written = table(every)
    write_text(given.output / "together.md", written)
    print(written)
