"""Kernels: in C++, built once by the machine's compiler, kept in a cache, loaded by ctypes; and Triton's, tried out.

A source in C++ knows neither Python nor PyTorch, so that it builds in seconds and serves every version of both.
lanes.h is what the sources share.
"""

from torch import Tensor
from torch.nn import Parameter

from gradsurgery.native.backend import Backend, Chosen, Needs
from gradsurgery.native.building import Library, Unavailable, build
from gradsurgery.native.device import Triton, tried, triton_kernels

__all__ = [
    "PLAIN",
    "Backend",
    "Chosen",
    "Library",
    "Needs",
    "Triton",
    "Unavailable",
    "build",
    "tried",
    "triton_kernels",
]

PLAIN = (Tensor, Parameter)
"""Types of tensors that kernels take: not a subclass, which may hold its numbers elsewhere."""
