"""How benchmarks say what they found: under what conditions, and tables in Markdown."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def conditions(*packages: str) -> str:
    """The command, the date, the versions, the machine, its threads and its load, in a line; call it before measuring.

    Args:
        packages: Whose versions are said, besides torch's.
    """
    command = shlex.join(["python", "-m", f"tests.benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    said = [f"torch {torch.__version__}", *map(installed, packages), machine()]
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores used"
    return f"`{command}`; {time.strftime('%Y-%m-%d')}, {', '.join(said)}, {threads}, load {os.getloadavg()[0]:.1f}."


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def machine() -> str:
    """The processor's name and what PyTorch makes of it, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    about = Path("/proc/cpuinfo")
    if about.exists():
        lines = about.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    said = f"{name} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{said}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else said


def device(name: str) -> str:
    """For argparse: a device that is there."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("expected a CUDA device, found none; measure it where there is one")
    return name


def lines(rows: Sequence[Sequence[str]]) -> str:
    """A table of given rows, of which the first is its head; numbers stand to the right."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rest))


def table(corner: str, columns: Mapping[str, Mapping[str, str]]) -> str:
    """A table of cases side by side.

    Args:
        corner: What its numbers are. What begins with "times" is drawn by `picture.draw`.
        columns: Case -> what was measured -> what was found; what a case has not is a dash.

    Example:
        >>> print(table("times the limit", {"short": {"ours": "1.20"}, "long": {"ours": "1.10", "theirs": "3.40"}}))
        | times the limit | short | long |
        | --- | ---: | ---: |
        | ours | 1.20 | 1.10 |
        | theirs | - | 3.40 |
    """
    names = dict.fromkeys(name for found in columns.values() for name in found)
    return lines(
        [[corner, *columns], *([name, *(found.get(name, "-") for found in columns.values())] for name in names)]
    )


def turned(columns: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The same with cases as rows."""
    names = dict.fromkeys(name for found in columns.values() for name in found)
    return {name: {case: found[name] for case, found in columns.items() if name in found} for name in names}


def progress(said: str) -> None:
    """On the error stream, where what is measured next does not get into the tables."""
    print(f"{said} ...", file=sys.stderr, flush=True)
