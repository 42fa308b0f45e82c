"""Runs of the command in processes that are killed: forked from the test's, at a counted event, or in the middle of a write."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from lightning_modules import cli

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fsync")


@dataclass(frozen=True)
class Kill:
    """When a process dies.

    Attributes:
        event: Its number among the events of the run.
        bytes_left: None dies before the event happens. Otherwise from this event on the process may write so many bytes
            to a file, and dies in the middle of the write that is longer.
    """

    event: int
    bytes_left: int | None = None


def in_a_process(arguments: Sequence[str], log: Path, kill: Kill | None = None) -> tuple[int, list[str]]:
    """Run the command in a forked process.

    Returns:
        The exit status, negative for a signal, and the names of the run's events so far.
    """
    trace = log.with_suffix(".trace")
    child = os.fork()
    if not child:
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            torch.set_num_threads(1)  # the threads of a forked process are not there
            _watch(trace, kill)
            code = cli.main(list(arguments))
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            sys.stderr.flush()
            code = 99
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), trace.read_text().splitlines()


def _watch(trace: Path, kill: Kill | None) -> None:
    """Count what the run does, and die when told."""
    count = 0
    line = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def happened(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open" and not (
            isinstance(values[2], int) and values[2] & WRITES and "/dev/" not in str(values[0])
        ):
            return
        if event not in FILES and event != "forward":
            return
        if kill is not None and count == kill.event:
            if kill.bytes_left is None:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (kill.bytes_left or 1, resource.RLIM_INFINITY))
        count += 1
        if kill is None:
            os.write(line, f"{event}\n".encode())

    forward, fsync = LlamaForCausalLM.forward, os.fsync

    def counted_forward(self: Any, *arguments: Any, **options: Any) -> Any:
        sys.audit("forward")
        return forward(self, *arguments, **options)

    def counted_fsync(file: int) -> None:
        sys.audit("fsync")
        fsync(file)

    LlamaForCausalLM.forward, os.fsync = counted_forward, counted_fsync  # type: ignore[method-assign]
    sys.addaudithook(happened)


def contents(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, but for what is drawn, and how long it took."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == ".lock":
            continue  # of a process that was killed when all was done
        if path.is_dir() or path.suffix in (".png", ".md", ".html"):
            found[name] = path.is_dir() or path.stat().st_size > 0
        else:
            found[name] = path.read_bytes()
    metrics = json.loads(found["metrics.json"])
    metrics.pop("seconds")
    config = [line for line in found["config.yaml"].splitlines() if not line.startswith(b"output")]
    return found | {"metrics.json": metrics, "config.yaml": config}


def broken(folder: Path) -> list[str]:
    """The files of a killed run that are not whole."""
    wrong: list[str] = []
    for path in folder.rglob("*"):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            data = path.read_bytes()
            if path.suffix == ".json":
                json.loads(data)
            elif path.suffix == ".jsonl":
                assert [json.loads(line) for line in data.splitlines()]
            elif path.suffix == ".csv":
                header, *rows = (line.split(b",") for line in data.splitlines())
                assert data.endswith(b"\n")
                assert all(len(row) == len(header) for row in rows)
                steps = [int(row[0]) for row in rows]
                assert steps == sorted(steps)
                if path.name != "g_effect.csv":
                    assert steps == list(range(steps[0], steps[0] + len(rows)))
            elif path.suffix == ".ckpt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".png":
                assert data.startswith(b"\x89PNG")
                assert data.endswith(b"IEND\xaeB`\x82")
            elif path.suffix in (".html", ".yaml") or path.name == "report.md":
                assert data.endswith(b"\n") or b"</html>" in data
        except Exception as error:
            wrong.append(f"{path.name}: {error!r}")
    return wrong
