"""What the processes of test_anchor.py run; apart, so that processes can import it."""

from __future__ import annotations

import torch
from torch import nn

import gradsurgery as gs
from tests.tolerances import SAME, close


def halves_count_as_the_whole(rank: int) -> None:
    """Each process watches its half; the whole is watched by both, whose sum is twice as much of the same."""
    torch.manual_seed(0)
    batch = torch.randn(8, 6, dtype=torch.float64)
    found = []
    for rows in (batch[rank::2], batch):
        torch.manual_seed(1)
        layer = nn.Linear(6, 4, dtype=torch.float64)
        anchor = gs.LayerAnchor(layer, 1.0)
        with anchor.watch():
            layer(rows)
        layer.weight.data.add_(torch.randn_like(layer.weight))
        anchor.pull()
        found.append(layer.weight.detach())
    close(found[0], found[1], SAME)
    both = [torch.empty_like(found[0]) for _ in range(2)]
    torch.distributed.all_gather(both, found[0])
    assert torch.equal(both[0], both[1])
