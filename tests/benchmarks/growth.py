"""What a surgery pass and the rules cost, as each thing grows that they depend on.

A pass is the Gram matrices of ready rows, the rule, and the combination in the first row's place. Its rule is `gru`, whose
answer is thrown away: the combination has coefficients that hardly change the rows, so that every pass has the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

import gradsurgery as gs
from tests.benchmarks import limit, telling
from tests.benchmarks.power_law import Series, Study, fit, milliseconds

Rows = Sequence[Sequence[Tensor]]
Work = Callable[[], object]

TENSORS = 75
"""Of a list, as a Llama of 8 layers has; more where there are more blocks."""


@dataclass(frozen=True)
class Plan:
    """Sizes that are measured, each in growing order.

    Attributes:
        repeats: Rounds, besides the first, which is not counted.
        parameters: Numbers of a row.
        objectives: K.
        blocks: S.
        protected: Protected rows, for rules alone.
        rule_rows: K, for all rules; 8 is one of them.
        rule_blocks: S, for all rules.
        processes: Of a gloo group.
        numbers: Of a row where something else grows.
    """

    repeats: int = 7
    parameters: tuple[int, ...] = (10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8)
    objectives: tuple[int, ...] = (2, 3, 4, 6, 8)
    blocks: tuple[int, ...] = (1, 3, 10, 30, 100, 300)
    protected: tuple[int, ...] = (1, 2, 4, 8, 16, 30)
    rule_rows: tuple[int, ...] = (2, 4, 8, 31)
    rule_blocks: tuple[int, ...] = (1, 30, 300)
    processes: tuple[int, ...] = (1, 2, 3, 4)
    numbers: int = 12 * 10**6


QUICK = Plan(
    repeats=3,
    parameters=(10**6, 2 * 10**6, 4 * 10**6),
    objectives=(2, 4, 8),
    blocks=(1, 30, 300),
    protected=(1, 8, 30),
    rule_rows=(2, 8),
    rule_blocks=(1, 30),
    processes=(1, 2),
    numbers=10**6,
)


def backends() -> tuple[str, ...]:
    """Those that there are."""
    return ("compiled", "eager") if gs.gram.backend().name == "compiled" else ("eager",)


def cut(flat: Tensor, numbers: int, tensors: int) -> list[Tensor]:
    """The first numbers of a flat tensor as so many tensors, which are views."""
    return list(flat[:numbers].tensor_split(tensors))


def one_pass(rows: Rows, blocks: Sequence[int] | None, choice: Any) -> Work:
    """A surgery pass over rows, as the module says."""
    number = 1 if blocks is None else max(blocks) + 1
    coefficients = torch.full((number, len(rows)), 1e-9, dtype=torch.float64)
    coefficients[:, 0] = 1.0

    def once() -> None:
        with gs.gram.backend(choice):
            gs.rules.gru(gs.gram.block_gram(rows, blocks=blocks, num_blocks=number))
            gs.gram.combine_blocks_(rows, coefficients, blocks=blocks)

    return once


def measured(lines: Mapping[str, Mapping[int, Work]], repeats: int) -> list[Series]:
    """Line -> size -> work, all of it interleaved, as series."""
    works = {f"{line} at {size}": work for line, sizes in lines.items() for size, work in sizes.items()}
    times = limit.interleaved(works, repeats)
    return [Series(line, {size: times[f"{line} at {size}"] for size in sizes}) for line, sizes in lines.items()]


def parameters(plan: Plan) -> Study:
    """Rows of more and more numbers, beside the memory's bandwidth."""
    largest = plan.parameters[-1]
    (first,), (second,) = limit.filled([(largest,)], 2)
    buffers = torch.zeros(2, largest)
    lines: dict[str, dict[int, Work]] = {
        "the limit": {size: limit.pass_over(*buffers[:, :size]) for size in plan.parameters}
    }
    for choice in backends():
        lines[choice] = {
            size: one_pass([cut(flat, size, TENSORS) for flat in (first, second)], None, choice)
            for size in plan.parameters
        }
    note = f"Two float32 rows of {TENSORS} tensors; in brackets over the limit."
    return Study("Parameters", "numbers a row", measured(lines, plan.repeats), note, floor="the limit")


def objectives(plan: Plan) -> Study:
    """More and more rows."""
    flats = [flat for (flat,) in limit.filled([(plan.numbers,)], plan.objectives[-1])]
    rows = [cut(flat, plan.numbers, TENSORS) for flat in flats]
    lines = {choice: {size: one_pass(rows[:size], None, choice) for size in plan.objectives} for choice in backends()}
    note = f"Rows of {plan.numbers / 1e6:g}M float32 numbers in {TENSORS} tensors."
    return Study("Objectives", "objectives", measured(lines, plan.repeats), note)


def blocks(plan: Plan) -> Study:
    """The same numbers in more and more blocks."""
    tensors = plan.blocks[-1]
    rows = [cut(flat, plan.numbers, tensors) for (flat,) in limit.filled([(plan.numbers,)], 2)]
    lines = {
        choice: {
            size: one_pass(rows, [tensor * size // tensors for tensor in range(tensors)], choice)
            for size in plan.blocks
        }
        for choice in backends()
    }
    note = f"Two rows of {plan.numbers / 1e6:g}M float32 numbers in {tensors} tensors."
    return Study("Blocks", "blocks", measured(lines, plan.repeats), note)


def grams(number: int, rows: int, rank: int | None = None) -> Tensor:
    """Gram matrices ``[S, K, K]`` of random rows, whose first conflicts with the mean of the others.

    Args:
        number: S.
        rows: K.
        rank: Of the protected rows, if it is to be less than their number.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    dimension = 2 * rows + 16
    protected = random(number, rows - 1, rank or dimension)
    if rank is not None:
        protected @= random(number, rank, dimension)
    forget = random(number, 1, dimension) - protected.sum(1, keepdim=True) / max(1, rows - 1) ** 0.5
    every = torch.cat([forget, protected], 1)
    return every @ every.mT


def protected(plan: Plan) -> Study:
    """Rules alone, with more and more protected rows."""
    most = plan.rule_blocks[-1]
    lines: dict[str, dict[int, Work]] = {
        f"gru, {number} blocks": {n: partial(gs.rules.gru, grams(number, n + 1)) for n in plan.protected}
        for number in (1, most)
    }
    lines[f"gru, {most} blocks, two thirds of the rank"] = {
        n: partial(gs.rules.gru, grams(most, n + 1, -(-2 * n // 3))) for n in plan.protected
    }
    for name in ("pcgrad", "upgrad"):
        lines[f"{name}, 1 blocks"] = {n: partial(gs.rules.RULES[name], grams(1, n + 1)) for n in plan.protected}
    lines = {line.replace(" 1 blocks", " 1 block"): sizes for line, sizes in lines.items()}
    note = "Gram matrices of random rows that conflict; rules alone."
    return Study("Protected rows", "protected rows", measured(lines, plan.repeats), note)


OPTIONS: Mapping[str, Mapping[str, float]] = {
    "hamu": {"gain": 0.1, "radius": 1.0},
    "hamu_u": {"gain": 0.1, "radius": 1.0},
    "cglearn": {"tau": 0.25},
}
"""Of the rules that need some."""


def all_rules(plan: Plan) -> str:
    """Every rule that sees Gram matrices against K and S, in Markdown; a dash where a rule takes no so many rows."""
    sizes = list(product(plan.rule_rows, plan.rule_blocks))
    matrices = {(rows, number): grams(number, rows) for rows, number in sizes}
    works: dict[str, Work] = {}
    for name, rule in gs.rules.RULES.items():
        for rows, number in sizes:
            work = partial(rule, matrices[rows, number], **OPTIONS.get(name, {}))
            if _takes(partial(rule, matrices[rows, plan.rule_blocks[0]], **OPTIONS.get(name, {}))):
                works[f"{name} {rows} {number}"] = work
    times = limit.interleaved(works, plan.repeats)
    most_blocks, most_rows = plan.rule_blocks[-1], 8  # as many as every rule takes
    numbers = " / ".join(map(str, plan.rule_blocks))
    heads = [
        f"milliseconds at {numbers} blocks",
        *(f"{rows} rows" for rows in plan.rule_rows),
        f"exponent in the rows, {most_blocks} blocks",
        f"in the blocks, {most_rows} rows",
    ]
    lines = [heads]
    for name in gs.rules.RULES:
        line = [f"`{name}`"]
        for rows in plan.rule_rows:
            found = [times.get(f"{name} {rows} {number}") for number in plan.rule_blocks]
            line.append(" / ".join("-" if each is None else milliseconds(median(each)) for each in found))
        of_rows = {n: times[key] for n in plan.rule_rows if (key := f"{name} {n} {most_blocks}") in times}
        of_blocks = {n: times[f"{name} {most_rows} {n}"] for n in plan.rule_blocks}
        lines.append([*line, str(fit(Series(name, of_rows))), str(fit(Series(name, of_blocks)))])
    return telling.lines(lines)


def _takes(work: Work) -> bool:
    try:
        work()
    except ValueError:
        return False
    return True


def elementwise(plan: Plan) -> Study:
    """Every rule that looks at single coordinates."""
    flats = [flat for (flat,) in limit.filled([(plan.numbers,)], plan.objectives[-1])]
    rows = [cut(flat, plan.numbers, TENSORS) for flat in flats]
    sizes = plan.objectives[::2]
    lines: dict[str, dict[int, Work]] = {
        name: {size: partial(rule, rows[:size], **OPTIONS.get(name, {})) for size in sizes}
        for name, rule in gs.rules.elementwise.ELEMENTWISE.items()
    }
    note = f"On rows of {plan.numbers / 1e6:g}M float32 numbers, of which they make a new row."
    return Study("Elementwise rules", "objectives", measured(lines, plan.repeats), note)
