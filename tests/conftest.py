"""For every test: a fixed number of threads, a fixed seed, and the long modules first."""

from __future__ import annotations

import os

import pytest
import torch

# Tensors of a few dozen numbers: with more threads they only wait for each other, many times as long where cores are
# shared. CI runs everything once more with two, because sums in another order are other sums. Processes that a test
# starts have as many, or the same model would give other last digits there.
THREADS = os.environ.get("GRADSURGERY_TEST_THREADS", "1")
os.environ["OMP_NUM_THREADS"] = THREADS
torch.set_num_threads(int(THREADS))

# Files that take long: begun last, one of them would leave the other workers idle.
LONG = (
    "test_commands.py",
    "test_matrix.py",
    "test_ranks.py",
    "test_ablation.py",
    "test_examples.py",
    "test_kernel.py",
    "test_package.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
