"""Gram matrices by layer in the record: equal to autograd's by hand, from the same pass, and without effect on the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.optimizer import rows as _rows
from tests.gradsurgery.optimizer import distributed_workers as workers
from tests.problems import BASES, FOUR, TWO, classification, contexts, joined, mlp, taken, values
from tests.reference import training
from tests.tolerances import SAME, STEPPED, close

STEPS = 4


def layer(name: str) -> str:
    return name.split(".")[0]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema": {"ema_decay": 0.7},
    "several, ema": {"objectives": FOUR, "ema_decay": {"retain": 0.9, "style": 0.2}},
    "several, max_norm, add": {"objectives": FOUR, "max_norm": 0.3, "add": {"utility": 0.5}},
    "tensor": {"scope": "tensor"},
    "callable, ema": {"scope": lambda name: name.split(".")[1], "ema_decay": 0.5},
    "metric": {"metric": "optimizer"},
    "guard": {"guard": "update", "ema_decay": 0.5},
    "accumulate": {"accumulate": True, "ema_decay": 0.5},
    "sago": {"rule": "sago"},
    "cglearn, ema": {"rule": partial(gs.elementwise.cglearn, tau=0.5), "objectives": FOUR, "ema_decay": 0.5},
}


def make(model: nn.Module, record_scope: Any = layer, **options: Any) -> gs.GradientSurgery:
    options = {"ema_dtype": torch.float64, **options}
    return gs.GradientSurgery(BASES["AdamW"](model.named_parameters()), record_scope=record_scope, **options)


def train(model: nn.Module, optimizer: gs.GradientSurgery, steps: int = STEPS) -> list[gs.Record]:
    records: list[gs.Record] = []
    losses = classification(optimizer.objectives)
    contexts(model, optimizer, losses, range(steps), after_step=lambda _, record: records.append(record))
    return records


def by_hand(rows: Tensor, model: nn.Module, keys: dict[str, str]) -> Tensor:
    """``[R, K, K]`` from flattened rows ``[K, n]``: one inner product of slices after another."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    found = torch.zeros(len(set(keys.values())), len(rows), len(rows), dtype=torch.float64)
    order = list(dict.fromkeys(keys.values()))
    for name, part in zip(names, rows.split(sizes, 1), strict=True):
        for i in range(len(rows)):
            for j in range(len(rows)):
                found[order.index(keys[name]), i, j] += sum(x * y for x, y in zip(part[i], part[j], strict=True))
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_the_blocks_add_up_to_the_global_gram(name: str) -> None:
    model = mlp()
    for record in train(model, make(model, **OPTIONS[name])):
        assert record.block_gram is not None
        total = record.gram if record.gram.ndim == 2 else record.gram.sum(0)
        close(record.block_gram.sum(0), total, SAME, scale=total.abs().max())
        assert record.block_names == ("0", "2")
        assert torch.equal(record.block_gram, record.block_gram.mT)


@pytest.mark.parametrize("decay", [None, 0.7])
def test_each_block_is_autograds_inner_products(decay: float | None) -> None:
    """The rows are the current gradients, or where there is an EMA its bias-corrected value; the forget row is always the step's own."""
    model, plain = mlp(), mlp()
    optimizer = make(model, objectives=FOUR, ema_decay=None if decay is None else {"retain": decay})
    losses, average = classification(FOUR), torch.zeros(43, dtype=torch.float64)
    keys = {name: layer(name) for name, _ in model.named_parameters()}
    for step in range(STEPS):
        plain.load_state_dict(model.state_dict())
        parameters = list(plain.parameters())
        found = losses(plain, step, 0)
        rows = torch.stack([training.flat(training.gradient(found[name], parameters), parameters) for name in FOUR])
        if decay is not None:
            average = decay * average + (1.0 - decay) * rows[1]
            rows[1] = average / (1.0 - decay ** (step + 1))
        contexts(model, optimizer, losses, [step])
        expected = by_hand(rows, plain, keys)
        gram = taken(optimizer).block_gram
        assert gram is not None
        close(gram, expected, STEPPED, scale=expected.abs().max())
        lengths = expected.diagonal(dim1=-2, dim2=-1).sqrt()
        cosines = taken(optimizer).block_cosines
        assert cosines is not None
        close(cosines, expected / lengths[:, :, None] / lengths[:, None], STEPPED)


def test_a_gradient_step_changes_the_retain_loss_by_minus_the_rate_times_the_g_effect_of_the_layers_that_move() -> None:
    losses, rate = classification(), 1e-6
    for moved in ("0", "2"):
        model = mlp()
        optimizer = make(model)
        before = losses(model, 1, 0)
        joined(model, optimizer, losses, [1])
        record = taken(optimizer)
        assert record.block_gram is not None
        assert record.block_names is not None
        model = mlp()
        gradient = training.gradient(losses(model, 1, 0)["forget"], list(model.parameters()))
        with torch.no_grad():
            for (name, parameter), part in zip(model.named_parameters(), gradient, strict=True):
                assert part is not None
                parameter -= rate * part if layer(name) == moved else 0.0 * part
        change = losses(model, 1, 0)["retain"] - before["retain"]
        effect = record.block_gram[record.block_names.index(moved), 0, 1]
        assert float(change.detach()) == pytest.approx(-rate * float(effect), rel=1e-4)


def test_in_the_metric_the_blocks_are_weighted_as_the_gram_is() -> None:
    model = mlp()
    optimizer, losses = make(model, metric="optimizer"), classification()
    contexts(model, optimizer, losses, range(3))
    parameters = list(model.parameters())
    weights = training.flat([training.preconditioner(optimizer.base, p) for p in parameters], parameters)
    found = losses(model, 3, 0)
    rows = torch.stack([training.flat(training.gradient(found[name], parameters), parameters) for name in TWO])
    expected = by_hand(rows * weights.sqrt(), model, {name: layer(name) for name, _ in model.named_parameters()})
    contexts(model, optimizer, losses, [3])
    gram = taken(optimizer).block_gram
    assert gram is not None
    close(gram, expected, STEPPED, scale=expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
def test_recording_changes_no_bit_of_anything_else(name: str, dtype: torch.dtype) -> None:
    model, plain = mlp(dtype=dtype), mlp(dtype=dtype)
    records = train(model, make(model, **OPTIONS[name]))
    without = train(plain, make(plain, record_scope=None, **OPTIONS[name]))
    assert torch.equal(values(model), values(plain))
    for record, bare in zip(records, without, strict=True):
        assert bare.block_gram is None
        assert bare.block_names is None
        assert bare.block_cosines is None
        for entry in fields(gs.Record):
            if entry.name not in ("block_gram", "block_names"):
                found, expected = getattr(record, entry.name), getattr(bare, entry.name)
                same = torch.equal(found, expected) if isinstance(found, Tensor) else found == expected
                assert same, entry.name


@pytest.mark.parametrize("name", ["plain", "ema", "tensor", "sago"])
def test_it_costs_no_pass_over_the_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    original = _rows.block_gram

    def counted(*arguments: Any, **options: Any) -> Tensor:
        passes.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(_rows, "block_gram", counted)
    model = mlp()
    train(model, make(model, **OPTIONS[name]), steps=3)
    assert len(passes) == 3


def test_what_is_recorded_need_not_be_finer_than_the_scope() -> None:
    model = mlp()
    (first, *_) = train(model, make(model, "global", scope="tensor"))
    assert first.block_names == ("global",)
    assert first.block_gram is not None
    close(first.block_gram[0], first.gram.sum(0), SAME, scale=first.gram.abs().max())
    model = mlp()
    (second, *_) = train(model, make(model, "tensor", scope=layer))
    assert second.block_names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert second.blocks == ("0", "2")


def test_blocks_that_cross_those_of_the_rule() -> None:
    """The rule sees layers, the record weights and biases; both are exact."""
    model, alone = mlp(), mlp()
    kind: Callable[[str], str] = lambda name: name.split(".")[1]  # noqa: E731
    (record, *_) = train(model, make(model, kind, scope=layer))
    (expected, *_) = train(alone, make(alone, None, scope=kind))
    assert record.block_gram is not None
    assert record.block_names == expected.blocks == ("weight", "bias")
    assert torch.equal(record.block_gram, expected.gram)


def test_units_are_unscaled() -> None:
    model, plain = mlp(), mlp()
    found = []
    for scale, network in ((1.0, plain), (1024.0, model)):
        optimizer = make(network, ema_decay=0.5)
        for name, loss in classification()(network, 1, 0).items():
            with optimizer.objective(name):
                (loss * scale).backward()
        found.append(optimizer.combine(scale=scale).block_gram)
    close(found[1], found[0], SAME, scale=found[0].abs().max())


def test_a_layer_without_gradient_is_zero_and_a_nan_is_seen_where_it_is() -> None:
    weights = {name: nn.Parameter(torch.ones(2, dtype=torch.float64)) for name in ("a.w", "b.w", "c.w")}
    optimizer = gs.GradientSurgery(torch.optim.SGD(list(weights.items()), lr=0.1), record_scope=layer)
    with optimizer.objective("retain"):
        (weights["a.w"].sum() + weights["b.w"].sum()).backward()
    with optimizer.objective("forget"):
        (weights["a.w"] * torch.tensor([1.0, torch.nan])).sum().backward()
    record = optimizer.combine()
    assert record.block_gram is not None
    assert record.block_gram[0, 0].isnan().all()
    assert record.block_gram[1:].tolist() == [[[0.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]]
    with pytest.raises(FloatingPointError):
        optimizer.step()


@pytest.mark.parametrize(
    ("record_scope", "match"),
    [(layer, "record_scope: a function .*named_parameters\\(\\)"), ("layer", "record_scope: expected")],
)
def test_a_scope_that_cannot_be_is_refused_at_construction(record_scope: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        gs.GradientSurgery(torch.optim.SGD(mlp().parameters(), lr=0.1), record_scope=record_scope)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_sharded_parameters() -> None:
    workers.run(_sharded)


def _sharded(rank: int) -> None:
    model, plain = workers.sharded(), workers.Scaled()
    options: dict[str, Any] = {"objectives": FOUR, "ema_decay": 0.5}
    optimizer = workers.surgeon(model, record_scope=workers.layer, **options)
    meaning = {"ema_decay": dict.fromkeys(FOUR[1:], 0.5)}
    reference = training.Surgery(plain, BASES["AdamW"](plain.parameters()), FOUR, **meaning)
    keys = {name: workers.layer(name) for name, _ in plain.named_parameters()}
    for step in range(STEPS):
        contexts(model, optimizer, workers.of_rank(rank, FOUR), [step])
        expected = by_hand(reference.step(workers.whole(plain, step, 1, FOUR)).rows, plain, keys)
        record = taken(optimizer)
        assert record.block_gram is not None
        assert record.block_names == tuple(dict.fromkeys(keys.values()))
        close(record.block_gram, expected, STEPPED, scale=expected.abs().max())
    close(workers.gathered(model), values(plain), STEPPED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_does_not_wait_for_the_device() -> None:
    model = mlp(dtype=torch.float32).cuda()
    optimizer = gs.GradientSurgery(
        torch.optim.AdamW(model.named_parameters(), fused=True), ema_decay=0.5, record_scope=layer
    )
    inputs, labels = torch.randn(2, 4, 4, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
    for synchronisation in ("default", "error"):  # the first step allocates
        for name, x in zip(TWO, inputs, strict=True):
            with optimizer.objective(name):
                nn.functional.cross_entropy(model(x), labels).backward()
        torch.cuda.set_sync_debug_mode(synchronisation)
        try:
            record = optimizer.combine()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert record.block_gram is not None
        assert record.block_gram.is_cuda
        optimizer.step()
        optimizer.zero_grad()
