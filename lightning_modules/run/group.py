"""The process group that a command makes: it is left when all is done."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def leaving_group() -> Generator[None]:
    """Leave the group that was made meanwhile, when all is done; one that existed before stays.

    Lightning leaves a group of gloo to the interpreter's end. Its threads may then still hold tensors of the last
    exchange, and a thread that drops one of them while Python ends is aborted ("terminate called without an active
    exception"), for which torchrun ends the other processes. After an error nothing is left here: another process may
    still wait in the group.
    """
    member = _member()
    yield
    if not member and _member():
        sys.modules["torch.distributed"].destroy_process_group()


def _member() -> bool:
    """Whether this process is in a group; a command that needs no torch does not import it for the answer."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
