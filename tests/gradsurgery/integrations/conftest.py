"""For tests that start many trainers."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """Trainer and Accelerate collect garbage at every start, and would walk all of torch's and transformers' objects."""
    gc.freeze()
    yield
    gc.unfreeze()
