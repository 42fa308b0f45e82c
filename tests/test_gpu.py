"""On a CUDA device: the same numbers as on the CPU, and one question to the device a step.

`tests/gradsurgery/optimizer/test_no_device.py` asks the same of a device that is not there.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradsurgery as gs
from tests.tolerances import COMBINED, GRAM, LINEAR, STEPPED_FLOAT32, close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIONS: dict[str, dict[str, Any]] = {
    "gru": {},
    "ema": {"ema_decay": 0.7},
    "everything": {"ema_decay": 0.2, "add": {"retain": 0.5}, "max_norm": 0.1, "guard": "update", "scope": "tensor"},
    "metric": {"metric": "optimizer"},
    "elementwise": {"rule": "sago"},
    "several, layers": {"objectives": ("forget", "retain", "style"), "scope": gs.scope.by_layer, "guard": "measure"},
    "accumulate": {"accumulate": True, "ema_decay": 0.5, "guard": "update"},
    "own metric": {"metric": lambda parameters: [torch.full_like(p, 2.0) for p in parameters]},
    "two rates": {"guard": "update", "ema_decay": 0.5},
}


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def network(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 32)).to(device=device, dtype=dtype)


def losses(model: nn.Module, step: int, objectives: tuple[str, ...] = ("forget", "retain")) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    parameter = next(model.parameters())
    x = torch.randn(3, 16, 64, generator=generator).to(parameter)
    found = {
        "forget": -model(x[0]).square().mean(),
        "retain": (model(x[1]) - 0.3).square().mean(),
        "style": (model(x[2]) + 0.2).square().mean(),
    }
    return {name: found[name] for name in objectives}


def surgeon(model: nn.Module, name: str, **base: Any) -> gs.GradientSurgery:
    named = list(model.named_parameters())
    later = {"lr": 1e-4} if name == "two rates" else {}
    groups = [{"params": named[:2]}, {"params": named[2:], **later}]
    return gs.GradientSurgery(torch.optim.AdamW(groups, lr=1e-3, **base), **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_training_on_the_gpu_is_training_on_the_cpu(name: str) -> None:
    models = [network("cpu"), network("cuda")]
    for model in models:
        optimizer = surgeon(model, name)
        for step in range(5):
            optimizer.join(**losses(model, step, optimizer.objectives)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        close(second.detach().cpu(), first.detach(), STEPPED_FLOAT32)


def test_an_anchor_pulls_as_on_the_cpu_wherever_it_was_prepared() -> None:
    inputs, found = torch.randn(9, 64), []
    for watched, moved in (("cpu", "cpu"), ("cuda", "cuda"), ("cpu", "cuda")):
        model = network(watched)
        anchor = gs.LayerAnchor(model, 0.5)
        with anchor.watch():
            model(inputs.to(watched))
        anchor.prepare()
        model.to(moved)
        for step, weight in enumerate(model.parameters()):
            weight.data.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).to(moved))
        anchor.pull()
        found.append(torch.cat([weight.detach().cpu().flatten() for weight in model.parameters()]))
    for pulled in found[1:]:
        close(pulled, found[0], STEPPED_FLOAT32)


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


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("front_end", ["contexts", "join"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_waits_for_one_flag(name: str, front_end: str, fused: bool) -> None:
    """Backward passes included. Each wait is a warning; without them this would be the mode "error"."""
    model = network("cuda")
    optimizer = surgeon(model, name, fused=fused)
    for step in range(3):
        found = losses(model, step, optimizer.objectives)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if step else "default")  # the first step allocates and compiles
            try:
                if front_end == "join":
                    optimizer.join(**found).backward()
                else:
                    for objective, loss in found.items():
                        with optimizer.objective(objective):
                            loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waited = [str(wait.message) for wait in waits if "synchroniz" in str(wait.message)]
        assert len(waited) <= 1, waited


def test_adagrads_metric_asks_nothing_where_it_counts_on_the_device(no_synchronisation: None) -> None:
    model = network("cuda")
    optimizer = gs.GradientSurgery(torch.optim.Adagrad(model.parameters(), lr=0.1, fused=True), metric="optimizer")
    for name, loss in losses(model, 0).items():
        with optimizer.objective(name):
            loss.backward()
    optimizer.combine()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rows_are_combined_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    low, wide = network("cuda", dtype), network("cuda")
    optimizer = gs.GradientSurgery(torch.optim.SGD(low.parameters(), lr=0.1), add={"retain": 0.5})
    reference = gs.GradientSurgery(torch.optim.SGD(wide.parameters(), lr=0.1), add={"retain": 0.5})
    for name, loss in losses(low, 0).items():
        with optimizer.objective(name):
            loss.backward()
            rows = [None if p.grad is None else p.grad.float() for p in low.parameters()]
        with reference.objective(name):
            for parameter, row in zip(wide.parameters(), rows, strict=True):
                parameter.grad = row
    record, expected = optimizer.combine(), reference.combine()
    close(record.gram.cpu(), expected.gram.cpu(), GRAM[torch.float32], scale=float(expected.gram.abs().max()))
    for first, second in zip(low.parameters(), wide.parameters(), strict=True):
        assert first.grad is not None
        assert second.grad is not None
        # Rows that nearly cancel are rounded in units of the rows, not of their difference.
        close(first.grad.float().cpu(), second.grad.cpu(), COMBINED[dtype], scale=2 * float(second.grad.abs().max()))


@pytest.mark.parametrize("name", ["gru", "ema", "everything", "elementwise", "accumulate", "several, layers"])
def test_the_peak_is_at_most_that_of_a_plain_step_and_the_estimate(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(6))).to("cuda")
    plain = copy.deepcopy(model)
    x = torch.randn(8, 2048, device="cuda")
    optimizer = surgeon(model, name)
    base = torch.optim.AdamW(plain.parameters(), lr=1e-3)

    def peak(step: Any) -> int:
        before = 0
        for _ in range(2):  # the first creates the state
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
        return torch.cuda.max_memory_allocated() - before

    def plainly() -> None:
        plain(x).square().mean().backward()
        base.step()
        base.zero_grad()

    def surgically() -> None:
        for objective in optimizer.objectives:
            with optimizer.objective(objective):
                model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    # Averages live on between steps, so they are in the estimate and not in the second step's growth: a bound all the
    # same. The chunks of the products are 2^24 numbers at most.
    assert peak(surgically) <= peak(plainly) + optimizer.memory_estimate() + 3 * 2**24 * 4


def across_two_processes(rank: int, folder: str) -> None:
    """Gloo, because NCCL refuses two processes on one device."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = network("cuda")
    optimizer = gs.GRU(torch.optim.SGD(model.parameters(), lr=0.1), guard="update")
    wrapped = DistributedDataParallel(model)
    for step in range(3):
        optimizer.join(**losses(wrapped, 2 * step + rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save([parameter.detach().cpu() for parameter in model.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_on_one_device_are_the_single_process_run(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(across_two_processes, (str(tmp_path),), nprocs=2)
    model = network("cuda")
    optimizer = gs.GRU(torch.optim.SGD(model.parameters(), lr=0.1), guard="update")
    for step in range(3):
        shares = [losses(model, 2 * step + rank) for rank in range(2)]
        for name in optimizer.objectives:
            with optimizer.objective(name):
                torch.stack([share[name] for share in shares]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for first, second, expected in zip(*found, model.parameters(), strict=True):
        assert torch.equal(first, second)
        close(first, expected.detach().cpu(), STEPPED_FLOAT32)


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
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*gs.losses.LOSSES, "uniform"])
def test_a_loss_with_its_head_is_that_of_the_cpu(
    name: str, dtype: torch.dtype, backend: str, weighted: bool, softcap: float | None
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).to(dtype) for n in (300, 5003))
    labels = torch.randint(5003, (300,), generator=generator)
    labels[::3] = -100
    upstream = torch.linspace(-1, 2, 300) if weighted else torch.full((300,), 0.5)
    found = []
    for device in ("cpu", "cuda"):
        h, w = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
        with gs.losses.backend(backend if device == "cuda" else "eager"):
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
