"""What starting costs: imports, an answer about options, and the way from Enter to the first training step.

Run it: python tests/benchmarks/startup.py [--rounds 5] [--first-step] [--model FOLDER]

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
from importlib.metadata import version
from pathlib import Path
from statistics import median

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
    wall = {name: median(one for one, _ in times) for name, times in found.items()}
    used = {name: median(one for _, one in times) for name, times in found.items()}
    print("| | wall | times `import torch` | processor | times `import torch` |\n|---|---:|---:|---:|---:|")
    for name in ROWS:
        shares = wall[name] / wall[BASE], used[name] / used[BASE]
        print(f"| {name} | {wall[name]:.2f} s | {shares[0]:.2f} | {used[name]:.2f} s | {shares[1]:.2f} |")


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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--model")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}; " + ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning")))
    if not options.first_step:
        imports(options.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        times = [first_step(options.model, Path(folder)) for _ in range(options.rounds + 1)][1:]
    print(f"first step after {median(t for t, _ in times):.1f} s, {median(t for _, t in times):.1f} s of the processor")


if __name__ == "__main__":
    main()
