"""All benchmarks, or those that are named, one after another, each in a process of its own.

Run it: python -m tests.benchmarks [NAME ...] [--quick] [--write] [--results FILE] [-- OPTION ...]

What they find is printed. `--write` puts it into RESULTS.md as soon as it is there: each has a place of its own between
two comment lines, and what stands outside is written by hand and stays. From all that stands there then, the picture of
ratios is drawn beside it. What fails or lacks something says so in a line of its place, above what was found before, and
the others go on; the exit code is 1 then. `--quick` shows that everything runs; its figures mean nothing, so that they are
written to a copy only. Options behind `--` go to the one benchmark that is named:

    python -m tests.benchmarks scoring --write -- --model FOLDER --before ../before
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.benchmarks import picture, places

ROOT = Path(__file__).resolve().parents[2]
PICTURE = "ratios"
"""The name of its place, of its file, and of nothing but drawing it again."""


class Benchmark(NamedTuple):
    """A command that prints a text with tables.

    Attributes:
        module: Of this package; a process of its own runs it.
        options: What it is given.
        drawing: The name of the picture that it draws beside its tables, by `--picture`; "" for none.
    """

    module: str
    options: tuple[str, ...] = ()
    drawing: str = ""

    def runs_here(self) -> bool:
        """Whether it needs neither a GPU that is not there nor an option of its own."""
        return self.module != "scoring" and (self.options[-2:] != CUDA or torch.cuda.is_available())


CUDA = ("--device", "cuda")
BENCHMARKS = {
    "limit": Benchmark("surgery", ("--only", "limit", "--threads", "1")),
    "peers": Benchmark("peers"),
    "peers-malloc": Benchmark("peers", ("--default-malloc",)),
    "backward": Benchmark("surgery", ("--only", "ratios", "--threads", "1")),
    "memory": Benchmark("surgery", ("--only", "memory", "--threads", "1")),
    "scaling": Benchmark("scaling", drawing="scaling.png"),
    "startup": Benchmark("startup"),
    "first-step": Benchmark("startup", ("--first-step",)),
    "heads": Benchmark("losses"),
    "rows": Benchmark("losses", ("--rows",)),
    "trunk": Benchmark("trunk"),
    "uld": Benchmark("uld"),
    "end-to-end": Benchmark("end_to_end", ("--threads", "1")),
    "scoring": Benchmark("scoring"),
    "limit-cuda": Benchmark("surgery", ("--only", "limit", *CUDA)),
    "backward-cuda": Benchmark("surgery", ("--only", "ratios", *CUDA)),
    "heads-cuda": Benchmark("losses", CUDA),
    "heads-triton-cuda": Benchmark("losses", ("--backend", "triton", *CUDA)),
    "rows-cuda": Benchmark("losses", ("--rows", *CUDA)),
    "trunk-cuda": Benchmark("trunk", CUDA),
    "uld-cuda": Benchmark("uld", CUDA),
}
"""What has a place in RESULTS.md."""


class Found(NamedTuple):
    """What a benchmark left.

    Attributes:
        text: What it printed.
        failure: Why that is not whole; None if it is.
    """

    text: str
    failure: str | None


def run(benchmark: Benchmark, options: Sequence[str]) -> Found:
    """Run a benchmark; what it says about its progress is passed on to the error stream."""
    words = [sys.executable, "-m", f"tests.benchmarks.{benchmark.module}", *benchmark.options, *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    last = "it says nothing"
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        with subprocess.Popen(
            words, env=environment, stdout=printed, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                last = line.strip() or last
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        return Found(text, f"{last} (exit code {process.returncode})")
    return Found(text, None if text.strip() else "it printed nothing")


def planned(words: Sequence[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """What is asked for: the options, the names of the benchmarks, and options of the only one."""
    words, more = list(words), list[str]()
    if "--" in words:
        place = words.index("--")
        words, more = words[:place], words[place + 1 :]
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modules = {benchmark.module for benchmark in BENCHMARKS.values()} - {*BENCHMARKS}
    known = ", ".join(BENCHMARKS)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {known}, {PICTURE}, or of a file of this folder; all if none is given but scoring, which needs --model, and "
        "those of a GPU where there is none",
    )
    parser.add_argument("--quick", action="store_true", help="few small sizes: whether it runs at all")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument(
        "--results", type=Path, default=places.RESULTS, help="a copy of RESULTS.md to write into instead"
    )
    arguments = parser.parse_args(words)
    for name in arguments.names:
        if name not in {*BENCHMARKS, *modules, PICTURE}:
            parser.error(f"expected one of {known}, or the name of a file of theirs, found {name!r}")
    named = {*arguments.names} or {name for name, benchmark in BENCHMARKS.items() if benchmark.runs_here()}
    names = [
        name
        for name, benchmark in BENCHMARKS.items()
        if name in named or benchmark.module in modules.intersection(named)
    ]
    if more and len(names) != 1:
        parser.error(f"--: expected one benchmark that these options go to, found {len(names)}; name one of {known}")
    if arguments.write:
        if arguments.quick and arguments.results.resolve() == places.RESULTS:
            parser.error("--write: expected a whole measurement, found --quick; write it into a copy by --results FILE")
        if not arguments.results.is_file():
            parser.error(f"--results: expected a copy of {places.RESULTS}, found no file {arguments.results}")
        for name in (*names, PICTURE):
            if places.written(arguments.results, name) is None:
                parser.error(
                    f"--write: expected the lines {places.begin(name)} and {places.end(name)} in {arguments.results}, found none; put "
                    "them where the tables belong"
                )
    return arguments, names, more


def main(words: Sequence[str] | None = None) -> int:
    """Run what is named. Returns 0 if all of it was measured, and 1 if something was not."""
    arguments, names, more = planned(sys.argv[1:] if words is None else words)
    failures: dict[str, str] = {}
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
        started = time.monotonic()
        benchmark = BENCHMARKS[name]
        options = [*(["--quick"] if arguments.quick else []), *more]
        if arguments.write and benchmark.drawing:
            options += ["--picture", os.path.relpath(arguments.results.with_name(benchmark.drawing))]
        found = run(benchmark, options)
        text = f"{found.text.strip()}\n\n![{name}]({benchmark.drawing})" if benchmark.drawing else found.text.strip()
        if found.failure is not None:
            failures[name] = found.failure
            if arguments.write:
                places.write_failure(arguments.results, name, found.failure)
        elif arguments.write:
            places.write(arguments.results, name, text)
        print(f"\n## {name}\n\n{found.text.strip()}", flush=True)
        print(f"[{number}/{len(names)}] {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    if arguments.write:
        draw(arguments.results)
    for name, failure in failures.items():
        print(f"{name} was not measured: {failure}", file=sys.stderr)
    return 1 if failures else 0


def draw(results: Path) -> None:
    """The picture of all ratios that stand in a file, beside it."""
    found = [panel for name in BENCHMARKS for panel in picture.panels(name, places.written(results, name) or "")]
    if picture.draw(found, results.with_name(f"{PICTURE}.png")):
        places.write(results, PICTURE, f"![what is written below as a multiple, table by table]({PICTURE}.png)")
