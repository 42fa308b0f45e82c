"""Kernels in Triton: whether they run in this process, and compute what is right."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch

from gradsurgery.native.building import Unavailable


class Triton(NamedTuple):
    """Kernels in Triton.

    Attributes:
        kernels: Their module.
        about: What runs, in words.
        device: The type of device whose tensors they read: "cuda", or "cpu" in Triton's interpreter.
    """

    kernels: Any
    about: str
    device: str


def triton_kernels(module: str) -> Triton:
    """The kernels of a module, which says whether they are ``INTERPRETED``.

    Raises:
        Unavailable: If Triton or a device is not there.
    """
    nowhere = Unavailable("there is no CUDA device, and Triton was not imported under TRITON_INTERPRET=1")
    there = torch.cuda.is_available()
    if not there and os.environ.get("TRITON_INTERPRET") != "1":
        raise nowhere  # before anybody waits for an import
    try:
        kernels: Any = import_module(module)
        version = import_module("triton").__version__
    except ImportError as error:
        raise Unavailable(f"Triton cannot be imported ({error})") from error
    if not (there or kernels.INTERPRETED):
        raise nowhere
    if kernels.INTERPRETED:
        return Triton(kernels, f"Triton {version} in its interpreter", "cpu")
    return Triton(kernels, f"Triton {version}", "cuda")


def tried(right: Callable[[], bool]) -> None:
    """Compute with kernels what is known.

    Args:
        right: Whether it is what comes out.

    Raises:
        Unavailable: If the kernels fail, or compute something else.
    """
    try:
        found = right()
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        raise Unavailable(f"the kernels cannot run ({type(error).__name__}: {str(error).strip()})") from error
    if not found:
        raise Unavailable("the kernels compute wrong numbers")
