"""A user's own metric: the diagonal of the inner product in which conflict is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.problems import FRONT_ENDS, TWO, assert_same, classification, contexts, mlp, snapshot, taken, values
from tests.reference import training
from tests.tolerances import STEPPED, close

LOSSES = classification()


def weights_of(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Some positive weights, and 1 in the last parameter."""
    found: list[Tensor | None] = [torch.linspace(0.1, 3.0, p.numel()).to(p).view_as(p) for p in parameters[:-1]]
    return [*found, None]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1, "add": {"retain": 0.5}, "scope": "tensor"}])
def test_the_rows_are_measured_with_the_weights(options: dict[str, Any], front_end: str) -> None:
    model, plain = mlp(), mlp()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), metric=weights_of, **options)
    parameters = list(plain.parameters())
    diagonal: dict[Any, Tensor | None] = dict(zip(parameters, weights_of(parameters), strict=True))
    reference = training.Surgery(
        plain,
        torch.optim.SGD(parameters, lr=0.1),
        TWO,
        preconditioner=lambda base, parameter: diagonal[parameter],
        max_norm=options.get("max_norm"),
        add=options.get("add", {}),
        block=(lambda name: name) if "scope" in options else (lambda name: "all"),
    )
    for step in range(4):
        FRONT_ENDS[front_end](model, optimizer, LOSSES, [step])
        expected = reference.step([LOSSES(plain, step, 0)])
        close(taken(optimizer).gram.reshape_as(expected.gram), expected.gram, STEPPED)
        close(values(model), values(plain), STEPPED)


def test_it_is_asked_once_a_step_for_the_parameters_as_they_are() -> None:
    model = mlp()
    seen: list[Tensor] = []

    def metric(parameters: Sequence[Tensor]) -> list[Tensor | None]:
        seen.append(values(parameters))
        return [None] * len(parameters)

    plain = mlp()
    optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=0.1), metric=metric, guard="measure", max_norm=0.1)
    reference = gs.GRU(torch.optim.AdamW(plain.parameters(), lr=0.1), guard="measure", max_norm=0.1)
    before = values(model)
    contexts(model, optimizer, LOSSES, range(2))
    contexts(plain, reference, LOSSES, range(2))
    assert len(seen) == 2
    assert torch.equal(seen[0], before)
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))  # weights of 1 are the Euclidean metric


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (lambda parameters: [None], "a tensor or None for each of 4 parameters, found 1"),
        (
            lambda parameters: [p.flatten() for p in parameters],
            r"weights like parameter 0, real, \[5, 4\].*found \[20\]",
        ),
        (lambda parameters: [1.0] * 4, "weights like parameter 0.*found float"),
        (lambda parameters: [p.to("meta") for p in parameters], "weights like parameter 0.*on cpu.*found .* on meta"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_another_metric_recovers(metric: Any, sentence: str) -> None:
    model, plain = mlp(), mlp()
    optimizer = gs.GRU(torch.optim.SGD(model.parameters(), lr=0.1), metric=metric)
    before = values(model)
    with pytest.raises(ValueError, match=f"metric: expected {sentence}"):
        contexts(model, optimizer, LOSSES, [0])
    assert torch.equal(values(model), before)
    optimizer.zero_grad()
    optimizer.metric = "euclidean"
    contexts(model, optimizer, LOSSES, [0])
    contexts(plain, gs.GRU(torch.optim.SGD(plain.parameters(), lr=0.1)), LOSSES, [0])
    assert torch.equal(values(model), values(plain))


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.0, 0.9)])
def test_radams_metric_is_euclidean_while_its_step_is(betas: tuple[float, float]) -> None:
    """Its first steps do not divide by the second moment, and without momentum a projected step changes no protected loss."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = gs.GradientSurgery(torch.optim.RAdam([weight], lr=0.01, betas=betas), metric="optimizer")
    euclidean = []
    for step in range(8):
        forget, retain = ([10.0, 0.1], [1.0, 0.0]) if step == 0 else ([-1.0, 0.3], [1.0, 1.0])
        before, rows = weight.detach().clone(), torch.tensor([forget, retain], dtype=torch.float64)
        optimizer.join(forget=(weight * rows[0]).sum(), retain=(weight * rows[1]).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        euclidean.append(torch.equal(taken(optimizer).gram, rows @ rows.T))
        if step and euclidean[-1]:
            assert float((weight - before) @ rows[1]) == pytest.approx(0.0, abs=1e-9)
    assert euclidean == [True] * 5 + [False] * 3


def test_an_elementwise_rule_measures_nothing() -> None:
    parameters = nn.Linear(2, 2).parameters()
    with pytest.raises(ValueError, match="metric: expected 'euclidean' with an elementwise rule"):
        gs.GradientSurgery(torch.optim.SGD(parameters, lr=0.1), rule="sago", metric=weights_of)
