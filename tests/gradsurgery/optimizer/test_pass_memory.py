"""A surgery pass over ready rows allocates what `memory_estimate` names, and a chunk: a bound on bytes, on no time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gradsurgery as gs
from lightning_modules.ablation.memory import peak_megabytes, reset_peak
from tests.benchmarks import limit
from tests.benchmarks.growth import backends
from tests.benchmarks.memory import extra

COPIES = 0.05  # of a gradient, beyond what is named
# Plain PyTorch takes the products of half-precision rows in float64, a chunk of every row at a time.
CHUNK = gs.gram.chunk_size(torch.device("cpu")) * 8


@pytest.fixture(params=["compiled", "eager"])
def choice(request: pytest.FixtureRequest) -> str:
    if request.param not in backends():
        pytest.skip("no C++ compiler")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("number", "averages", "options"),
    [
        (4, 0, {"max_norm": 1.0, "scope": "tensor"}),
        (3, 2, {"ema_decay": 0.7, "add": {"protected 1": 1.0}}),
    ],
    ids=["four rows", "averages"],
)
def test_a_pass_allocates_a_twentieth_of_a_gradient_beyond_what_the_estimate_names(
    choice: str, dtype: torch.dtype, number: int, averages: int, options: dict[str, Any]
) -> None:
    found = extra(limit.filled([(1 << 18,)] * 4, number, dtype), choice, **options)
    assert found.named == 0
    chunks = (number + averages) * CHUNK if (choice, dtype) == ("eager", torch.bfloat16) else 0
    assert found.allocated - found.named <= COPIES * found.copy + chunks


def test_a_guard_and_accumulation_hold_the_copies_that_the_estimate_names(choice: str) -> None:
    found = extra(limit.filled([(1 << 18,)] * 4, 2), choice, guard="update", accumulate=True)
    assert found.named == 2 * found.copy
    chunks = CHUNK if choice == "eager" else 0  # of the change, which is stored nowhere
    assert abs(found.allocated - found.named) <= COPIES * found.copy + chunks


def test_what_the_kernel_allocates_by_itself_is_as_little() -> None:
    if "compiled" not in backends():
        pytest.skip("no C++ compiler")
    if torch.cuda.is_available():
        pytest.skip("peak_megabytes would say what a GPU has allocated")
    if not reset_peak():
        pytest.skip("the system does not say")
    rows = limit.filled([(1 << 22,)] * 4, 2)

    def one_pass(number: int) -> None:
        with gs.gram.backend("compiled"):
            gs.gram.gram([row[:number] for row in rows])
            gs.gram.combine_([row[:number] for row in rows], torch.tensor([1.0, 1e-9], dtype=torch.float64))

    one_pass(1)
    reset_peak()
    before = peak_megabytes()
    one_pass(4)
    after = peak_megabytes()
    assert before is not None
    assert after is not None
    assert (after - before) * 2**20 <= COPIES * sum(tensor.nbytes for tensor in rows[0])
