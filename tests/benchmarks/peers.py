"""A surgery pass beside the ways that others do it, on the same ready gradients, in one process.

Run it: python -m tests.benchmarks.peers [--threads 1] [--repeats 7] [--small] [--quick] [--list "bf16 list"] [--default-malloc]

Everybody is given two rows as lists of tensors and leaves the update in a list of tensors: what remains when backward
passes are done. The rows conflict, so that everybody has all of the work to do. The others are

- flatten and project: concatenate both rows, project one vector off the other, cut it up again;
- PCGrad as its PyTorch port does it: flatten every objective's gradients, project each off the others in random order, add,
  and put views of the sum into `.grad`;
- a stacked Jacobian: one [2, N] matrix, its Gram matrix by `mm`, the rule, the combination by `mv`;
- TorchJD's `jac_to_grad`, whose Jacobians are ready (its own `backward` leaves them so): a favour to it. It is no dependency of
  ours: without `pip install "torchjd[quadprog_projector]"` its rows are left out.

With one thread times are the process's own CPU seconds, which neighbours on a shared machine change little; with more they are
wall time.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import gradsurgery as gs
from tests.benchmarks import limit
from tests.benchmarks.telling import conditions, progress, table

Rows = list[list[Tensor]]


def ours(rows: Rows, rule: Callable[[Tensor], Tensor], choice: Any) -> list[Tensor | None]:
    """Gram matrix, rule, and the combination in the first row's place."""
    with gs.gram.backend(choice):
        coefficients = rule(gs.gram.gram(rows))
        return gs.gram.combine_(rows, coefficients)


def cut_up(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    return [part.view_as(one) for part, one in zip(flat.split([t.numel() for t in like]), like, strict=True)]


def flatten_and_project(rows: Rows) -> list[Tensor]:
    forget, retain = (torch.cat([tensor.reshape(-1) for tensor in row]) for row in rows)
    product = torch.dot(forget, retain)
    if product < 0:
        forget = forget - product / torch.dot(retain, retain) * retain
    return cut_up(forget, rows[0])


def pcgrad(rows: Rows) -> list[Tensor]:
    flat = [torch.cat([tensor.flatten() for tensor in row]) for row in rows]
    projected = [row.clone() for row in flat]
    for mine in projected:
        random.shuffle(flat)
        for other in flat:
            product = torch.dot(mine, other)
            if product < 0:
                mine -= product * other / (other.norm() ** 2)
    return cut_up(torch.stack(projected).sum(0), rows[0])


def stacked(rows: Rows) -> list[Tensor]:
    jacobian = torch.stack([torch.cat([tensor.reshape(-1) for tensor in row]) for row in rows])
    coefficients = gs.rules.pcgrad((jacobian @ jacobian.mT).double())
    return cut_up(jacobian.mT @ coefficients.to(jacobian.dtype), rows[0])


def torchjd_passes(rows: Rows) -> dict[str, Callable[[], object]]:
    """TorchJD's aggregation of Jacobians that stay in `.jac`; nothing where it is not installed."""
    try:
        from torchjd.aggregation import PCGrad, UPGrad
        from torchjd.autojac import jac_to_grad

        conflict_free, projecting = UPGrad(), PCGrad()  # UPGrad asks for packages of its own only here
    except ImportError as error:
        print(f"TorchJD is left out: {error}", file=sys.stderr)
        return {}
    parameters = [torch.empty_like(tensor).requires_grad_() for tensor in rows[0]]
    for parameter, *pair in zip(parameters, *rows, strict=True):
        parameter.jac = torch.stack(pair)

    def once(aggregator: Any, **options: Any) -> None:
        for parameter in parameters:
            parameter.grad = None
        jac_to_grad(parameters, aggregator, retain_jac=True, **options)

    return {
        "TorchJD, PCGrad": partial(once, projecting),
        "TorchJD, UPGrad": partial(once, conflict_free),
        "TorchJD, PCGrad, no concatenation": partial(once, projecting, optimize_gramian_computation=True),
    }


def compare(name: str, repeats: int, small: bool) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Over the limit, over ours, and how far the square of a row's length is off; by contestant."""
    progress(name)
    rows: Rows = [[t for t in row if t is not None] for row in limit.rows_of(name, small=small)]
    for forget, retain in zip(*rows, strict=True):
        forget.sub_(retain, alpha=0.5)
    contestants: dict[str, Callable[[], object]] = {
        "limit": limit.limit_of([list(row) for row in rows]),
        "ours, gru": partial(ours, rows, gs.rules.gru, "compiled"),
        "ours, pcgrad": partial(ours, rows, gs.rules.pcgrad, "compiled"),
        "ours, pcgrad, plain PyTorch": partial(ours, rows, gs.rules.pcgrad, "eager"),
        "flatten and project": partial(flatten_and_project, [[t.clone() for t in row] for row in rows]),
        "PCGrad's code": partial(pcgrad, [[t.clone() for t in row] for row in rows]),
        "stacked Jacobian": partial(stacked, [[t.clone() for t in row] for row in rows]),
        **torchjd_passes([[t.clone() for t in row] for row in rows]),
    }
    for contestant, once in list(contestants.items()):
        try:
            once()
        except TypeError as error:
            print(f"{contestant} is left out for the {name}: {error}", file=sys.stderr)
            del contestants[contestant]
    times = limit.interleaved(contestants, repeats)
    floor = times.pop("limit")
    over = {"the limit": f"{median(floor) * 1e3:.1f} ms"}
    over |= {contestant: limit.ratio(seconds, floor) for contestant, seconds in times.items()}
    against = {contestant: limit.ratio(seconds, times["ours, pcgrad"]) for contestant, seconds in times.items()}
    return over, against, accuracy(limit.rows_of(name, small=small)[1])


def accuracy(row: list[Tensor | None]) -> dict[str, str]:
    """How far the square of a row's length is off, by the arithmetic of each contestant."""
    tensors = [tensor for tensor in row if tensor is not None]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    exact = sum(float(part.double() @ part.double()) for part in flat.split(1 << 20))
    found: dict[str, float] = {"torch.dot of the whole": float(torch.dot(flat, flat))}
    found["mm of the stacked Jacobian"] = float((torch.stack([flat, flat]) @ flat[:, None])[0])
    for choice in ("compiled", "eager"):
        with gs.gram.backend(choice):
            found[f"ours, {choice}"] = float(gs.gram.gram([tensors]))
    return {by: f"{abs(value / exact - 1.0):.1e}" for by, value in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="rounds (7; quick: 2)")
    parser.add_argument("--small", action="store_true", help="a list of 12M numbers instead of 58M")
    parser.add_argument("--quick", action="store_true", help="small lists and few rounds: whether it runs at all")
    parser.add_argument("--list", choices=list(limit.LISTS), action="append")
    parser.add_argument(
        "--default-malloc",
        action="store_true",
        help="give large temporaries back to the system, as glibc does unless told",
    )
    arguments = parser.parse_args()
    if not arguments.default_malloc:
        limit.keep_heap()
    torch.set_num_threads(arguments.threads)
    small, repeats = arguments.small or arguments.quick, arguments.repeats or (2 if arguments.quick else 7)
    print(f"{conditions('torchjd')} Gram matrices: {gs.gram.backend()!r}.")
    lists = arguments.list or (limit.FULL, "bf16 list", "LoRA list")
    found = {name: compare(name, repeats, small) for name in lists}
    print(f"\nThe whole pass from ready gradients, {limit.ROUNDS}; a dash where somebody is not there or refuses.")
    for number, corner in enumerate(("times the limit", "times ours, pcgrad", "error of <r, r>")):
        print(f"\n{table(corner, {name: columns[number] for name, columns in found.items()})}")
