"""The scripts that start one command on several devices: the torchrun one runs on two processes of this CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules import cli
from lightning_modules.run.options import UnlearnOptions
from tests.lightning_modules.run import sharded_workers

ROOT = Path(__file__).parents[1]
LAUNCHERS = {"torchrun.sh": "torchrun", "slurm.sh": "srun"}


def environment(bin_folder: Path, **own: str) -> dict[str, str]:
    path = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **own}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_script_is_bash_and_its_flags_are_the_commands(name: str, tmp_path: Path) -> None:
    script = ROOT / "examples" / name
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    launcher = tmp_path / LAUNCHERS[name]
    launcher.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    of_slurm = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "MACHINES": "2", "STRATEGY": "fsdp2"}
    finished = subprocess.run(
        ["bash", str(script), "--model", "a/model", "--tofu", "forget10"],
        env=environment(tmp_path, **of_slurm), capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    words = finished.stdout.splitlines()
    parsed = vars(cli._make_parser().parse_args(words[words.index("unlearn") :])["unlearn"])
    options = UnlearnOptions.of(**{option: parsed[option] for option in UnlearnOptions.names()})
    options.check()
    assert (options.training.devices, options.training.num_nodes) == ("2", 2)
    assert options.training.strategy == "fsdp2"
    assert (options.model.model, options.data.tofu) == ("a/model", "forget10")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_torchrun_runs_two_processes_of_a_cpu(tmp_path: Path) -> None:
    arguments = sharded_workers.prepare(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    finished = subprocess.run(
        ["bash", str(ROOT / "examples" / "torchrun.sh"), *arguments, "--epochs=1", "--output", str(tmp_path / "run")],
        env=environment(tmp_path, PORT=port, CUDA_VISIBLE_DEVICES="", XDG_CACHE_HOME=str(tmp_path / "cache")),
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["after"]["forget"]["n"] == 4
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert (tmp_path / "run" / "config.yaml").read_text().count("strategy: ddp") == 1
