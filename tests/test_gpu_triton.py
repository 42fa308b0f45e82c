"""Triton's kernels of Gram matrices on a CUDA device: plain PyTorch's numbers, no question to the device, graphs.

`tests/gradsurgery/gram_triton.py` asks the same in Triton's interpreter. Written where no device was: never run yet.
"""

from __future__ import annotations

import pytest
import torch

import gradsurgery as gs
from tests.test_gpu import losses, network, surgeon
from tests.tolerances import COMBINED, LINEAR, STEPPED_FLOAT32, TRITON_GRAM, close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def mixed_rows(number: int, dtype: torch.dtype) -> list[list[torch.Tensor | None]]:
    """Whole chunks and parts of one, one address that 16 does not divide, a row that is missing, an empty tensor."""
    rows: list[list[torch.Tensor | None]] = []
    for _ in range(number):
        buffer = torch.randn(40_001, device="cuda").to(dtype)
        rows.append([torch.randn(shape, device="cuda").to(dtype) for shape in ((3, 100_003), (1 << 15,), (0,), (7,))])
        rows[-1].append(buffer[1:])
    rows[-1][0] = None if number > 1 else rows[-1][0]
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_tritons_kernels_are_plain_pytorch(number: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    rows, blocks = mixed_rows(number, dtype), [0, 2, 1, 2, 0]
    coefficients = torch.randn(3, number, dtype=torch.float64, device="cuda")
    found = []
    for name in ("triton", "eager"):
        mine = [[None if t is None else t.clone() for t in rows[0]], *rows[1:]]
        with gs.gram.backend(name):
            grams = gs.gram.block_gram(rows, blocks=blocks, num_blocks=3)
            found.append((grams.cpu(), gs.gram.combine_blocks_(mine, coefficients, blocks=blocks)))
    (one, combined), (other, expected) = found
    lengths = other.sum(0).diagonal().sqrt()
    close(one, other, TRITON_GRAM, scale=lengths[:, None] * lengths)
    for first, second in zip(combined, expected, strict=True):
        close(
            first.float().cpu(),
            second.float().cpu(),
            COMBINED[dtype],
            scale=2.0 * float(second.abs().max()) if second.numel() else 1.0,
        )


@pytest.mark.parametrize("rule", ["sum", "gru", "pcgrad"])
def test_three_launches_ask_nothing_and_a_graph_replays_them_on_new_numbers(rule: str) -> None:
    pytest.importorskip("triton")
    rows = [row[1:] for row in mixed_rows(2, torch.bfloat16)]
    with gs.gram.backend("triton"):
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="has run before on the same tensors"), torch.cuda.graph(graph):
            gs.gram.update_(rows, rule)
        gs.gram.update_(rows, rule)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            gs.gram.update_(rows, rule)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gs.gram.update_(rows, rule)
        assert captured is not None
        for sign in (-1.0, 1.0):
            for forget, retain in zip(*rows, strict=True):
                retain.normal_()
                forget.copy_(retain * sign + torch.randn_like(retain))
            copies = [[tensor.clone() for tensor in row] for row in rows]
            graph.replay()
            with gs.gram.backend("eager"):
                expected = gs.gram.gram(copies)
                coefficients = gs.rules.by_name(rule)(expected)
                gs.gram.combine_(copies, coefficients)
            close(captured[0][0].cpu(), expected.cpu(), TRITON_GRAM, scale=float(expected.abs().max()))
            close(captured[1][0].cpu(), coefficients.cpu(), TRITON_GRAM, scale=10.0)
            for mine, other in zip(rows[0], copies[0], strict=True):
                # Coefficients that differ in their last digits can round a number to its neighbour.
                close(mine.float().cpu(), other.float().cpu(), LINEAR[torch.bfloat16], scale=10.0)


@pytest.mark.parametrize("name", ["gru", "ema", "everything", "several, layers"])
def test_training_with_tritons_kernels_is_training_without(name: str) -> None:
    pytest.importorskip("triton")
    models = [network("cuda"), network("cuda")]
    for model, backend in zip(models, ("triton", "eager"), strict=True):
        optimizer = surgeon(model, name)
        with gs.gram.backend(backend):
            for step in range(5):
                for objective, loss in losses(model, step, optimizer.objectives).items():
                    with optimizer.objective(objective):
                        loss.backward()
                torch.cuda.set_sync_debug_mode("error" if step and backend == "triton" else "default")
                try:
                    optimizer.combine()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                optimizer.step()
                optimizer.zero_grad()
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        close(first.detach().cpu(), second.detach().cpu(), STEPPED_FLOAT32)
