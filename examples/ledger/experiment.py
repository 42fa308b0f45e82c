"""Six deletion requests one after another, by six methods: does what was forgotten stay forgotten?

Run it: python examples/ledger/experiment.py --tofu-dir FOLDER   (three seeds; 45 minutes of one CPU core)
It goes on where it was interrupted, and writes table.md and requests.png into --output.

The text of TOFU and a small Llama, as in examples/ablation. It learns some authors to keep and one author for each
request; a request's rows are kept until they are asked for.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from lightning_modules.data.files import read_json
from lightning_modules.data.tofu import ROWS_PER_AUTHOR, tofu_examples
from lightning_modules.data.tokenization import encode, padding_id
from lightning_modules.files import replacing, write_picture, write_text
from lightning_modules.folder import CHECKPOINTS, METRICS, SURGERY
from lightning_modules.ledger.criteria import read_criteria
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.quiet import quiet
from lightning_modules.run.settling import ROOM
from lightning_modules.run.unlearn import unlearn
from lightning_modules.training.callbacks import RelearnSettings, relearn_probe
from lightning_modules.training.probability import mean_probabilities
from lightning_modules.training.scratch import ScratchSettings, scratch_model

CONFIGURATIONS = {
    "S": (8, ScratchSettings()),
    "A22": (18, ScratchSettings(hidden_size=256, epochs=22, batch_size=16)),
}
"""Name -> authors to keep, and the model: of 1.7M and 2.6M parameters."""
CRITERIA = Path(__file__).with_name("criteria.yaml")
LIMIT = read_criteria(str(CRITERIA)).limits["forget_probability"]
COMMON = {
    "lr": 3e-4,
    "warmup_steps": 5,
    "epochs": 60,
    "accumulate": 1,
    "batch_size": 8,
    "stop_below": ROOM * LIMIT,
    "score_every": 2,
    "evaluation_examples": 120,
    "max_new_tokens": 1,
    "probes": "none",
    "precision": "32-true",
}
PLAIN = {"recipe": "paper", "rule": "gradient_difference", "rule_options": {"alpha": 0.0}, "ema_decay": None}
RECIPE = {"recipe": "balanced", "retain_weight": 200.0}
LEDGER = {"criteria": str(CRITERIA)}
METHODS = {
    "plain sequential": PLAIN,
    "sequential GRU": RECIPE,
    "protected ledger": RECIPE | LEDGER | {"ledger_keep_text": True},
    "ledger with sketches": RECIPE | LEDGER | {"ledger_sketch": 4},
    "anew from the original": RECIPE,
    "retrained without": {},
}
"""Name -> options of `gradsurgery unlearn`; the last one trains a model that never saw the requests."""


Rows = list[dict[str, Any]]


def authors(seed: int, keep: int, requests: int, tofu_dir: str | None) -> tuple[Rows, list[Rows], list[str]]:
    """The rows to keep, and those of each request, drawn from TOFU by the seed."""
    rows = tofu_examples("forget10", tofu_dir)
    by_author = {
        split: [rows[split][at : at + ROWS_PER_AUTHOR] for at in range(0, len(rows[split]), ROWS_PER_AUTHOR)]
        for split in ("retain", "forget")
    }
    draw = random.Random(seed)
    kept = draw.sample(by_author["retain"], keep)
    texts = [f"Q: {row['question']}\nA: {row['answer']}" for split in ("retain", "forget") for row in rows[split]]
    return [row for author in kept for row in author], draw.sample(by_author["forget"], requests), texts


def together(groups: Sequence[Rows]) -> Rows:
    return list(chain.from_iterable(groups))


def experiment(folder: Path, configuration: str, seed: int, requests: int, tofu_dir: str | None) -> None:
    """All methods and requests of a seed; what is done already is not done again."""
    keep, settings = CONFIGURATIONS[configuration]
    kept, asked, texts = authors(seed, keep, requests, tofu_dir)

    def model_of(rows: Rows, name: str) -> Path:
        place = folder / "models" / name
        if not place.exists():
            model, tokenizer = scratch_model(rows, replace(settings, seed=seed), tokenizer_texts=texts)
            with replacing(place) as temporary:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
        return place

    original = model_of([*kept, *together(asked)], "original")
    start = scores(original, kept, asked)
    write_text(folder / "start.json", json.dumps(start))
    for method, options in METHODS.items():
        for number in counted(method, requests):
            result = folder / "results" / method.replace(" ", "_") / f"{number}.json"
            if result.exists():
                continue
            run = folder / "runs" / method.replace(" ", "_") / str(number)
            started = time.process_time()
            if method == "retrained without":
                model = model_of([*kept, *together(asked[number:])], f"without_{number}")
                steps = None
            else:
                anew = method == "anew from the original"
                before = original if number == 1 or anew else run.parent / str(number - 1) / "model"
                data = {"forget": together(asked[:number]) if anew else asked[number - 1]}
                data["retain"] = [*kept, *together(asked[number:])]
                for name, rows in data.items():
                    write_text(run.parent / f"{name}_{number}.json", json.dumps(rows))
                files = {name: str(run.parent / f"{name}_{number}.json") for name in data}
                ledger = (
                    {"ledger": str(run.parent / "ledger"), "request": f"author {number}"} if "ledger" in method else {}
                )
                forget(run, model=str(before), seed=seed, **files, **COMMON, **options, **ledger)
                model = run / "model"
                record = run / SURGERY  # none where nothing was left to forget
                steps = len(record.read_text().splitlines()) - 1 if record.exists() else 0
            cost = {"steps": steps, "seconds": time.process_time() - started}
            found = scores(model, kept, asked[:number]) | cost
            if number == requests:
                found["relearned"] = relearned(model, asked)
            write_text(result, json.dumps(found))
            print(f"seed {seed}, {method}, request {number}: {shown(found, start)}", flush=True)


def counted(method: str, requests: int) -> range:
    """After which requests a method is looked at: what is retrained after the last one only."""
    return range(requests if method == "retrained without" else 1, requests + 1)


def forget(run: Path, **options: Any) -> None:
    """A run of the command, or the rest of it."""
    if (run / METRICS).exists() and not (run / CHECKPOINTS).exists():
        return
    resume = {"resume": True} if (run / "config.yaml").exists() else {}
    unlearn(UnlearnOptions.of(output=str(run), **options, **resume), stated=options)


def scores(place: Path, kept: Rows, asked: Sequence[Rows]) -> dict[str, Any]:
    """The mean probability of the answers to keep, and of each request's."""
    model, encoded, pad = loaded(place, {"retain": kept, **{str(number): rows for number, rows in enumerate(asked)}})
    found = mean_probabilities(model, encoded, pad_token_id=pad)
    return {"retain": found.pop("retain"), "requests": list(found.values())}


def relearned(place: Path, asked: Sequence[Rows]) -> float:
    """The mean probability of the answers that were not taught again, after a quarter of all was."""
    model, encoded, pad = loaded(place, {"forget": together(asked)})
    probe = relearn_probe(model, encoded["forget"], pad_token_id=pad, settings=RelearnSettings(lr=5e-5))
    return probe["points"][-1]["rest"]


def loaded(place: Path, splits: Mapping[str, Rows]) -> tuple[Any, dict[str, Any], int]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    encoded = {
        name: [encode(tokenizer, row["question"], row["answer"]) for row in rows] for name, rows in splits.items()
    }
    return model, encoded, padding_id(tokenizer)


def shown(found: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    requests = ", ".join(f"{value:.3f}" for value in found["requests"])
    return f"forget {requests}; retain {found['retain'] / start['retain']:.3f} of the start"


def read(folder: Path, seeds: Sequence[int], requests: int, method: str) -> tuple[list[list[Any]], list[Any]]:
    """The results of a method: seed -> request -> what was found."""
    place = method.replace(" ", "_")
    found = [
        [
            read_json(folder / f"seed_{seed}" / "results" / place / f"{number}.json", "a result")
            for number in counted(method, requests)
        ]
        for seed in seeds
    ]
    return found, [read_json(folder / f"seed_{seed}" / "start.json", "the start") for seed in seeds]


def table(folder: Path, seeds: Sequence[int], requests: int) -> str:
    """Markdown: each method after the last request, mean and population standard deviation over the seeds."""
    names = ("requests above their limit", "the highest, at any time", "mean forget probability", "retention")
    names += ("relearned", "steps, first and last request", "CPU seconds, first and last request")
    lines = [
        f"After {requests} requests of one author each; limit {LIMIT:g}, runs end at {ROOM * LIMIT:g}; "
        f"mean ± population standard deviation over data seeds {', '.join(map(str, seeds))}.",
        "",
        f"| method | {' | '.join(names)} |",
        "|---|" + "---:|" * len(names),
    ]
    for method in METHODS:
        found, starts = read(folder, seeds, requests, method)
        columns = []
        for results, start in zip(found, starts, strict=True):
            last, values = results[-1], results[-1]["requests"]
            highest = max(value for result in results for value in result["requests"])
            row = [sum(value > LIMIT for value in values), highest, fmean(values), last["retain"] / start["retain"]]
            ends = [results[at][what] for what in ("steps", "seconds") for at in (0, -1)]
            columns.append([*row, last["relearned"], *ends])
        above, *shares, steps, more_steps, seconds, more_seconds = (
            [value for value in values if value is not None] for values in zip(*columns, strict=True)
        )
        cells = [spread(above, 1), *(spread(values, 3) for values in shares)]
        cells.append(f"{spread(steps, 0)}, {spread(more_steps, 0)}" if steps else "-")
        one = method == "retrained without"
        cells.append(spread(more_seconds, 0) if one else f"{spread(seconds, 0)}, {spread(more_seconds, 0)}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f} ± {pstdev(values):.{digits}f}"


def picture(path: Path, folder: Path, seeds: Sequence[int], requests: int) -> None:
    """Requests from top to bottom, time from left to right, one field for each method; and the retention of all."""
    import numpy as np
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 6.5), layout="constrained")
    *fields, lines = drawn.subplots(2, 3).flat
    for axes, method in zip(fields, (name for name in METHODS if len(counted(name, 2)) == 2), strict=True):
        found, starts = read(folder, seeds, requests, method)
        pairs = list(zip(found, starts, strict=True))
        kept = [fmean(results[at]["retain"] / start["retain"] for results, start in pairs) for at in range(requests)]
        lines.plot(range(1, requests + 1), kept, marker="o", markersize=3, label=method)
        field = np.full((requests, requests), np.nan)
        for column in range(requests):
            for row in range(column + 1):
                field[row, column] = fmean(results[column]["requests"][row] for results in found)
                bold = "bold" if field[row, column] > LIMIT else "normal"
                axes.text(
                    column, row, f"{field[row, column]:.2f}", ha="center", va="center", fontsize=8, fontweight=bold
                )
        axes.imshow(field, cmap="Oranges", vmin=0, vmax=4 * LIMIT, aspect="auto")
        axes.set_title(method, fontsize=10)
        axes.set_xticks(range(requests), range(1, requests + 1))
        axes.set_yticks(range(requests), range(1, requests + 1))
        axes.set(xlabel="after request", ylabel="request")
    lines.set(xlabel="after request", ylabel="share of the start", ylim=(None, 1.02))
    lines.set_title("answers to keep", fontsize=10)
    lines.legend(fontsize=7)
    drawn.suptitle(
        f"Mean probability of each request's answers after each later request (bold: above {LIMIT:g})", fontsize=11
    )
    write_picture(path, drawn, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tofu-dir", help="folder with TOFU's files; from the hub if not given")
    parser.add_argument("--output", type=Path, default=Path("runs/ledger"))
    parser.add_argument("--configuration", choices=CONFIGURATIONS, default="S")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    quiet()
    for seed in given.seeds:
        experiment(given.output / f"seed_{seed}", given.configuration, seed, given.requests, given.tofu_dir)
    written = table(given.output, given.seeds, given.requests)
    write_text(given.output / "table.md", written)
    picture(given.output / "requests.png", given.output, given.seeds, given.requests)
    print(written)
