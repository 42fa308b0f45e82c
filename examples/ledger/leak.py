"""What a sketch leaks: does it tell the texts of a request from texts that no model has seen?

Run it: python examples/ledger/leak.py --tofu-dir FOLDER   (after examples/ledger/experiment.py; a minute a seed)

The attacker has the released model, the sketch, and candidate texts: the 20 rows of the request, and 20 rows of each of
5 authors that the model never saw. He ranks them by the cosine of each candidate's own gradient with the sketch. An
area under the curve (AUC) of 0.5 is guessing, 1 tells them all apart. Beside it stands what the released model leaks
without a sketch: the same candidates ranked by their probability.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from experiment import Rows, authors, loaded, together
from torch import Tensor

from lightning_modules.data.tofu import ROWS_PER_AUTHOR, tofu_split
from lightning_modules.files import write_text
from lightning_modules.ledger.sketch import dense, request_gradient, share_kept, sketched
from lightning_modules.training.probability import answer_probabilities

RANKS = (1, 2, 4, 16, 64)
STRANGERS = 5


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """The share of pairs in which the member has the larger number; ties count half."""
    return fmean((one > other) + 0.5 * (one == other) for one in members for other in others)


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    def product(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
        return sum(float((a[name] * b[name]).sum()) for name in a)

    return product(one, other) / (product(one, one) * product(other, other)) ** 0.5


def attack(model: Path, request: Rows, strangers: Rows) -> dict[str, tuple[float, int, float]]:
    """What is released -> AUC, bytes, and share of the gradient."""
    found: Any = loaded(model, {"members": request, "others": strangers})
    net, encoded, pad = found
    rows = {name: [request_gradient(net, [row], pad_token_id=pad) for row in encoded[name]] for name in encoded}
    chances = {name: answer_probabilities(net, encoded[name], pad_token_id=pad) for name in encoded}
    whole = request_gradient(net, encoded["members"], pad_token_id=pad)
    results = {"the model alone": (auc(chances["members"], chances["others"]), 0, 0.0)}
    for rank in (*RANKS, None):
        kept = whole if rank is None else sketched(whole, rank)
        gradient = whole if rank is None else dense(kept)
        values = {name: [cosine(row, gradient) for row in rows[name]] for name in rows}
        size = sum(value.numel() * value.element_size() for value in kept.values())
        share = 1.0 if rank is None else share_kept(whole, kept)
        name = "and the whole gradient" if rank is None else f"and a sketch of rank {rank}"
        results[name] = (auc(values["members"], values["others"]), size, share)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tofu-dir", required=True, help="folder with TOFU's files")
    parser.add_argument("--output", type=Path, default=Path("runs/ledger"), help="of experiment.py")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    everything: list[dict[str, tuple[float, int, float]]] = []
    for seed in given.seeds:
        kept, asked, _ = authors(seed, given.requests, given.tofu_dir)
        seen = {row["question"] for row in [*kept, *together(asked)]}
        others = [row for row in tofu_split("forget10", given.tofu_dir) if row["question"] not in seen]
        model = given.output / f"seed_{seed}" / "runs" / "ledger_with_sketches" / "1" / "model"
        everything.append(attack(model, asked[0], others[: STRANGERS * ROWS_PER_AUTHOR]))
    lines = [
        f"Membership attack on the sketch of a request of one author, {len(given.seeds)} data seeds, mean ± standard deviation; written",
        "by `python examples/ledger/leak.py`. An AUC of 0.5 is guessing, 1 tells every text of the request.",
        "",
        "| the attacker has | AUC | bytes | share of the gradient's squared length |",
        "|---|---:|---:|---:|",
    ]
    for name in everything[0]:
        values, shares = ([found[name][column] for found in everything] for column in (0, 2))
        size = f"{everything[0][name][1]:,}" if everything[0][name][1] else "-"
        share = f"{fmean(shares):.3f}" if everything[0][name][1] else "-"
        lines.append(f"| {name} | {fmean(values):.3f} ± {pstdev(values):.3f} | {size} | {share} |")
    text = "\n".join(lines) + "\n"
    write_text(given.output / "leak.md", text)
    print(text)
