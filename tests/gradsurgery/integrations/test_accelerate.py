"""What Accelerate's wrapper hides is found again, and its checkpoints keep the averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.integrations.accelerate import unwrap
from tests.problems import TWO, assert_same, classification, mlp, snapshot

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.supports("Accelerate", "`save_state` and `load_state`")


def prepared(model: nn.Module, **options: Any) -> tuple[Any, Any, Any]:
    accelerator = accelerate.Accelerator(cpu=True)
    base = torch.optim.AdamW(model.parameters(), lr=0.02)
    return accelerator, *accelerator.prepare(model, gs.GradientSurgery(base, ema_decay=0.7, **options))


def test_the_wrapper_hides_what_unwrap_finds() -> None:
    surgery = gs.GRU(torch.optim.SGD(mlp().parameters(), lr=0.1))
    wrapped: Any = accelerate.Accelerator(cpu=True).prepare(surgery)
    for name in ("objective", "join", "combine", "record"):
        assert not hasattr(wrapped, name), "then unwrap is not needed any more"
    assert unwrap(wrapped) is surgery
    assert unwrap(surgery) is surgery


def test_a_plain_optimizer_has_nothing_to_unwrap() -> None:
    plain: Any = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD(mlp().parameters(), lr=0.1))
    with pytest.raises(
        TypeError, match=r"found AcceleratedOptimizer; wrap the base optimizer in .* before prepare\(\)"
    ):
        unwrap(plain)


@pytest.mark.parametrize("front_end", ["contexts", "join"])
def test_a_loop_resumed_by_load_state_is_the_uninterrupted_one_bit_for_bit(front_end: str, tmp_path: Path) -> None:
    def train(accelerator: Any, wrapped: nn.Module, optimizer: Any, steps: range) -> None:
        surgery = unwrap(optimizer)
        for step in steps:
            losses = classification()(wrapped, step, 0)
            if front_end == "join":
                accelerator.backward(surgery.join(**losses))
            else:
                for name in TWO:
                    with surgery.objective(name):
                        accelerator.backward(losses[name])
            optimizer.step()
            optimizer.zero_grad()

    model, resumed = mlp(), mlp(seed=1)
    whole = prepared(model)
    train(*whole, range(3))
    whole[0].save_state(str(tmp_path))
    train(*whole, range(3, 6))
    again = prepared(resumed)
    again[0].load_state(str(tmp_path))
    train(*again, range(3, 6))
    assert_same(snapshot(resumed, unwrap(again[2])), snapshot(model, unwrap(whole[2])))
