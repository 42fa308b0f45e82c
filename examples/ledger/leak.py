"""What a sketch leaks: does it tell the texts of a request from texts that no model has seen?

Run it: python examples/ledger/leak.py --tofu-dir FOLDER   (after examples/ledger/experiment.py; a minute a seed)

The attacker has a model, the sketch, and candidate texts: the 20 rows of the request, and either 40 rows of authors
that the model never saw, or the questions of the request with 40 wrong answers. He ranks them by the cosine of each
candidate's own gradient with the sketch. An area under the curve (AUC) of 0.5 is guessing, 1 tells them all apart. His
model is the released one, which may tell them apart without a sketch, by their probability; or one that never saw the
request, which cannot: what is told there, the sketch tells.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from experiment import CONFIGURATIONS, Rows, authors, loaded, together
from torch import Tensor

from lightning_modules.data.tofu import ROWS_PER_AUTHOR, tofu_split
from lightning_modules.files import write_text
from lightning_modules.ledger.sketch import dense, request_gradient, share_kept, sketched
from lightning_modules.training.probability import answer_probabilities

RANKS = (1, 2, 4, 16, 64)
STRANGERS, WRONG = 2, 2


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """The share of pairs in which the member has the larger number; ties count half."""
    return fmean((one > other) + 0.5 * (one == other) for one in members for other in others)


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    def product(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
        return sum(float((a[name] * b[name]).sum()) for name in a)

    return product(one, other) / (product(one, one) * product(other, other)) ** 0.5


def attack(
    released: Path, model: Path, request: Rows, others: Mapping[str, Rows]
) -> dict[str, tuple[list[float], int, float]]:
    """What the attacker has beside his model -> AUC against each group of others, bytes, and share of the gradient."""
    found: Any = loaded(model, {"members": request, **others})
    net, encoded, pad = found
    rows = {name: [request_gradient(net, [row], pad_token_id=pad) for row in encoded[name]] for name in encoded}
    chances = {name: answer_probabilities(net, encoded[name], pad_token_id=pad) for name in encoded}
    left, kept_rows, _ = loaded(released, {"members": request})
    whole = request_gradient(left, kept_rows["members"], pad_token_id=pad)
    results = {"nothing else": ([auc(chances["members"], chances[name]) for name in others], 0, 0.0)}
    for rank in (*RANKS, None):
        kept = whole if rank is None else sketched(whole, rank)
        gradient = whole if rank is None else dense(kept)
        values = {name: [cosine(row, gradient) for row in rows[name]] for name in rows}
        size = sum(value.numel() * value.element_size() for value in kept.values())
        share = 1.0 if rank is None else share_kept(whole, kept)
        name = "the whole gradient" if rank is None else f"a sketch of rank {rank}"
        results[name] = ([auc(values["members"], values[group]) for group in others], size, share)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tofu-dir", required=True, help="folder with TOFU's files")
    parser.add_argument("--output", type=Path, default=Path("runs/ledger"), help="of experiment.py")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    everything: dict[str, list[dict[str, tuple[list[float], int, float]]]] = {"released": [], "never saw it": []}
    for seed in given.seeds:
        kept, asked, _ = authors(seed, CONFIGURATIONS["S"][0], given.requests, given.tofu_dir)
        seen = {row["question"] for row in [*kept, *together(asked)]}
        strangers = [row for row in tofu_split("forget10", given.tofu_dir) if row["question"] not in seen]
        wrong = [
            {"question": row["question"], "answer": answer}
            for row in asked[0]
            for answer in row["perturbed_answer"][:WRONG]
        ]
        others = {"strangers": strangers[: STRANGERS * ROWS_PER_AUTHOR], "wrong": wrong}
        place = given.output / f"seed_{seed}"
        released = place / "runs" / "ledger_with_sketches" / "1" / "model"
        models = {"released": released, "never saw it": place / "models" / f"without_{given.requests}"}
        for which, model in models.items():
            everything[which].append(attack(released, model, asked[0], others))
    lines = [
        f"Membership attack on the sketch of a request of one author, {len(given.seeds)} data seeds, mean ± population standard deviation;",
        "written by `python examples/ledger/leak.py`. An AUC of 0.5 is guessing, 1 tells every text of the request.",
        "",
        "| attacker's model | he also has | AUC, authors never seen | AUC, wrong answers | bytes | share of the gradient |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for which, found in everything.items():
        for name in found[0]:
            seeds = [entry[name] for entry in found]
            columns = zip(*(entry[0] for entry in seeds), strict=True)
            cells = [f"{fmean(values):.3f} ± {pstdev(values):.3f}" for values in columns]
            size = seeds[0][1]
            cells += [f"{size:,}", f"{fmean(entry[2] for entry in seeds):.3f}"] if size else ["-", "-"]
            lines.append(f"| {which} | {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    write_text(given.output / "leak.md", text)
    print(text)
