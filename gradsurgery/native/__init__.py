"""Kernels in C++: built once by the machine's compiler, kept in a cache, loaded by ctypes.

A source knows neither Python nor PyTorch, so that it builds in seconds and serves every version of both. lanes.h is
what the sources share.
"""

from gradsurgery.native.backend import Backend
from gradsurgery.native.building import Unavailable, build

__all__ = ["Backend", "Unavailable", "build"]
