"""How the cost of surgery grows: with parameters, objectives, blocks, protected rows and processes, rule by rule.

Run it: python -m tests.benchmarks.scaling [--quick] [--only parameters] [--parameters 300000000] [--picture scaling.svg]

It prints tables in Markdown; `python -m tests.benchmarks scaling --write` puts them into RESULTS.md, with a picture
beside it. `--quick` measures few small sizes, in half a minute of one core.

Times are medians of interleaved rounds in one process, of CPU time where there is one thread. An exponent b says that
the cost grows as the b-th power: by least squares on the logarithms of each round, the median of the rounds with their
quartiles. "Off by" is the largest factor between a median and the law. Where that is far from 1, the cost is no power:
a fixed part shows at small sizes, say.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import gradsurgery as gs
from lightning_modules.run.memory import free, gigabytes
from tests.benchmarks import growth, limit
from tests.benchmarks.growth import QUICK, Plan
from tests.benchmarks.power_law import Study, draw, table
from tests.benchmarks.processes import import_once, processes
from tests.benchmarks.telling import conditions, progress

STUDIES: dict[str, Callable[[Plan], Study]] = {
    "parameters": growth.parameters,
    "objectives": growth.objectives,
    "blocks": growth.blocks,
    "protected": growth.protected,
    "processes": processes,
    "elementwise": growth.elementwise,
}
"""What has a table and a panel; "rules" has a table only."""

_LEAST = 10**6
_BYTES = 16  # of a number where parameters grow: two rows and two buffers of the limit


def sizes_up_to(most: int) -> tuple[int, ...]:
    """A million numbers and on, in steps of about 3, and the most.

    Raises:
        ValueError: If the most is less than 3 million: an exponent of a narrow range says nothing.

    Example:
        >>> sizes_up_to(20_000_000)
        (1000000, 3000000, 10000000, 20000000)
    """
    if most < 3 * _LEAST:
        raise ValueError(f"--parameters: expected {3 * _LEAST} or more, found {most}; leave it out for what fits")
    steps = (digit * 10**power for power in range(6, 13) for digit in (1, 3))
    return (*(step for step in steps if step < most), most)


def fitting(bytes_free: int) -> int:
    """The most numbers a row, 1 or 3 and noughts, that measuring them takes half of the free memory.

    Raises:
        ValueError: If that is less than 3 million.
    """
    most = bytes_free // 2 // _BYTES
    if most < 3 * _LEAST:
        raise ValueError(
            f"parameters: expected {gigabytes(2 * _BYTES * 3 * _LEAST)} of free memory, found {gigabytes(bytes_free)}; "
            "measure something else by --only"
        )
    return max(digit * 10**power for power in range(6, 13) for digit in (1, 3) if digit * 10**power <= most)


def report(plan: Plan, only: Sequence[str] = ()) -> tuple[str, list[Study]]:
    """Measure, and say it.

    Args:
        plan: The sizes.
        only: Names of `STUDIES`, or "rules"; all if there are none.

    Returns:
        Tables in Markdown, and what can be drawn.
    """
    said = (
        f"{conditions()} Gram matrices: {gs.gram.backend()!r}.\n"
        f"Milliseconds, medians of {plan.repeats} interleaved rounds."
    )
    found: list[Study] = []
    sections: list[str] = []
    for name, study in STUDIES.items():
        if not only or name in only:
            progress(name)
            found.append(study(plan))
            sections.append(f"{found[-1].title}. {found[-1].note}\n\n{table(found[-1])}")
    if not only or "rules" in only:
        progress("rules")
        sections.append(f"Rules alone, on Gram matrices of random rows that conflict.\n\n{growth.all_rules(plan)}")
    return "\n\n".join([said, *sections]), found


def planned(arguments: argparse.Namespace) -> Plan:
    """The sizes that the options ask for.

    Raises:
        ValueError: If they cannot be measured.
    """
    plan = QUICK if arguments.quick else Plan()
    if arguments.repeats is not None:
        if arguments.repeats < 2:
            raise ValueError(f"--repeats: expected 2 or more, for the spread, found {arguments.repeats}")
        plan = replace(plan, repeats=arguments.repeats)
    if arguments.parameters is not None:
        plan = replace(plan, parameters=sizes_up_to(arguments.parameters))
    elif not arguments.quick and (not arguments.only or "parameters" in arguments.only):
        plan = replace(plan, parameters=sizes_up_to(fitting(free()["this machine"])))
    if arguments.processes is not None:
        if arguments.processes < 2:
            raise ValueError(f"--processes: expected 2 or more, found {arguments.processes}; --only leaves them out")
        plan = replace(plan, processes=tuple(range(1, arguments.processes + 1)))
    return plan


def main() -> None:
    """Measure what the options say; print and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few small sizes, in half a minute")
    parser.add_argument("--only", choices=[*STUDIES, "rules"], action="append", help="may be given several times")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="rounds (7; quick: 3)")
    parser.add_argument("--parameters", type=int, help="the most numbers a row (what half of the free memory holds)")
    parser.add_argument("--processes", type=int, help="the most processes (4; quick: 2)")
    parser.add_argument("--picture", type=Path, help="FILE.svg or FILE.png")
    arguments = parser.parse_args()
    try:
        plan = planned(arguments)
    except ValueError as error:
        parser.error(str(error))
    if arguments.picture is not None and arguments.picture.suffix not in (".svg", ".png"):
        parser.error(f"--picture: expected a name that ends in .svg or .png, found {arguments.picture}")
    if arguments.picture is not None and arguments.only == ["rules"]:
        parser.error(
            "--picture: expected something that is drawn, found --only rules, which is a table; add another --only"
        )
    torch.set_num_threads(arguments.threads)
    import_once()
    text, studies = report(plan, arguments.only or ())
    print(text)
    if arguments.picture is not None:
        draw(studies, arguments.picture)


if __name__ == "__main__":
    limit.keep_heap()
    main()
