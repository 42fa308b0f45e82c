"""Building a kernel by the machine's C++ compiler, once, and keeping it in a cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

K = TypeVar("K")

_SHARED = Path(__file__).with_name("lanes.h")
_FLAGS = ("-std=c++14", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
# By what PyTorch found that the processor can do. A library built with -march=native could be loaded from a cache that
# machines share, by one that has not all its instructions.
_PROCESSOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}


class Unavailable(Exception):
    """Why there is no kernel, in words."""


class Library(NamedTuple):
    """What was built.

    Attributes:
        path: Of the library.
        about: What it is, in words.
        number: The same for the same machine code on every rank, and not 0.
    """

    path: Path
    about: str
    number: int

    def function(self, name: str, *arguments: Any, returns: Any = None) -> Callable[..., Any]:
        """A function of the library.

        Args:
            name: Its name.
            *arguments: Their types for ctypes.
            returns: The type of what it returns, None for nothing.

        Raises:
            Unavailable: If the library cannot be loaded, or has no such function.
        """
        try:
            found = getattr(ctypes.CDLL(str(self.path)), name)
        except (OSError, AttributeError) as error:
            raise Unavailable(f"the built library cannot be loaded ({error})") from error
        found.argtypes, found.restype = arguments, returns
        return found


def build(source: Path, load: Callable[[Library], K]) -> K:
    """A kernel from the cache, or built anew where there is none or a broken one.

    The cache is `$XDG_CACHE_HOME/gradsurgery/kernel`, or in `~/.cache`; where that cannot be written to, the kernel is
    built for this process alone.

    Args:
        source: The C++ file.
        load: Makes the kernel of the built library. It raises `Unavailable` if that cannot be loaded or computes what
            is wrong.

    Raises:
        Unavailable: If there is no compiler, no place to build in or no source, or the compiler fails, or what it built
            does.
    """
    compiler = _compiler()
    capability = torch.backends.cpu.get_cpu_capability()
    command = [*compiler, *_FLAGS, *_PROCESSOR_FLAGS.get(capability, ())]
    # A compiler of another version, at the same path, makes other machine code.
    version = next(iter(_run([*compiler, "--version"]).strip().splitlines()), "")
    about = f"built by {' '.join(compiler)} ({version}) for {platform.machine()} {capability}"
    try:
        key = repr((command, version, sys.platform, platform.machine())).encode()
        key = hashlib.sha256(key + source.read_bytes() + _SHARED.read_bytes()).hexdigest()
        return _kept([*command, str(source)], key, lambda path: load(Library(path, about, int(key[:8], 16) | 1)))
    except OSError as error:
        raise Unavailable(f"it cannot be built ({error})") from error


def _kept(command: list[str], key: str, load: Callable[[Path], K]) -> K:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gradsurgery" / "kernel"
    library = folder / f"{key[:24]}.so"
    try:
        # As of a user without a home: a library there would be that of whoever owns the working directory.
        if not folder.is_absolute():
            raise OSError(f"{folder} is not an absolute path")
        if library.exists():
            try:
                return load(library)
            except Unavailable:
                pass  # of another libc, say, in a home that machines share
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as building:
            built = _compiled(command, Path(building))
            kernel = load(built)
            os.replace(built, library)  # whole or not at all: other processes build it at the same time
        return kernel
    except OSError:
        with tempfile.TemporaryDirectory() as building:
            return load(_compiled(command, Path(building)))


def _compiler() -> list[str]:
    wanted = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(wanted)
    except ValueError as error:
        raise Unavailable(f"CXX is not a command, {wanted!r} ({error})") from error
    names = [chosen[0]] if chosen else ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise Unavailable(f"no C++ compiler was found ({', '.join(names)}); install one, or set CXX")
    return [found, *chosen[1:]]


def _compiled(command: list[str], folder: Path) -> Path:
    library = folder / "kernel.so"
    _run([*command, "-o", str(library)])
    return library


def _run(command: list[str]) -> str:
    """What the compiler says."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=120).stdout
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines() or ["it says nothing"]
        raise Unavailable(f"{command[0]} failed: {said[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from error
