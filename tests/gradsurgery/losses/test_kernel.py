"""The kernels of log-odds against plain PyTorch, Triton's in its interpreter: values and gradients, in place, whatever the rows hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradsurgery.losses import _divergence_kernel, _odds_kernel, backend

ROOT = Path(__file__).parents[3]
WORKER = """
import itertools, sys
import torch
import gradsurgery as gs
from gradsurgery.losses import _kernel
from gradsurgery.losses import Head, token_loss
from torch import Tensor

assert sys.argv[1] in repr(gs.losses.backend(sys.argv[1]))
if sys.argv[1] == "triton":
    assert "interpreter" in repr(gs.losses.backend())
    _, some = gs.losses.backend("eager"), torch.randn(2, 5)
    assert not _kernel.usable(some)
    gs.losses.backend("triton")
    assert _kernel.usable(some) and not _kernel.usable(some.double()) and not _kernel.usable(some.T)
    from gradsurgery.losses import _device_kernel, _triton
    right = _triton.gradient_
    for wrong, why in ((lambda *_: None, "the kernels compute wrong numbers"), (None, "the kernels cannot run (TypeError: ")):
        _triton.gradient_ = wrong
        assert _device_kernel.built.__wrapped__().startswith(why)
    _triton.gradient_ = right

@token_loss(runner_up=True)
def margin(odds: Tensor, runner_up_odds: Tensor) -> Tensor:  # its slope by the runner-up does not vanish with the runner-up's doubt
    return (odds - runner_up_odds) ** 2 / 100 + odds

def rows(kind: str, n: int, V: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(V)
    logits, labels = 3 * torch.randn(n, V, generator=generator), torch.randint(V, (n,), generator=generator)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
    if kind in MARGINS:
        logits.scatter_(1, labels[:, None], others + MARGINS[kind])
    if kind == "runner-up far above":
        logits.scatter_(1, ((labels + 1) % V)[:, None], 150.0)
        logits.scatter_(1, labels[:, None], -60.0)
    if kind == "ties":
        logits = logits.round()
    if kind == "large":
        logits = logits + 1e4
    if kind == "some -inf":
        logits[:, ::3] = -torch.inf
        logits.scatter_(1, labels[:, None], 1.0)
    if kind == "nan":
        logits[1, (labels[1] + 1) % V] = torch.nan
        logits[2].scatter_(0, labels[2], torch.nan)
    return logits, labels

@token_loss
def plain_odds(odds: Tensor) -> Tensor:  # its slope is the upstream gradient itself, which may be an expanded tensor
    return odds

MARGINS = {"forgotten": -30.0, "certain": 200.0, "runner-up certain": -70.0}
worst, count = 0.0, 0
for kind, V, dtype, name in itertools.product(
    ("ordinary", *MARGINS, "runner-up far above", "ties", "large", "some -inf", "nan"), (2, 37, 4099), (torch.float32, torch.bfloat16), ("ceu", "inverted_hinge", margin, plain_odds),
):
    if kind == "large" and dtype != torch.float32 or kind == "some -inf" and V < 10:
        continue
    for scale, cap in ((1.0, None), (0.5, 6.0)):
        if cap is not None and kind in ("some -inf", "runner-up far above"):  # a cap makes others of them
            continue
        logits, labels = rows(kind, 4, V)
        hidden = torch.eye(4).to(dtype)
        weight = logits.to(dtype).T.contiguous()
        if kind in ("nan", "some -inf"):  # 0 times them is NaN: the head cannot make such rows, the kernel can be given them
            z = logits.to(dtype).contiguous()
            found = _kernel.reduce(z, labels, scale, cap)
            from gradsurgery.losses._log_odds import reduce_, gradient
            plain = z.float() * scale
            plain = plain if cap is None else cap * torch.tanh(plain / cap)
            slope = 1.0 if cap is None else 1 - (plain / cap) ** 2
            other = reduce_(plain, labels, True)
            torch.testing.assert_close(found.own, other.own, rtol=1e-4, atol=1e-5, equal_nan=True)
            torch.testing.assert_close(found.other, other.other, rtol=1e-4, atol=1e-5, equal_nan=True)
            ones = torch.ones(4)
            expected = gradient(plain, other, ones, ones, in_place=False) * slope * scale
            _kernel.gradient_(z, found, ones, ones)
            bad = expected.isnan().any(1)
            assert torch.equal(bad, z.isnan().any(1)), (kind, V, dtype)
            torch.testing.assert_close(z[~bad].float(), expected[~bad], rtol=1e-2, atol=1e-4)
            count += 1
            continue
        results = []
        for interpreted in (True, False):
            _kernel.usable = (lambda z: True) if interpreted else (lambda z: False)
            h = hidden.clone().requires_grad_()
            w = weight.clone().requires_grad_()
            values = gs.losses.linear(h, Head(w, None, scale, cap), labels, name)
            values.sum().backward()
            results.append((values.detach(), w.grad.double()))
        (value, grad), (plain_value, plain_grad) = results
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(value, plain_value, rtol=1e-4 if cap else 2e-5, atol=2e-5)
        error = float((grad - plain_grad).norm() / plain_grad.norm().clamp_min(1e-30))
        assert error <= (10 * tolerance if cap else tolerance), (kind, V, dtype, name, scale, error)
        worst, count = max(worst, error), count + 1
print("compared", count, "worst", worst)
"""


@pytest.mark.parametrize("kernel", ["triton", "compiled"])
def test_the_kernels_do_what_plain_pytorch_does(kernel: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if kernel == "triton":
        pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")
        environment["TRITON_INTERPRET"] = "1"
    elif isinstance(lacking := _odds_kernel.built(), str):
        pytest.skip(lacking)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WORKER, kernel], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[1]) > 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device would run the kernels")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter would run the kernels")
def test_without_a_device_tritons_kernels_are_refused_and_nothing_changes() -> None:
    with backend("eager"):
        with pytest.raises(RuntimeError, match="expected Triton's kernels to run, found that there is no CUDA device"):
            backend("triton")
        assert backend().name == "eager"


def test_where_there_is_a_compiler_no_test_is_skipped_for_a_broken_kernel() -> None:
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        assert not isinstance(_divergence_kernel.built(), str)
        assert not isinstance(_odds_kernel.built(), str)
