"""For every test: one thread and a fixed seed."""

from __future__ import annotations

import pytest
import torch

# Tensors of a few dozen numbers: with more threads they only wait for each other, many times as long where cores are shared.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
