"""How much memory a model and its training hold, in bytes, and how much there is: known before anything is loaded."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import nn

_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container or a Slurm job


def bytes_of(model: nn.Module, *, trained: bool = False) -> int:
    """Bytes of a model's parameters, each counted once; also of one on the meta device.

    Args:
        model: Any.
        trained: Only those that are trained.
    """
    chosen = (weight for weight in model.parameters() if weight.requires_grad or not trained)
    return sum(weight.numel() * weight.element_size() for weight in chosen)


def gigabytes(count: float) -> str:
    """Bytes for a reader.

    Example:
        >>> gigabytes(538_060_032), gigabytes(2048)
        ('0.54 GB', '2.0 kB')
    """
    unit, size = next(
        ((unit, size) for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if count >= size / 10), ("kB", 1e3)
    )
    return f"{count / size:.{1 if count >= size else 2}f} {unit}"


def free() -> dict[str, int]:
    """Device -> free bytes: of this host, within the limit of its container, and of the GPU where there is one."""
    host = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, KeyError):  # no such limit
        host = min(host, int(_LIMIT.read_text()) - _used())
    found = {"this machine": host}
    if torch.cuda.is_available():
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by torch, for what comes next
        found["the GPU"] = int(torch.cuda.mem_get_info()[0]) + kept
    return found


def _used() -> int:
    """Bytes that the container holds and cannot give back: what it has cached of files it can."""
    statistics = dict(line.split() for line in _LIMIT.with_name("memory.stat").read_text().splitlines())
    return int(_LIMIT.with_name("memory.current").read_text()) - int(statistics["inactive_file"])


def check_fits(name: str, model: nn.Module, *, sharded: bool = False) -> None:
    """Refuse a model whose weights alone are larger than the free memory, before they are loaded.

    Args:
        name: Of the model, for the message.
        model: On the meta device.
        sharded: No GPU has to hold all of it.

    Raises:
        ValueError: If it is larger; the message says by how much.
    """
    needed = bytes_of(model)
    for place, there in free().items():
        if needed > there and not (sharded and place == "the GPU"):
            kind = next(model.parameters()).dtype
            halved = "--dtype bfloat16 takes half of it; or " if kind == torch.float32 else ""
            raise ValueError(
                f"--model, --reference or --teacher: expected weights that fit into the memory of {place}, "
                f"{gigabytes(there)} of which is free, found "
                f"{gigabytes(needed)} in {name!r} ({sum(weight.numel() for weight in model.parameters()):,} numbers in "
                f"{str(kind).removeprefix('torch.')}): {halved}take a smaller model or a larger machine"
            )
