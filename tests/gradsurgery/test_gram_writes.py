"""Overwriting rows in the pass that multiplies them: the same bits as writing first, by both backends, and every write once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradsurgery as gs
from gradsurgery.gram import Write, backend, block_gram, choice, gram
from gradsurgery.optimizer.rows import Rows
from tests.tolerances import KERNEL_GRAM, close

backends = pytest.mark.parametrize(
    "name",
    [
        "eager",
        pytest.param(
            "compiled",
            marks=pytest.mark.skipif(isinstance(choice.built(), str), reason="needs a C++ compiler"),
        ),
    ],
)
SHAPES = [(), (0,), (17,), (1030,), (30, 40), (3, 70_001)]


def row(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [*made, made[4].t()]  # the last is not contiguous, and shares no memory with a copy


def copied(tensors: list[Tensor]) -> list[Tensor | None]:
    return [tensor.clone() for tensor in tensors]


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("weight", [None, 0.2, 0.5, 0.97])
def test_written_and_multiplied_in_one_pass(name: choice.Choice, dtype: torch.dtype, weight: float | None) -> None:
    forget, retain, other = (row(seed, dtype) for seed in range(3))
    expected = [y - x if weight is None else x.lerp(y, weight) for x, y in zip(retain, other, strict=True)]
    there: list[Tensor | None] = copied(retain)
    there[3] = None
    write = Write(1, {index: y for index, y in enumerate(other) if index != 3}, weight)
    kept = copied(other)
    with backend(name):
        found = block_gram([forget, there], writes=[write])[0]
        again = gram([forget, there])
        assert torch.equal(found, again)
        assert torch.equal(block_gram([forget, there], writes=[write])[0], again)  # nothing is done twice
    assert write.others == {}
    for index, (mine, right) in enumerate(zip(there, expected, strict=True)):
        assert mine is None if index == 3 else torch.equal(mine, right)
    assert all(torch.equal(y, k) for y, k in zip(other, kept, strict=True))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("weight", [None, 0.2, 0.97])
def test_multiplied_as_if_it_were_written(name: choice.Choice, dtype: torch.dtype, weight: float | None) -> None:
    forget, retain, other = (row(seed, dtype) for seed in range(3))
    there, kept = copied(retain), copied(retain)
    write = Write(1, dict(enumerate(other)), weight, stored=False)
    versions = [tensor._version for tensor in retain]
    with backend(name):
        found = block_gram([forget, retain], writes=[write])[0]
        expected = block_gram([forget, there], writes=[Write(1, dict(enumerate(other)), weight)])[0]
    assert torch.equal(found, expected)
    assert write.others == {}
    assert all(torch.equal(mine, before) for mine, before in zip(retain, kept, strict=True) if before is not None)
    assert [tensor._version for tensor in retain] == versions


def trained(name: choice.Choice, **options: object) -> tuple[Tensor, gs.GradientSurgery]:
    torch.manual_seed(0)
    model = torch.nn.Linear(60, 70)
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), **options)
    with backend(name):
        for step in range(4):
            inputs = torch.randn(2, 6, 60, generator=torch.Generator().manual_seed(step))
            for sign, objective, batch in ((-1.0, "forget", inputs[0]), (1.0, "retain", inputs.mean(0))):
                with optimizer.objective(objective):
                    (sign * (model(batch) - 1.0).square()).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer


@pytest.mark.skipif(isinstance(choice.built(), str), reason="needs a C++ compiler")
@pytest.mark.parametrize("options", [{"ema_decay": 0.2}, {"ema_decay": 0.9, "guard": "update"}, {"guard": "measure"}])
def test_training_with_averages_and_a_guard_is_the_same_with_both_backends(options: dict[str, object]) -> None:
    compiled, one = trained("compiled", **options)
    eager, other = trained("eager", **options)
    close(compiled, eager, KERNEL_GRAM[torch.bfloat16], scale=1.0)
    for mine, theirs in zip(one.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        if "gradsurgery_ema_retain" in mine:
            close(mine["gradsurgery_ema_retain"], theirs["gradsurgery_ema_retain"], KERNEL_GRAM[torch.bfloat16])


@pytest.mark.parametrize("rule", ["gru", "sago"])
def test_a_step_that_fails_before_the_rows_are_measured_can_be_taken_again(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = trained("eager", rule=rule, ema_decay=0.5)
    kept = Rows.measure
    calls: list[Rows] = []

    def measure(self: Rows) -> object:
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        return kept(self)

    monkeypatch.setattr(Rows, "measure", measure)
    step = gs.GradientSurgery.step

    def patient(self: gs.GradientSurgery) -> object:
        try:
            return step(self)
        except MemoryError:
            return step(self)

    monkeypatch.setattr(gs.GradientSurgery, "step", patient)
    found, _ = trained("eager", rule=rule, ema_decay=0.5)
    assert len(calls) == 5
    assert torch.equal(found, expected)
