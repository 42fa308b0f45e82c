"""The Triton kernels of Gram matrices in Triton's interpreter, against float64 numpy and plain PyTorch.

`test_gram_triton.py` runs this file in a process of its own, because Triton reads its setting when it is imported:

    TRITON_INTERPRET=1 pytest -n 0 tests/gradsurgery/gram_triton.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import gradsurgery as gs
from gradsurgery.gram import Write, _triton, backend, block_gram, combine_, combine_blocks_, gram, update_
from gradsurgery.gram.device import DeviceKernel
from tests.reference import gram as reference
from tests.tolerances import COMBINED, INTERPRETED_BF16, SAME, STEPPED_FLOAT32, TRITON_GRAM, close

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Chunks of 128 numbers, of which a program takes 64 at once: none, parts of one, whole ones, several and a rest.
SHAPES = [(), (0,), (1,), (63,), (64,), (3, 5), (128,), (129,), (7, 40)]
COEFFICIENTS = (0.7, -1.3, 0.2, 2.0)
MIXTURES = [(F32,), (BF16, BF16), (F16, F16), (F32, F32), (BF16, F32), (F32, BF16, F16), (F32,) * 4]
mixtures = pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda mixture: f"{len(mixture)}-{mixture[-1]}")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_triton, "CHUNK", 128)
    monkeypatch.setattr(_triton, "LANES", dict.fromkeys(range(1, 9), 64))
    with backend("triton"):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters the kernels multiplied in each call."""
    found: list[int] = []
    kept = DeviceKernel.add_products

    def counted(self: DeviceKernel, batch: object, total: Tensor) -> bool:
        found.append(len(batch.taken))
        return kept(self, batch, total)

    monkeypatch.setattr(DeviceKernel, "add_products", counted)
    return found


def tensor(shape: tuple[int, ...], dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows_of(*dtypes: torch.dtype) -> list[list[Tensor | None]]:
    rows = [[tensor(shape, dtype, 100 * k + p) for p, shape in enumerate(SHAPES)] for k, dtype in enumerate(dtypes)]
    if len(rows) > 1:
        rows[1][8] = rows[-1][4] = None
    return rows


def copied(rows: list[list[Tensor | None]]) -> list[list[Tensor | None]]:
    return [[None if t is None else t.detach().clone() for t in row] for row in rows]


def close_grams(found: Tensor, rows: list[list[Tensor | None]]) -> None:
    expected = reference.gram(rows)
    norms = expected.diagonal().sqrt()
    assert torch.equal(found, found.mT)
    close(found, expected, TRITON_GRAM, scale=(norms[:, None] * norms).clamp_min(1e-300))


@mixtures
def test_products_equal_numpy(dtypes: tuple[torch.dtype, ...], calls: list[int]) -> None:
    rows = rows_of(*dtypes)
    close_grams(gram(rows), rows)
    assert calls == [len(SHAPES)]


def test_blocks_have_matrices_of_their_own() -> None:
    rows, blocks = rows_of(F32, BF16), [2, 0, 0, 2, 3, 0, 3, 2, 0]  # block 1 has no parameter
    found = block_gram(rows, blocks=blocks, num_blocks=4)
    for block in range(4):
        close_grams(found[block], [[t for t, b in zip(row, blocks, strict=True) if b == block] for row in rows])


@mixtures
def test_combinations_equal_numpy(dtypes: tuple[torch.dtype, ...]) -> None:
    rows, blocks = rows_of(*dtypes), [2, 0, 0, 2, 1, 0, 1, 2, 0]
    before = copied(rows)
    at = [t.data_ptr() for t in rows[0] if t is not None]
    coefficients = torch.tensor([COEFFICIENTS[: len(rows)], COEFFICIENTS[::-1][: len(rows)], [1.0] * len(rows)])
    found = combine_blocks_(rows, coefficients, blocks=blocks)
    tolerance = INTERPRETED_BF16 if dtypes[0] == BF16 else COMBINED[dtypes[0]]
    for p, mine in enumerate(found):
        (expected,) = reference.combination([[row[p]] for row in before], coefficients[blocks[p]].tolist())
        assert mine is not None
        assert expected is not None
        close(mine.double(), expected, tolerance, scale=12.0)
    assert at == [t.data_ptr() for t, old in zip(found, before[0], strict=True) if t is not None and old is not None]
    for row, other in zip(rows[1:], before[1:], strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(row, other, strict=True))


def test_bits_do_not_depend_on_where_a_tensor_starts_or_on_other_rows() -> None:
    rows = [[tensor((7, 40), dtype, seed)] for seed, dtype in enumerate((F32, F32, BF16))]
    first = gram(rows)
    assert torch.equal(gram(rows), first)
    assert torch.equal(gram(rows[:2]), first[:2, :2])
    (combined,) = combine_(copied(rows), torch.tensor([0.5, 2.0, -1.0]))
    for start in (1, 3):
        buffer = torch.zeros(400)
        moved = copied(rows)
        here = buffer[start:][:280].view(7, 40).copy_(moved[0][0])
        assert here.data_ptr() % 16
        moved[0][0] = here
        assert torch.equal(gram(moved), first)
        assert torch.equal(combine_(moved, torch.tensor([0.5, 2.0, -1.0]))[0], combined)
        assert buffer[:start].eq(0.0).all()
        assert buffer[start + 280 :].eq(0.0).all()


def test_what_the_kernels_do_not_take_goes_beside_what_they_take(calls: list[int]) -> None:
    layouts = [lambda t: t.t(), lambda t: t.double(), lambda t: t, lambda t: t[:, :1].expand(-1, 40), lambda t: t * 1j]
    rows = [[layout(tensor((30, 40), seed=10 * k + p)) for p, layout in enumerate(layouts)] for k in range(2)]
    close_grams(gram(rows), rows)
    assert calls == [1]
    targets = [None if t is None else t.clone() for t in rows[0][:3]]
    found = combine_([targets, rows[1][:3]], torch.tensor([0.5, 2.0]))
    for mine, other in zip(found, reference.combination([row[:3] for row in rows], [0.5, 2.0]), strict=True):
        close(mine.double(), other, COMBINED[F32], scale=10.0)
    many = [[tensor((5,), seed=k)] for k in range(9)]
    close_grams(gram(many), many)
    close_grams(gram(many[:8]), many[:8])
    assert calls == [1, 0, 1] or calls == [1, 1]


def test_rows_without_any_gradient() -> None:
    assert torch.equal(gram([[None], [None]]), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(gram([[torch.zeros(0)], [None]]), torch.zeros(2, 2, dtype=torch.float64))
    assert combine_([[None], [None]], torch.ones(2)) == [None]
    (found,) = combine_([[None], [torch.ones(3)]], torch.tensor([math.nan, 2.0]))
    assert found is not None
    assert found.isnan().all()
    (found,) = combine_([[torch.ones(3)], [None]], torch.tensor([2.0, math.nan]))  # nothing to multiply by NaN
    assert found is not None
    assert found.tolist() == [2.0] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 64, 279])
def test_nothing_hides_a_bad_element(bad: float, place: int) -> None:
    rows = [[tensor((280,), dtype, seed)] for seed, dtype in enumerate((BF16, F32, F32))]
    spoilt = rows[0][0]
    spoilt.view(-1)[place] = bad
    finite = gram(rows).isfinite()
    assert not finite[0, 0]
    assert finite[1:, 1:].all()
    (found,) = combine_([[torch.zeros(280)], [spoilt]], torch.tensor([1.0, 0.0]))
    assert found.isnan().nonzero().tolist() == [[place]]
    kept = torch.zeros(280)
    combine_blocks_([[kept], [spoilt]], torch.tensor([[1.0, 0.0]]), finite=True)
    assert kept.eq(0.0).all()  # as promised, nothing was read


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_chunk_of_the_real_size_is_as_exact_and_equal_numbers_do_not_drift(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    size = 2 * _triton.CHUNK + 5
    with backend("triton"):
        rows = [[tensor((size,), dtype, seed)] for seed in range(2)]
        close_grams(gram(rows), rows)
        equal = [[torch.full((size,), 1.0078125, dtype=dtype)]]
        close_grams(gram(equal), equal)


@pytest.mark.parametrize("weight", [None, 0.2, 0.97])
def test_written_and_multiplied_in_one_pass(weight: float | None, calls: list[int]) -> None:
    forget, retain = rows_of(F32, F32)
    expected, other = copied([retain])[0], rows_of(F32, F32, F32)[2]
    writes = [Write(1, {p: t for p, t in enumerate(other) if t is not None and retain[p] is not None}, weight)]
    for p, tensor_there in writes[0].others.items():
        writes[0].do(expected[p], tensor_there)
    found = block_gram([forget, retain], writes=writes)[0]
    assert calls == [len(SHAPES)]
    assert writes[0].others == {}
    for mine, right in zip(retain, expected, strict=True):
        assert mine is right is None or mine is not None
        if mine is not None and right is not None:
            close(mine, right, COMBINED[F32], scale=10.0)
    assert torch.equal(found, gram([forget, retain]))


def test_multiplied_as_if_it_were_written() -> None:
    forget, retain, other = rows_of(F32, F32, F32)
    pairs = {p: t for p, t in enumerate(other) if t is not None and retain[p] is not None}
    kept, there = copied([retain])[0], copied([retain])[0]
    found = block_gram([forget, retain], writes=[Write(1, dict(pairs), None, stored=False)])[0]
    assert torch.equal(found, block_gram([forget, there], writes=[Write(1, dict(pairs), None)])[0])
    for mine, before in zip(retain, kept, strict=True):
        assert mine is before is None or (mine is not None and before is not None and torch.equal(mine, before))


RULES = {"sum": gs.rules.sum, "gru": gs.rules.gru, "pcgrad": gs.rules.pcgrad}


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("rule", RULES)
def test_rule_and_combination_in_three_launches(rule: str, sign: float) -> None:
    blocks, number = [2, 0, 2, 0], 3
    forget, retain = (
        [tensor(shape, seed=10 * k + p) for p, shape in enumerate(((5,), (129,), (64,), ()))] for k in (1, 2)
    )
    retain[3] = None
    retain = [None if r is None else r * 0.3 + sign * f for f, r in zip(forget, retain, strict=True)]
    if sign == 0.0:
        retain = [None if r is None else torch.zeros_like(r) for r in retain]
    before = copied([forget, retain])
    expected = block_gram(before, blocks=blocks, num_blocks=number)
    found = update_([forget, retain], rule, blocks=blocks, num_blocks=number)
    assert found is not None
    assert torch.equal(found[0], expected)
    close(found[1], RULES[rule](expected), SAME, scale=10.0)
    combine_blocks_(before, RULES[rule](expected), blocks=blocks)
    for mine, other in zip(forget, before[0], strict=True):
        close(mine, other, COMBINED[F32], scale=10.0)


def test_a_bad_block_spoils_itself_alone_and_opposite_rows_are_not_finite_nowhere() -> None:
    forget, retain = [torch.ones(3), torch.ones(3)], [torch.tensor([1.0, math.inf, 1.0]), -torch.ones(3)]
    found = update_([forget, retain], "gru", blocks=[0, 1], num_blocks=2)
    assert found is not None
    assert found[1].isnan().tolist() == [[True, True], [False, False]]
    assert forget[0].isnan().all()
    assert forget[1].eq(0.0).all()


def test_what_three_launches_cannot_do_is_left_undone() -> None:
    one, two = torch.ones(3), torch.ones(3, dtype=BF16)
    for rows, rule in (
        ([[one], [one]], "cagrad"),
        ([[one], [one], [one]], "gru"),
        ([[None], [one]], "gru"),
        ([[one, two], [one, two]], "gru"),  # two launches
        ([[one.double()], [one]], "gru"),
    ):
        assert update_(rows, rule) is None
    with backend("eager"):
        assert update_([[one], [one]], "sum") is None
    assert one.eq(1.0).all()


def trained(name: str, dtype: torch.dtype = F32, **options: object) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 11).to(dtype)
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), **options)
    seen = []
    with backend(name):
        for step in range(3):
            inputs = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(step)).to(dtype)
            for sign, objective, batch in ((-1.0, "forget", inputs[0]), (1.0, "retain", inputs.mean(0))):
                with optimizer.objective(objective):
                    (sign * (model(batch) - 1.0).square()).mean().backward()
            record = optimizer.combine()
            seen += [record.gram, record.coefficients, record.predicted_change, record.norms]
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().float().flatten() for p in model.parameters()]), seen


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"rule": "pcgrad"}, True),
        ({"rule": "cagrad", "record_scope": "tensor"}, False),
        ({"ema_decay": 0.9, "guard": "update"}, False),
        ({"scope": "tensor", "add": {"retain": 0.5}, "max_norm": 0.1}, False),
    ],
    ids=str,
)
def test_training_is_that_of_plain_pytorch(
    options: dict[str, object], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[str] = []
    kept = DeviceKernel.update
    monkeypatch.setattr(DeviceKernel, "update", lambda self, *a: updates.append("") or kept(self, *a))
    found, records = trained("triton", **options)
    assert len(updates) == (3 if fused else 0)
    expected, others = trained("eager", **options)
    close(found, expected, STEPPED_FLOAT32)
    for mine, other in zip(records, others, strict=True):
        close(mine, other, STEPPED_FLOAT32)


def test_shards_go_through_the_same_kernels(tmp_path: Path, calls: list[int]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = [[tensor((8, 9), seed=k), tensor((5,), seed=10 + k)] for k in range(2)]
        rows: list[list[Tensor | None]] = [[DTensor.from_local(a, mesh, [Shard(0)]), b] for a, b in plain]
        assert torch.equal(gram(rows), gram([row[:1] for row in plain]) + gram([row[1:] for row in plain]))
        assert calls[:2] == [1, 1]  # once for each sharding
        assert update_(rows, "sum") is None  # the ranks' sums come between products and rule
        expected = reference.combination(plain, [0.5, 2.0])
        first = combine_(rows, torch.tensor([0.5, 2.0]))[0]
        assert isinstance(first, DTensor)
        close(first.to_local().double(), expected[0], COMBINED[F32], scale=10.0)
    finally:
        torch.distributed.destroy_process_group()
