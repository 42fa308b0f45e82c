"""The precision that nobody named: bf16-mixed where the machine computes it natively, one answer for all commands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_modules.run.options import FinetuneOptions, UnlearnOptions


@pytest.mark.parametrize(
    ("cuda", "capabilities", "expected"),
    [
        (True, {}, "bf16-mixed"),
        (False, {"avx512_bf16": True}, "bf16-mixed"),
        (False, {"amx_bf16": True, "avx512_bf16": False}, "bf16-mixed"),
        (False, {"bf16": True}, "bf16-mixed"),
        (False, {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False, "bf16": False}, "32-true"),
        (False, {}, "32-true"),
    ],
)
def test_the_default_is_bfloat16_where_the_machine_computes_it_but_not_from_scratch(
    cuda: bool, capabilities: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for options in (
        UnlearnOptions.of(model="some/model"),
        UnlearnOptions.of(model="some/model", method="uld"),
        FinetuneOptions.of(model="some/model"),
    ):
        assert options.resolved().training.precision == expected
        assert options.but(precision="16-mixed").resolved().training.precision == "16-mixed"
    assert UnlearnOptions().resolved().training.precision == "32-true"


def test_on_an_apple_gpu_it_stays_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning trains there, whatever its CPU can do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert UnlearnOptions.of(model="some/model").resolved().training.precision == "32-true"
