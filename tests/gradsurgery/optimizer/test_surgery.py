"""Steps with surgery against the oracle, and against plain training where surgery must change nothing."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.problems import BASES, FOUR, FRONT_ENDS, TWO, Losses, classification, contexts, joined, mlp, taken, values
from tests.reference import training
from tests.tolerances import STEPPED, STEPPED_FLOAT32, close

STEPS = 8


@dataclass(frozen=True)
class Variant:
    """Options of the optimizer, and the oracle's options with the same meaning (the same names if left out)."""

    base: str = "AdamW"
    objectives: tuple[str, ...] = TWO
    options: dict[str, Any] = field(default_factory=dict)
    meaning: dict[str, Any] = field(default_factory=dict)
    kind: Callable[..., gs.GradientSurgery] = gs.GradientSurgery


def layer(name: str) -> str:
    return name.split(".")[0]


DECAYS = {"retain": 0.9, "style": 0.2}
METRIC: dict[str, Any] = {"options": {"metric": "optimizer"}, "meaning": {"preconditioner": training.preconditioner}}
GUARD: dict[str, Any] = {"options": {"guard": "update"}, "meaning": {"guard": True}}
VARIANTS = {
    "plain": Variant(),
    "SGD": Variant("SGD"),
    "sum": Variant(options={"rule": "sum"}, meaning={"rule": "sum"}),
    "GRU": Variant(kind=gs.GRU, meaning={"ema_decay": {"retain": 0.2}}),
    "GRU class with options": Variant(
        kind=gs.GRU, options={"ema_decay": None, "add": {"retain": 0.5}}, meaning={"add": {"retain": 0.5}}
    ),
    "ema": Variant("momentum", options={"ema_decay": 0.7}, meaning={"ema_decay": {"retain": 0.7}}),
    "several": Variant(objectives=FOUR),
    "several, ema": Variant(
        objectives=FOUR, options={"ema_decay": 0.5}, meaning={"ema_decay": dict.fromkeys(FOUR[1:], 0.5)}
    ),
    "several, ema by name": Variant(objectives=FOUR, options={"ema_decay": DECAYS}, meaning={"ema_decay": DECAYS}),
    "add": Variant(options={"add": {"retain": 0.5}}, meaning={"add": {"retain": 0.5}}),
    "add, ema": Variant(
        objectives=FOUR,
        options={"add": {"retain": 0.5, "utility": 2.0}, "ema_decay": DECAYS},
        meaning={"add": {"retain": 0.5, "utility": 2.0}, "ema_decay": DECAYS},
    ),
    "max_norm": Variant("momentum", options={"max_norm": 0.3}, meaning={"max_norm": 0.3}),
    "max_norm, add, ema": Variant(
        "momentum",
        options={"max_norm": 0.3, "add": {"retain": 1.0}, "ema_decay": 0.5},
        meaning={"max_norm": 0.3, "add": {"retain": 1.0}, "ema_decay": {"retain": 0.5}},
    ),
    "max_norm, add": Variant(
        "momentum",
        options={"max_norm": 0.3, "add": {"retain": 1.0}},
        meaning={"max_norm": 0.3, "add": {"retain": 1.0}},
    ),
    "tensor": Variant(options={"scope": "tensor"}, meaning={"block": lambda name: name}),
    "tensor, several, ema, max_norm": Variant(
        objectives=FOUR,
        options={"scope": "tensor", "ema_decay": DECAYS, "max_norm": 0.3},
        meaning={"block": lambda name: name, "ema_decay": DECAYS, "max_norm": 0.3},
    ),
    "callable": Variant(options={"scope": layer}, meaning={"block": layer}),
    "Adam metric": Variant("Adam", **METRIC),
    "RMSprop metric": Variant("RMSprop", **METRIC),
    "Adagrad metric": Variant("Adagrad", **METRIC),
    "Adamax metric": Variant("Adamax", **METRIC),
    "metric, several, max_norm, tensor": Variant(
        "AdamW",
        FOUR,
        options={"metric": "optimizer", "max_norm": 0.3, "scope": "tensor"},
        meaning={"preconditioner": training.preconditioner, "max_norm": 0.3, "block": lambda name: name},
    ),
    "guard": Variant("momentum", **GUARD),
    "guard, several, ema": Variant(
        "AdamW", FOUR, options={"guard": "update", "ema_decay": DECAYS}, meaning={"guard": True, "ema_decay": DECAYS}
    ),
    "guard, tensor": Variant(
        "Adagrad", options={"guard": "update", "scope": "tensor"}, meaning={"guard": True, "block": lambda n: n}
    ),
    "guard measures": Variant(options={"guard": "measure"}),
}


def make(variant: Variant, model: nn.Module, **further: Any) -> gs.GradientSurgery:
    options: dict[str, Any] = {
        "objectives": variant.objectives,
        "ema_dtype": torch.float64,
        **variant.options,
        **further,
    }
    return variant.kind(BASES[variant.base](model.named_parameters()), **options)


def oracle(variant: Variant, model: nn.Module) -> training.Surgery:
    return training.Surgery(model, BASES[variant.base](model.parameters()), variant.objectives, **variant.meaning)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_step_is_the_oracles(name: str, front_end: str, micro_batches: int) -> None:
    variant = VARIANTS[name]
    losses = classification(variant.objectives)
    model, plain = mlp(), mlp()
    optimizer = make(variant, model, accumulate=front_end == "join" and micro_batches > 1)
    reference = oracle(variant, plain)
    conflicts = []

    def compare(step: int, record: gs.Record) -> None:
        expected = reference.step([losses(plain, step, micro) for micro in range(micro_batches)])
        gram = expected.gram[0] if record.blocks is None else expected.gram
        close(values(model), values(plain), STEPPED)
        close(record.gram, gram, STEPPED, scale=gram.abs().max())
        assert record.conflict == expected.conflict
        conflicts.append(record.conflict)

    FRONT_ENDS[front_end](model, optimizer, losses, range(STEPS), micro_batches=micro_batches, after_step=compare)
    assert any(conflicts), "a test without a conflict says nothing about the rule"


@pytest.mark.parametrize("name", ["ema", "several, ema", "tensor, several, ema, max_norm", "guard, several, ema"])
def test_float32_training_stays_near_the_float64_oracle(name: str) -> None:
    variant, dtype = VARIANTS[name], torch.float32
    losses = classification(variant.objectives)
    model, plain = mlp(dtype=dtype), mlp(dtype=dtype)
    plain.double()
    reference = oracle(variant, plain)
    contexts(model, make(variant, model, ema_dtype=dtype), losses, range(STEPS))
    for step in range(STEPS):
        rounded = [(name, loss) for name, loss in losses(plain, step, 0).items()]
        reference.step([dict(rounded)])
    close(values(model).double(), values(plain), STEPPED_FLOAT32)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("base", BASES)
def test_sum_is_plain_training_bit_for_bit(base: str, front_end: str) -> None:
    losses = classification(FOUR)
    model, plain = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    optimizer = gs.GradientSurgery(BASES[base](model.parameters()), rule=gs.rules.sum, objectives=FOUR)
    reference = BASES[base](plain.parameters())
    FRONT_ENDS[front_end](model, optimizer, losses, range(STEPS))
    for step in range(STEPS):
        for loss in losses(plain, step, 0).values():
            loss.backward()
        reference.step()
        reference.zero_grad()
    assert torch.equal(values(model), values(plain))


def test_order_of_objectives_and_of_contexts_does_not_matter() -> None:
    losses = classification(FOUR)
    trained = []
    for order in (FOUR, FOUR[::-1]):
        model = mlp()
        optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=0.02), objectives=FOUR)
        for step in range(STEPS):
            found = losses(model, step, 0)
            for name in order:
                with optimizer.objective(name):
                    found[name].backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(values(model))
    assert torch.equal(*trained)


def test_several_contexts_of_one_objective_add_up() -> None:
    losses = classification()
    trained = []
    for passes in (1, 2):
        model = mlp()
        optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(STEPS):
            for name, loss in losses(model, step, 0).items():
                for index in range(passes):
                    with optimizer.objective(name):
                        (loss / passes).backward(retain_graph=index + 1 < passes)
            optimizer.step()
            optimizer.zero_grad()
        trained.append(values(model))
    close(trained[1], trained[0], STEPPED)


def test_combine_writes_what_step_then_uses_and_is_idempotent() -> None:
    losses = classification()
    model, plain = mlp(), mlp()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    for name, loss in losses(model, 1, 0).items():
        with optimizer.objective(name):
            loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    record = optimizer.combine()
    update = (
        training.Surgery(plain, torch.optim.SGD(plain.parameters(), lr=0.1), TWO).step([losses(plain, 1, 0)]).update
    )
    found = training.flat([p.grad for p in model.parameters()], list(model.parameters()))
    close(found, update, STEPPED)
    assert optimizer.combine() is record
    assert not record.applied
    close(training.flat([p.grad for p in model.parameters()], list(model.parameters())), found, STEPPED)
    optimizer.step()
    close(values(model), values(plain), STEPPED)


def test_what_is_done_to_grad_between_combine_and_step_counts() -> None:
    losses, norm = classification(), 0.1
    model, clipped = mlp(), mlp()
    by_option = gs.GradientSurgery(torch.optim.SGD(clipped.parameters(), lr=0.1), max_norm=norm)
    contexts(clipped, by_option, losses, range(STEPS))
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(STEPS):
        optimizer.join(**losses(model, step, 0)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        optimizer.zero_grad()
    close(values(model), values(clipped), STEPPED)


# The record ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["several, ema", "add", "max_norm, add", "tensor", "callable", "guard, several, ema", "guard measures"]
)
def test_the_record_tells_what_happened(name: str) -> None:
    variant = VARIANTS[name]
    losses = classification(variant.objectives)
    model, plain = mlp(), mlp()
    optimizer, reference = make(variant, model), oracle(variant, plain)

    def compare(step: int, record: gs.Record) -> None:
        expected = reference.step([losses(plain, step, 0)])
        lengths = expected.rows.norm(dim=1)
        assert record.objectives == variant.objectives
        assert record.gram.dtype == torch.float64
        close(record.norms.square().reshape(-1, len(lengths)).sum(0).sqrt(), lengths, STEPPED)
        if record.blocks is None:
            cosines = expected.rows @ expected.rows.T / lengths / lengths[:, None]
            close(record.cosines, cosines, STEPPED)
            assert record.coefficients.shape == lengths.shape
            if not optimizer._ema.decays or "add" not in variant.options:
                close(record.coefficients @ expected.rows, expected.update, STEPPED)
        else:
            assert record.gram.shape == (len(record.blocks), len(lengths), len(lengths))
            assert record.coefficients.shape == record.gram.shape[:-1]
        close(record.predicted_change, -expected.rows @ expected.update, STEPPED)
        close(record.update_norm, expected.update.norm(), STEPPED)
        if optimizer.guard is None:
            assert record.actual_change is None
        else:
            assert record.actual_change is not None
            assert record.unguarded_change is not None
            close(record.actual_change, expected.rows[1:] @ expected.change, STEPPED)
            close(record.unguarded_change, expected.rows[1:] @ expected.made, STEPPED)

    contexts(model, optimizer, losses, range(STEPS), after_step=compare)


def test_records_name_the_blocks() -> None:
    model = mlp()
    by_layer = gs.GradientSurgery(torch.optim.SGD(model.named_parameters(), lr=0.1), scope=layer)
    by_tensor = gs.GradientSurgery(torch.optim.SGD(model.named_parameters(), lr=0.1), scope="tensor")
    unnamed = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), scope="tensor")
    for optimizer, blocks in (
        (by_layer, ("0", "2")),
        (by_tensor, ("0.weight", "0.bias", "2.weight", "2.bias")),
        (unnamed, ("0", "1", "2", "3")),
    ):
        assert optimizer.record is None
        contexts(model, optimizer, classification(), [0])
        assert taken(optimizer).blocks == blocks


def test_a_step_without_conflict_leaves_the_forget_gradient_alone() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = gs.GradientSurgery(torch.optim.SGD([weight], lr=1.0))
    optimizer.join(forget=weight @ torch.tensor([1.0, 1.0]), retain=weight @ torch.tensor([2.0, -1.0])).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1.0, 1.0]
    record = optimizer.record
    assert record is not None
    assert not record.conflict
    assert record.coefficients.tolist() == [1.0, 0.0]
    assert record.gram.tolist() == [[2.0, 1.0], [1.0, 5.0]]


# Parameters of every kind --------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """A trunk, a head for each of two objectives, a head for none, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.trunk = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first, self.second, self.neither = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(self.frozen(inputs)).tanh()
        return self.first(hidden), self.second(hidden)


def branch_losses(model: nn.Module, step: int, micro: int) -> dict[str, Tensor]:
    inputs = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return {"forget": -model(inputs[0])[0].square().mean(), "retain": model(inputs[1])[1].sub(1.0).square().mean()}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("name", ["plain", "GRU", "guard", "tensor", "Adam metric"])
def test_frozen_and_unused_parameters(name: str, front_end: str) -> None:
    variant = VARIANTS[name]
    model, plain = Branches(), Branches()
    start = values(model.neither), values(model.frozen)
    optimizer, reference = make(variant, model), oracle(variant, plain)
    FRONT_ENDS[front_end](model, optimizer, branch_losses, range(STEPS))
    for step in range(STEPS):
        reference.step([branch_losses(plain, step, 0)])
    close(values(model), values(plain), STEPPED)
    assert torch.equal(values(model.neither), start[0]), "weight decay must not touch what no objective reached"
    assert torch.equal(values(model.frozen), start[1])
    assert not torch.equal(values(model.first), values(Branches().first))
    assert not torch.equal(values(model.second), values(Branches().second)) or name == "plain"


def test_a_parameter_gets_a_gradient_only_where_an_objective_reached_it() -> None:
    model = Branches()
    optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=0.02))
    optimizer.join(**branch_losses(model, 0, 0)).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"frozen.weight", "frozen.bias", "neither.weight", "neither.bias"}


@pytest.mark.parametrize("name", ["several, ema by name", "guard, several, ema"])
def test_the_average_of_a_layer_that_is_frozen_mid_run_takes_no_part(name: str) -> None:
    """The step cannot move that layer, so its average must not influence the projection of the others."""
    variant = VARIANTS[name]
    losses = classification(variant.objectives)
    model, plain = mlp(), mlp()
    optimizer, reference = make(variant, model), oracle(variant, plain)
    for step in range(STEPS):
        for layers in (model, plain):
            layers[0].requires_grad_(step < 3 or step > 5)
        contexts(model, optimizer, losses, [step])
        expected = reference.step([losses(plain, step, 0)])
        close(values(model), values(plain), STEPPED)
        close(taken(optimizer).gram, expected.gram[0], STEPPED)


def test_an_average_lives_on_where_this_steps_row_has_no_gradient() -> None:
    """The retain loss uses the head in step 0 only, the forget loss always: the head's average decays and does not vanish."""
    weight = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    other = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = gs.GradientSurgery(
        torch.optim.SGD([weight, other], lr=0.0, momentum=0.0), ema_decay=0.5, ema_dtype=torch.float64
    )
    for step in range(3):
        retain = weight[0] + other[0] if step == 0 else other[0] * 1.0
        optimizer.join(forget=weight[1] - weight[0], retain=retain).backward()
        optimizer.step()
        optimizer.zero_grad()
        corrected = 0.5**step * 0.5 / (1.0 - 0.5 ** (step + 1))
        found = taken(optimizer).gram
        close(found[0, 1], torch.tensor(-corrected, dtype=torch.float64), STEPPED)


class Tied(nn.Module):
    """A language model of one token whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(tokens)).tanh())


def token_losses(model: nn.Module, step: int, micro: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(step))
    cross_entropy = nn.functional.cross_entropy
    return {"forget": -cross_entropy(model(tokens[0]), tokens[1]), "retain": cross_entropy(model(tokens[2]), tokens[3])}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("name", ["GRU", "tensor", "guard"])
def test_tied_weights(name: str, front_end: str) -> None:
    variant = VARIANTS[name]
    model, plain = Tied(), Tied()
    optimizer, reference = make(variant, model), oracle(variant, plain)
    FRONT_ENDS[front_end](model, optimizer, token_losses, range(STEPS))
    for step in range(STEPS):
        reference.step([token_losses(plain, step, 0)])
    close(values(model), values(plain), STEPPED)
    assert model.head.weight is model.embedding.weight


class Checkpointed(nn.Module):
    """The layers of a model, each recomputed in the backward pass."""

    def __init__(self, inner: nn.Sequential, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.requires_grad_()
        for module in self.inner:
            hidden = torch.utils.checkpoint.checkpoint(module, hidden, use_reentrant=self.reentrant)
        return hidden


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("wrapper", ["reentrant", "not reentrant", "compiled"])
def test_checkpointed_and_compiled_models_take_the_same_steps(wrapper: str, front_end: str) -> None:
    losses = classification()
    model, plain = mlp(), mlp()
    # The compiler must see the optimizer neither in the forward nor in the backward pass.
    wrapped: nn.Module = (
        torch.compile(model, backend="aot_eager")
        if wrapper == "compiled"
        else Checkpointed(model, reentrant=wrapper == "reentrant")
    )
    variant = VARIANTS["GRU"]
    FRONT_ENDS[front_end](wrapped, make(variant, model), losses, range(4))
    reference = oracle(variant, plain)
    for step in range(4):
        reference.step([losses(plain, step, 0)])
    close(values(model), values(plain), STEPPED)


def shared_forward(model: nn.Module, step: int, micro: int) -> dict[str, Tensor]:
    """Both losses from one forward pass, as with packed batches."""
    outputs = model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
    return {"forget": -outputs[:4].square().mean(), "retain": outputs[4:].sub(1.0).square().mean()}


def test_losses_of_one_forward_pass_need_retain_graph() -> None:
    model, plain = mlp(), mlp()
    variant = VARIANTS["GRU"]
    optimizer, reference = make(variant, model), oracle(variant, plain)
    for step in range(STEPS):
        if step % 2 == 0:
            optimizer.join(retain_graph=True, **shared_forward(model, step, 0)).backward()
        else:
            losses = shared_forward(model, step, 0)
            with optimizer.objective("retain"):
                losses["retain"].backward(retain_graph=True)
            with optimizer.objective("forget"):
                losses["forget"].backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step([shared_forward(plain, step, 0)])
    close(values(model), values(plain), STEPPED)
    loss = optimizer.join(**shared_forward(model, 0, 0))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    optimizer.join(**classification()(model, 0, 0)).backward()  # and the optimizer is usable


def test_retain_graph_frees_the_graph_with_the_last_pass() -> None:
    """retain_graph keeps the graph between the inner passes, and not beyond the last."""
    model = mlp()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    losses = shared_forward(model, 0, 0)
    optimizer.join(retain_graph=True, **losses).backward()
    with pytest.raises(RuntimeError, match="second time"):
        losses["forget"].backward()


# Loops of every kind -------------------------------------------------------------------------------------------------------------


def test_parameter_groups_with_their_own_learning_rates_and_added_in_mid_run() -> None:
    losses = classification()
    model, plain = mlp(), mlp()

    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        return [{"params": list(model[0].parameters()), "lr": 0.05}]

    optimizer = gs.GradientSurgery(
        torch.optim.SGD(groups(model), lr=0.1, momentum=0.9), ema_decay=0.5, ema_dtype=torch.float64
    )
    reference = training.Surgery(
        plain, torch.optim.SGD(groups(plain), lr=0.1, momentum=0.9), TWO, ema_decay={"retain": 0.5}
    )
    for part in (model[2], plain[2]):
        part.requires_grad_(False)
    for step in range(STEPS):
        if step == 4:
            model[2].requires_grad_()
            plain[2].requires_grad_()
            optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.01})
            reference.base.add_param_group({"params": list(plain[2].parameters()), "lr": 0.01})
        joined(model, optimizer, losses, [step])
        reference.step([losses(plain, step, 0)])
        close(values(model), values(plain), STEPPED)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]


@pytest.mark.parametrize("zero", ["optimizer", "to zero", "model", "model to zero", "never", "before"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_every_way_to_zero_gradients_gives_the_same_steps(front_end: str, zero: str) -> None:
    losses = classification()
    model, plain = mlp(), mlp()
    optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=0.02))
    for step in range(STEPS):
        if zero == "before":
            optimizer.zero_grad()
        if front_end == "join":
            optimizer.join(**losses(model, step, 0)).backward()
        else:
            for name, loss in losses(model, step, 0).items():
                with optimizer.objective(name):
                    loss.backward()
        optimizer.step()
        match zero:
            case "optimizer":
                optimizer.zero_grad()
            case "to zero":
                optimizer.zero_grad(set_to_none=False)
                assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
            case "model":
                model.zero_grad()
            case "model to zero":
                model.zero_grad(set_to_none=False)
            case _:
                pass
    contexts(plain, gs.GRU(torch.optim.AdamW(plain.parameters(), lr=0.02)), losses, range(STEPS))
    assert torch.equal(values(model), values(plain))


def test_a_closure_runs_once_with_gradients_and_its_value_comes_back() -> None:
    losses = classification()
    model, plain = mlp(), mlp()
    optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=0.02))
    calls = []

    def closure(step: int) -> float:
        optimizer.zero_grad()
        loss = optimizer.join(**losses(model, step, 0))
        loss.backward()
        calls.append(step)
        return loss.item()

    with torch.no_grad():
        returned = [optimizer.step(lambda step=step: closure(step)) for step in range(STEPS)]
    assert calls == list(range(STEPS))
    contexts(plain, gs.GRU(torch.optim.AdamW(plain.parameters(), lr=0.02)), losses, range(STEPS))
    assert torch.equal(values(model), values(plain))
    assert len(set(returned)) == STEPS


def test_joins_value_is_the_sum_of_the_losses() -> None:
    model = mlp()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    losses = classification()(model, 0, 0)
    total = losses["forget"].item() + losses["retain"].item()
    joint = optimizer.join(**{name: loss.reshape(1) for name, loss in losses.items()})
    assert joint.shape == ()
    assert joint.dtype == torch.float64
    assert joint.item() == total
    low = gs.GradientSurgery(torch.optim.SGD(mlp(dtype=torch.bfloat16).parameters(), lr=0.1))
    assert low.join(**classification()(mlp(dtype=torch.bfloat16), 0, 0)).dtype == torch.float32
    with torch.no_grad():
        validation = optimizer.join(**classification()(model, 0, 0))
    assert not validation.requires_grad
    assert validation.item() == joint.item()


def test_a_step_with_one_objective_is_a_plain_step() -> None:
    model, plain = mlp(), mlp()
    optimizer = gs.GradientSurgery(torch.optim.AdamW(model.parameters(), lr=0.02), objectives=("retain",))
    losses: Losses = lambda model, step, micro: {"retain": classification()(model, step, micro)["retain"]}  # noqa: E731
    contexts(model, optimizer, losses, range(STEPS))
    reference = torch.optim.AdamW(plain.parameters(), lr=0.02)
    for step in range(STEPS):
        losses(plain, step, 0)["retain"].backward()
        reference.step()
        reference.zero_grad()
    assert torch.equal(values(model), values(plain))
    assert not taken(optimizer).conflict


# Memory --------------------------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """One parameter of a size that nothing else has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(977, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weight @ inputs


def wide_losses(objectives: Sequence[str]) -> Losses:
    return lambda model, step, micro: {
        name: (-1.0) ** (k + 1) * model(torch.full((3,), 1.0 + k)).square().mean() for k, name in enumerate(objectives)
    }


def alive() -> int:
    """Tensors of the size of `Wide`'s parameter, the parameter among them."""
    found = {o.data_ptr() for o in gc.get_objects() if issubclass(type(o), Tensor) and o.numel() == 977 * 3}
    return len(found)


@pytest.mark.parametrize(
    ("options", "captured", "combined", "stepped", "zeroed"),
    [
        # Tensors of the parameter's size: the parameter, two rows; combined in place, the retain row freed; .grad; nothing.
        ({}, 3, 2, 2, 1),
        # The average is made of the retain row, which lives on.
        ({"ema_decay": 0.5}, 3, 3, 3, 2),
        ({"guard": "update"}, 3, 3, 2, 1),
        ({"accumulate": True}, 3, 4, 2, 1),
    ],
)
def test_rows_are_freed_as_soon_as_nobody_reads_them(
    options: dict[str, Any], captured: int, combined: int, stepped: int, zeroed: int
) -> None:
    model = Wide()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    losses = wide_losses(TWO)
    gc.collect()
    assert alive() == 1
    counts = []
    for name, loss in losses(model, 0, 0).items():
        with optimizer.objective(name):
            loss.backward()
    del loss
    counts.append(alive())
    optimizer.combine()
    counts.append(alive())
    optimizer.step()
    counts.append(alive())
    optimizer.zero_grad()
    counts.append(alive())
    assert counts == [captured, combined, stepped, zeroed]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 1),
        ({"ema_decay": 0.5}, 2),
        ({"guard": "update"}, 2),
        ({"accumulate": True, "ema_decay": 0.5}, 3),
        ({"objectives": FOUR}, 3),
    ],
)
def test_memory_estimate_counts_what_surgery_adds(options: dict[str, Any], rows: int) -> None:
    model = Wide()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    assert optimizer.memory_estimate() == rows * 977 * 3 * 4


def test_memory_estimate_knows_types_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).bfloat16()
    model[0].requires_grad_(False)
    optimizer = gs.GRU(torch.optim.SGD(model.parameters(), lr=0.1))
    assert optimizer.memory_estimate() == 16 * 2 + 16 * 4
    halved = gs.GRU(torch.optim.SGD(model.parameters(), lr=0.1), ema_dtype=torch.bfloat16)
    assert halved.memory_estimate() == 16 * 2 + 16 * 2


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5}, {"ema_decay": 0.5, "accumulate": True}], ids=str)
def test_a_backward_pass_with_create_graph_leaves_no_graph_in_rows_and_averages(options: dict[str, Any]) -> None:
    model, plain = mlp(), mlp()
    optimizer, reference = (
        gs.GradientSurgery(torch.optim.SGD(each.parameters(), lr=0.1), **options) for each in (model, plain)
    )
    for step in range(2):
        for each, wrapper, create in ((model, optimizer, True), (plain, reference, False)):
            for name in ("retain", "forget"):
                with wrapper.objective(name):
                    classification()(each, step, 0)[name].backward(create_graph=create)
            assert not any(t.requires_grad for row in wrapper._window.slots.values() for t in row if t is not None)
            wrapper.step()
            wrapper.zero_grad()
    assert torch.equal(values(model), values(plain))
    copy.deepcopy(optimizer)
