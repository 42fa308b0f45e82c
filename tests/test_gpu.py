"""On a CUDA device: the same numbers as on the CPU, and no question to the host before the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import gradsurgery as gs
from tests.tolerances import GRAM, LINEAR, STEPPED_FLOAT32, close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIONS: dict[str, dict[str, Any]] = {
    "gru": {},
    "ema": {"ema_decay": 0.7},
    "everything": {"ema_decay": 0.2, "add": {"retain": 0.5}, "max_norm": 0.1, "guard": "update", "scope": "tensor"},
    "metric": {"metric": "optimizer"},
    "elementwise": {"rule": "sago"},
}


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def network(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 32)).to(device=device, dtype=dtype)


def losses(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    parameter = next(model.parameters())
    x = torch.randn(2, 16, 64, generator=generator).to(parameter)
    return {"forget": -model(x[0]).square().mean(), "retain": (model(x[1]) - 0.3).square().mean()}


@pytest.mark.parametrize("name", OPTIONS)
def test_training_on_the_gpu_is_training_on_the_cpu(name: str) -> None:
    models = [network("cpu"), network("cuda")]
    for model in models:
        optimizer = gs.GradientSurgery(torch.optim.AdamW(model.parameters(), lr=1e-3), **OPTIONS[name])
        for step in range(5):
            optimizer.join(**losses(model, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        close(second.detach().cpu(), first.detach(), STEPPED_FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_is_that_of_float64(dtype: torch.dtype) -> None:
    rows = [
        [torch.randn(3_000_017, device="cuda", dtype=dtype), torch.randn(7, device="cuda", dtype=dtype)]
        for _ in range(3)
    ]
    flat = torch.stack([torch.cat([tensor.double() for tensor in row]) for row in rows]).cpu()
    exact = flat @ flat.mT
    lengths = exact.diagonal().sqrt()
    close(gs.gram.gram(rows).cpu(), exact, GRAM[dtype], scale=lengths[:, None] * lengths)


@pytest.mark.parametrize("name", ["gru", "a_gem", "cos_clip", "gradvac", "pcgrad", "ngdiff", "blur", "upgrad"])
def test_rules_ask_the_host_nothing(name: str, no_synchronisation: None) -> None:
    rows = torch.randn(4, 3, 50, device="cuda", dtype=torch.float64)
    gs.rules.by_name(name)(rows @ rows.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_asks_the_host_nothing(dtype: torch.dtype, no_synchronisation: None) -> None:
    model = network("cuda", dtype)
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=1e-3), ema_decay=0.5, max_norm=1.0)
    for name, loss in losses(model, 0).items():
        with optimizer.objective(name):
            loss.backward()
    optimizer.combine()


def test_a_grad_scaler_skips_an_overflow() -> None:
    model = network("cuda")
    optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=1e-3))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = losses(model, 0)
    scaler.scale(optimizer.join(forget=found["forget"] * torch.inf, retain=found["retain"])).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*gs.losses.LOSSES, "uniform"])
def test_a_loss_with_its_head_is_that_of_the_cpu(
    name: str, dtype: torch.dtype, kernel: bool, weighted: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel:
        pytest.importorskip("triton")
    else:
        monkeypatch.setattr("gradsurgery.losses._kernel.usable", lambda logits: False)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).to(dtype) for n in (300, 5003))
    labels = torch.randint(5003, (300,), generator=generator)
    labels[::3] = -100
    upstream = torch.linspace(-1, 2, 300) if weighted else torch.full((300,), 0.5)
    found = []
    for device in ("cpu", "cuda"):
        h, w = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
        values = gs.losses.linear(h, gs.losses.Head(w, softcap=softcap), labels.to(device), name, chunk_size=64)
        (values @ upstream.to(device)).backward()
        found.append([values.detach().cpu().double(), h.grad.cpu().double(), w.grad.cpu().double()])
    for one, other in zip(*found, strict=True):
        close(other, one, LINEAR[torch.bfloat16 if dtype == torch.bfloat16 else torch.float32], scale=float(one.norm()))


def test_a_head_on_the_gpu_holds_a_chunk_and_the_gradients() -> None:
    tokens, vocabulary, width = 4096, 50_000, 256
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(vocabulary, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gs.losses.linear(hidden, weight, labels, "ceu", chunk_size=256).mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 3 * 256 * vocabulary * 4 + 4 * hidden.nbytes
