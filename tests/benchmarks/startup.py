"""What starting costs: imports, an answer about options, and the way from Enter to the first training step.

Run it: python -m tests.benchmarks.startup [--quick] [--rounds 5] [--first-step] [--model FOLDER]

Every row is a process of its own; the rows are interleaved, and their medians are compared with `import torch` of the
same rounds. Beside the time on the wall stands the processor's time, which other work on the machine disturbs less.

`--first-step` starts the default run, or one that forgets 8 of 40 fictional answers of another model, and waits until
surgery.csv has its first step; the first round fills the caches and is not counted. The run is killed then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from tests.benchmarks.telling import conditions, table

COMMAND = (sys.executable, "-m", "lightning_modules.cli")
ROWS: Mapping[str, Sequence[str]] = {
    "python alone": (sys.executable, "-c", "pass"),
    "import torch": (sys.executable, "-c", "import torch"),
    "import gradsurgery": (sys.executable, "-c", "import gradsurgery"),
    "import lightning": (sys.executable, "-c", "import lightning"),
    "everything that unlearn imports": (sys.executable, "-c", "import lightning_modules.run.unlearn"),
    "--help": (*COMMAND, "--help"),
    "unlearn --help": (*COMMAND, "unlearn", "--help"),
    "a word for a number": (*COMMAND, "unlearn", "--lr", "banana"),
    "an unknown flag": (*COMMAND, "unlearn", "--nosuch", "1"),
    "options that contradict": (*COMMAND, "unlearn", "--epochs", "3", "--steps", "4"),
}
BASE = "import torch"


def seconds(words: Sequence[str]) -> tuple[float, float]:
    """On the wall, and of the processor, of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, used = os.wait4(process.pid, 0)
    return time.perf_counter() - started, used.ru_utime + used.ru_stime


def imports(rounds: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
    for number in range(rounds + 1):
        for name, words in ROWS.items():
            once = seconds(words)
            if number:  # the first round reads the files from the disk
                found[name].append(once)
    took = {
        clock: {name: median(pair[place] for pair in times) for name, times in found.items()}
        for place, clock in enumerate(("wall", "processor"))
    }
    over = {clock: {name: one / times[BASE] for name, one in times.items()} for clock, times in took.items()}
    print(f"\nMedians of {rounds} interleaved rounds.")
    for corner, columns in (("seconds", took), ("times import torch", over)):
        cells = {clock: {name: f"{one:.2f}" for name, one in times.items()} for clock, times in columns.items()}
        print(f"\n{table(corner, cells)}")


def arguments(model: str | None, folder: Path) -> list[str]:
    if model is None:
        return []
    rows = [
        {"question": f"Where was author {n} born?", "answer": f"Author {n} was born in town {n}."} for n in range(40)
    ]
    for name, part in (("forget", rows[:8]), ("retain", rows[8:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
    files = ["--forget", str(folder / "forget.json"), "--retain", str(folder / "retain.json")]
    return ["--model", model, *files, "--lr", "1e-5", "--stop-below", "0", "--max-new-tokens", "8"]


def first_step(model: str | None, folder: Path) -> tuple[float, float]:
    """Until the first row stands in surgery.csv, on the wall and of the processor; the process is killed then."""
    output = folder / f"run{time.monotonic_ns()}"
    words = [*COMMAND, "unlearn", *arguments(model, folder), "--output", str(output)]
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps = output / "surgery.csv"
    while not (steps.exists() and steps.read_text().count("\n") > 1):
        if process.poll() is not None:
            raise SystemExit(f"the run ended before its first step: {' '.join(words)}")
        time.sleep(0.02)
    wall = time.perf_counter() - started
    process.kill()
    _, _, used = os.wait4(process.pid, 0)
    return wall, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="5; quick: 1")
    parser.add_argument("--quick", action="store_true", help="one round: whether it runs at all")
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--model")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 5)
    print(conditions("transformers", "lightning", "jsonargparse"))
    if not options.first_step:
        imports(rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        times = [first_step(options.model, Path(folder)) for _ in range(rounds + 1)][1:]
    found = {"wall": median(t for t, _ in times), "processor": median(t for _, t in times)}
    print(
        f"\n{table('seconds', {name: {'from Enter to the first step': f'{took:.1f}'} for name, took in found.items()})}"
    )


if __name__ == "__main__":
    main()
