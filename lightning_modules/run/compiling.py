"""What `--compile` needs of a machine, asked before any long work: PyTorch misses it in the first training step."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys


def check_compiler(device: str) -> None:
    """Refuse `--compile` where `torch.compile` finds nothing that builds its programs.

    It is Inductor's and Triton's own search that is followed here: another one than that for our own kernels
    (`gradsurgery.native`), which take any C++ compiler.

    Args:
        device: The type of the device that trains: a CPU needs a C++ compiler, a GPU Triton and a C compiler.

    Raises:
        ValueError: In one sentence, if it is not there.
    """
    if device == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        fetched = sys.platform == "linux" and os.environ.get("TORCH_INDUCTOR_INSTALL_GXX")  # PyTorch gets one itself
        if not fetched:
            _check("C++", "a CPU", "CXX", usual)
    elif device == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ValueError(
                "--compile: expected Triton, by which PyTorch compiles for a GPU, found none; install it (pip install triton), or leave "
                "--compile out"
            )
        if sys.platform != "win32":  # where Triton brings its own
            _check("C", "a GPU", "CC", "gcc", "clang")


def _check(language: str, device: str, variable: str, *usual: str) -> None:
    chosen = os.environ.get(variable)
    names = usual if chosen is None else (chosen,)
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            f"--compile: expected a {language} compiler, which PyTorch needs to compile for {device}, found no {' or '.join(names)}; "
            f"install one, set {variable} to one that is there, or leave --compile out"
        )
