"""What the optimizer refuses: it says what was found and what to do, changes nothing, and works on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.problems import FOUR, FRONT_ENDS, assert_same, classification, contexts, mlp, snapshot, values

LOSSES = classification()


def trained(**options: Any) -> tuple[nn.Sequential, gs.GradientSurgery]:
    """A model and an optimizer after two steps, so that there are moments and averages to spoil."""
    model = mlp()
    optimizer = gs.GRU(torch.optim.AdamW(model.named_parameters(), lr=0.02), **options)
    contexts(model, optimizer, LOSSES, range(2))
    return model, optimizer


pytestmark = [
    pytest.mark.refuses("DeepSpeed", "it reduces, frees and steps gradients by itself: train with DDP or FSDP2"),
    pytest.mark.refuses("Optimizers that need a closure (LBFGS)", "use a first-order optimizer"),
    pytest.mark.refuses("Sparse gradients", "build the embedding with sparse=False"),
    pytest.mark.refuses("Optimizer steps in backward hooks", "surgery needs all rows before any step: remove the hook"),
]


def works_on(model: nn.Sequential, optimizer: gs.GradientSurgery) -> None:
    """The next steps are those of a run in which nothing was refused."""
    other, reference = trained()
    contexts(model, optimizer, LOSSES, range(2, 4))
    contexts(other, reference, LOSSES, range(2, 4))
    assert_same(snapshot(model, optimizer), snapshot(other, reference))


def capture(optimizer: gs.GradientSurgery, model: nn.Module, *names: str, losses: Any = LOSSES) -> None:
    for name in names:
        with optimizer.objective(name):
            losses(model, 2, 0)[name].backward()


# The constructor -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: torch.optim.AdamW, "expected a constructed torch.optim.Optimizer.*found AdamW"),
        (lambda p: "AdamW", "expected a constructed torch.optim.Optimizer.*found str"),
        (lambda p: p, "expected a constructed torch.optim.Optimizer"),
        (lambda p: torch.optim.LBFGS(p), "found LBFGS.*closure.*use a first-order optimizer"),
        (lambda p: gs.GRU(torch.optim.SGD(p)), "expected a constructed torch.optim.Optimizer.*found GRU"),
        (lambda p: torch.optim.lr_scheduler.StepLR(torch.optim.SGD(p), 1), "found StepLR"),
    ],
)
def test_a_base_that_cannot_be_stepped(make: Callable[[list[nn.Parameter]], Any], sentence: str) -> None:
    base = make(list(mlp().parameters()))
    with pytest.raises(TypeError, match=sentence):
        gs.GradientSurgery(base)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"objectives": ()}, "objectives: expected distinct names"),
        ({"objectives": "forget"}, "objectives: expected distinct names.*'forget'"),
        ({"objectives": ("forget", "forget")}, "objectives: expected distinct names"),
        ({"objectives": (0, 1)}, r"objectives: expected strings.*found \[0, 1\]"),
        ({"objectives": ("forget", "scale")}, r"no options of join \(features, .*found \['scale'\]; choose other"),
        ({"rule": "grew"}, "rule: expected one of sum, .*gru.*found 'grew'"),
        ({"rule": None}, "rule: expected a function"),
        ({"rule": torch.eye(2)}, "rule: expected a function"),
        ({"metric": "cosine"}, "metric: expected 'euclidean' or 'optimizer', found 'cosine'"),
        ({"guard": "gradient"}, "guard: expected None, 'update' or 'measure', found 'gradient'"),
        ({"guard": True}, "guard: expected"),
        ({"max_norm": 0.0}, "max_norm: expected a positive number, found 0.0"),
        ({"max_norm": -1.0}, "max_norm: expected a positive number"),
        ({"max_norm": float("nan")}, "max_norm: expected a positive number"),
        ({"ema_dtype": torch.int32}, "ema_dtype: expected a floating-point type"),
        ({"ema_decay": 1.0}, r"ema_decay: expected the old value's weight in \[0, 1\), found 1.0 for 'retain'"),
        ({"ema_decay": -0.1}, "ema_decay: expected"),
        ({"ema_decay": float("nan")}, "ema_decay: expected"),
        ({"ema_decay": {"forget": 0.5}}, r"ema_decay: expected protected objectives, \['retain'\], found \['forget'\]"),
        ({"ema_decay": {"memory": 0.5}}, "ema_decay: expected protected objectives"),
        ({"add": {"forget": 1.0}}, r"add: expected protected objectives, \['retain'\], found \['forget'\]"),
        ({"add": {"memory": 1.0}}, "add: expected protected objectives"),
        ({"add": {"retain": float("nan")}}, r"add: expected finite numbers, found \{'retain': nan\}"),
        ({"add": {"retain": "1"}}, "add: expected finite numbers, found"),
        ({"add": {"retain": None}}, "add: expected finite numbers, found"),
        ({"scope": "layer"}, "scope: expected 'global', 'tensor' or a function of a parameter's name, found 'layer'"),
        ({"scope": lambda name: name}, "build it from model.named_parameters()"),
    ],
)
def test_options_outside_their_domain(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        gs.GradientSurgery(torch.optim.AdamW(mlp().parameters()), **options)


@pytest.mark.parametrize("base", [torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Rprop])
def test_the_metric_of_an_optimizer_without_a_diagonal(base: Callable[..., torch.optim.Optimizer]) -> None:
    with pytest.raises(ValueError, match=r"metric='optimizer': expected a base whose state holds a second moment"):
        gs.GradientSurgery(base(mlp().parameters()), metric="optimizer")


@pytest.mark.parametrize("lacks", ["step", "betas"])
def test_the_metric_of_a_state_that_is_adams_in_name_alone(lacks: str) -> None:
    """As that of Transformers' Adafactor and of schedule-free optimizers."""

    class Named(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1, **({} if lacks == "betas" else {"betas": (0.9, 0.99)})})

        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                count = {} if lacks == "step" else {"step": torch.tensor(1.0)}
                self.state[parameter].update({"exp_avg_sq": torch.ones_like(parameter), **count})

    model = mlp()
    optimizer = gs.GradientSurgery(Named(model.parameters()), metric="optimizer")
    contexts(model, optimizer, LOSSES, [0])
    with pytest.raises(RuntimeError, match=r"metric='optimizer': expected exp_avg_sq with Adam's step and betas"):
        contexts(model, optimizer, LOSSES, [1])


def test_the_metric_of_centered_rmsprop() -> None:
    with pytest.raises(ValueError, match=r"metric='optimizer'"):
        gs.GradientSurgery(torch.optim.RMSprop(mlp().parameters(), centered=True), metric="optimizer")


def test_rules_by_name_and_by_function_are_one() -> None:
    trained_values = []
    for rule in ("pcgrad", gs.rules.pcgrad):
        model = mlp()
        contexts(model, gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), rule), LOSSES, range(3))
        trained_values.append(values(model))
    assert torch.equal(*trained_values)


@pytest.mark.parametrize("attribute", ["ds_id", "_hp_mapping"])
def test_parameters_that_deepspeed_owns(attribute: str) -> None:
    model = mlp()
    setattr(model[0].weight, attribute, 1)
    with pytest.raises(RuntimeError, match=r"found DeepSpeed's.*train with DDP or FSDP2"):
        gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))


# Contexts ------------------------------------------------------------------------------------------------------------------------


def enter(optimizer: gs.GradientSurgery, name: str) -> None:
    with optimizer.objective(name):
        raise AssertionError("the context was entered")


def test_an_unknown_objective() -> None:
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"objective: expected one of \['forget', 'retain'\], found 'memory'"):
        enter(optimizer, "memory")
    assert_same(snapshot(model, optimizer), before)
    works_on(model, optimizer)


@pytest.mark.parametrize("call", ["combine", "step"])
def test_a_missing_objective(call: str) -> None:
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    capture(optimizer, model, "retain")
    with pytest.raises(RuntimeError, match=r"found none for \['forget'\]; run it inside optimizer.objective\(name\)"):
        getattr(optimizer, call)()
    assert_same(snapshot(model, optimizer), before)
    capture(optimizer, model, "forget")  # the missing objective can still be run
    optimizer.step()
    optimizer.zero_grad()
    other, reference = trained()
    contexts(other, reference, LOSSES, [2])
    assert_same(snapshot(model, optimizer), snapshot(other, reference))


@pytest.mark.parametrize("zero", [True, False])
def test_a_step_without_any_objective(zero: bool) -> None:
    model, optimizer = trained()
    optimizer.zero_grad(set_to_none=zero)
    before = snapshot(model, optimizer)
    with pytest.raises(
        RuntimeError, match=r"step: expected a backward pass for each.*or call backward.. on optimizer.join"
    ):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"combine: .*found none for \['forget', 'retain'\]"):
        optimizer.combine()
    assert_same(snapshot(model, optimizer), before)
    optimizer.zero_grad()
    works_on(model, optimizer)


def test_a_second_step_with_the_same_rows() -> None:
    model, optimizer = trained()
    capture(optimizer, model, "retain", "forget")
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="step: expected a backward pass for each"):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)


def test_a_step_without_any_objective_passes_only_while_every_learning_rate_is_0() -> None:
    model = mlp()
    optimizer = gs.GRU(
        torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}])
    )
    with pytest.raises(RuntimeError, match="step: expected a backward pass"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = torch.tensor(0.0)
    before = values(model)
    optimizer.step()
    assert torch.equal(values(model), before)


class WithoutRate(torch.optim.Optimizer):
    """An optimizer that chooses its learning rate itself, like Hugging Face's Adafactor."""

    def __init__(self, parameters: Any, defaults: dict[str, Any]) -> None:
        super().__init__(parameters, defaults)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise AssertionError("stepped without gradients")


@pytest.mark.parametrize("defaults", [{}, {"lr": None}])
def test_a_base_without_a_learning_rate_is_not_mistaken_for_one_at_0(defaults: dict[str, Any]) -> None:
    optimizer = gs.GradientSurgery(WithoutRate(mlp().parameters(), defaults))
    with pytest.raises(RuntimeError, match="step: expected a backward pass for each"):
        optimizer.step()


def test_nested_objectives() -> None:
    model, optimizer = trained()
    before = snapshot(model, optimizer)

    def nested() -> None:
        with optimizer.objective("retain"):
            LOSSES(model, 2, 0)["retain"].backward()
            enter(optimizer, "forget")

    with pytest.raises(
        RuntimeError, match="objective 'forget': expected to be entered outside any other, found inside 'retain'"
    ):
        nested()
    assert_same(snapshot(model, optimizer), before)
    works_on(model, optimizer)


@pytest.mark.parametrize("call", ["step", "zero_grad", "combine"])
@pytest.mark.parametrize("when", ["first", "last"])
def test_a_step_that_ends_inside_an_objective(call: str, when: str) -> None:
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    if when == "last":
        capture(optimizer, model, "retain", "forget")

    def inside() -> None:
        with optimizer.objective("forget"):
            LOSSES(model, 2, 0)["forget"].backward()
            getattr(optimizer, call)()

    with pytest.raises(
        RuntimeError, match=f"{call}: expected to be called outside of objectives, found it inside 'forg"
    ):
        inside()
    assert_same(snapshot(model, optimizer), before)
    works_on(model, optimizer)


def test_a_join_inside_a_context() -> None:
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="expected to be entered outside any other"), optimizer.objective("retain"):
        optimizer.join(**LOSSES(model, 2, 0)).backward()
    assert_same(snapshot(model, optimizer), before)
    works_on(model, optimizer)


def test_a_gradient_that_no_objective_wrote() -> None:
    model, optimizer = trained()
    LOSSES(model, 7, 0)["retain"].backward()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"expected every .grad to be None.*call zero_grad()"):
        enter(optimizer, "retain")
    assert_same(snapshot(model, optimizer), before)
    optimizer.zero_grad()
    works_on(model, optimizer)


@pytest.mark.parametrize("call", ["combine", "step"])
def test_a_gradient_that_no_objective_wrote_after_the_last_objective(call: str) -> None:
    """The update would overwrite it. An example is a penalty's backward pass outside every context."""
    model, optimizer = trained()
    capture(optimizer, model, "retain", "forget")
    LOSSES(model, 7, 0)["retain"].backward()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"expected every .grad to be None.*call zero_grad()"):
        getattr(optimizer, call)()
    assert_same(snapshot(model, optimizer), before)
    optimizer.zero_grad()
    works_on(model, optimizer)


def test_an_objective_after_combine_without_accumulate() -> None:
    model, optimizer = trained()
    capture(optimizer, model, "retain", "forget")
    optimizer.combine()
    before = snapshot(model, optimizer)
    with pytest.raises(
        RuntimeError, match=r"entered after the rows were combined and before step.*pass accumulate=True"
    ):
        enter(optimizer, "retain")
    assert_same(snapshot(model, optimizer), before)
    optimizer.step()
    optimizer.zero_grad()
    other, reference = trained()
    contexts(other, reference, LOSSES, [2])
    assert_same(snapshot(model, optimizer), snapshot(other, reference))


def test_a_second_join_without_accumulate() -> None:
    model, optimizer = trained()
    optimizer.join(**LOSSES(model, 2, 0)).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="pass accumulate=True"):
        optimizer.join(**LOSSES(model, 2, 1)).backward()
    assert_same(snapshot(model, optimizer), before)
    optimizer.zero_grad()
    works_on(model, optimizer)


@pytest.mark.parametrize("what", ["nothing", "a loss of no parameter", "zero_grad after backward"])
def test_an_empty_objective(what: str) -> None:
    model, optimizer = trained()
    before = snapshot(model, optimizer)

    def empty() -> None:
        with optimizer.objective("retain"):
            if what == "a loss of no parameter":
                torch.zeros((), requires_grad=True).mul(2.0).backward()
            elif what == "zero_grad after backward":
                LOSSES(model, 2, 0)["retain"].backward()
                model.zero_grad()

    with pytest.raises(RuntimeError, match="'retain': expected a backward pass to reach at least one parameter"):
        empty()
    assert_same(snapshot(model, optimizer), before)
    works_on(model, optimizer)


@pytest.mark.parametrize("front_end", ["contexts", "join"])
def test_an_exception_in_a_backward_pass_empties_every_slot(front_end: str) -> None:
    model, optimizer = trained()
    before = snapshot(model, optimizer)

    def explode(gradient: Tensor) -> None:
        raise KeyError("a hook")

    losses = LOSSES(model, 2, 0)
    hook = model[2].weight.register_hook(explode)
    if front_end == "join":
        with pytest.raises(KeyError, match="a hook"):
            optimizer.join(**losses).backward()
    else:
        with pytest.raises(KeyError, match="a hook"), optimizer.objective("retain"):
            losses["retain"].backward()
    hook.remove()
    assert_same(snapshot(model, optimizer), before)
    assert not optimizer._window.slots
    works_on(model, optimizer)


def test_an_exception_in_the_second_objective_forgets_the_first() -> None:
    model, optimizer = trained()
    capture(optimizer, model, "retain")

    def interrupted() -> None:
        with optimizer.objective("forget"):
            LOSSES(model, 2, 0)["forget"].backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match=r"found none for \['forget', 'retain'\]"):
        optimizer.combine()
    works_on(model, optimizer)


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    before = snapshot(model, optimizer)
    with pytest.raises(
        RuntimeError, match=r"expected dense gradients, found a sparse one of shape \[5, 3\].*sparse=False"
    ):
        optimizer.join(forget=-model(torch.tensor([1, 2])).sum(), retain=model(torch.tensor([3])).sum()).backward()
    assert_same(snapshot(model, optimizer), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_optimizer_in_the_backward_pass() -> None:
    model, optimizer = trained()

    def steal(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(steal) for parameter in model.parameters()]
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"post-accumulate-grad hook took it.*remove the hook"):
        optimizer.join(**LOSSES(model, 2, 0)).backward()
    assert_same(snapshot(model, optimizer), before)
    for hook in hooks:
        hook.remove()
    works_on(model, optimizer)


# Join ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            lambda losses: losses.pop("retain") and None,
            ValueError,
            r"one loss for each of \['forget', 'retain'\], found \['forget'\]",
        ),
        (lambda losses: losses.update(memory=losses["forget"]), ValueError, "found .*'memory'"),
        (
            lambda losses: losses.update(retain=losses["retain"].expand(3)),
            ValueError,
            r"for 'retain', found \[3\]; take its mean",
        ),
        (lambda losses: losses.update(retain=0.5), ValueError, "for 'retain', found float"),
        (
            lambda losses: losses.update(retain=losses["retain"].detach()),
            RuntimeError,
            "loss of 'retain' to depend on trainable",
        ),
    ],
)
def test_losses_that_cannot_be_joined(
    change: Callable[[dict[str, Any]], None], error: type[Exception], sentence: str
) -> None:
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    losses: dict[str, Any] = dict(LOSSES(model, 2, 0))
    change(losses)
    with pytest.raises(error, match=sentence):
        optimizer.join(**losses)
    assert_same(snapshot(model, optimizer), before)
    works_on(model, optimizer)


def test_a_loss_of_another_model() -> None:
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    joint = optimizer.join(forget=LOSSES(model, 2, 0)["forget"], retain=LOSSES(mlp(), 2, 0)["retain"])
    with pytest.raises(RuntimeError, match="'retain': expected a backward pass to reach at least one parameter"):
        joint.backward()
    assert_same(snapshot(model, optimizer), before)
    works_on(model, optimizer)


# Rules ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        lambda gram: torch.ones(3),
        lambda gram: gram,
        lambda gram: gram.sum(),
        lambda gram: torch.ones(1, 2),
        lambda gram: [1.0, 0.5],
        lambda gram: (gram[0, 0], gram[0, 1]),
        lambda gram: gram[0].numpy(),
        lambda gram: None,
    ],
    ids=["too many", "matrix", "number", "batched", "list", "tuple", "numpy", "None"],
)
def test_a_rule_whose_answer_has_the_wrong_shape(rule: Callable[[Tensor], Tensor]) -> None:
    model, optimizer = trained()
    optimizer.rule = rule
    before = snapshot(model, optimizer)
    capture(optimizer, model, "retain", "forget")
    with pytest.raises(
        ValueError, match=r"rule: expected coefficients \[2\], a tensor, for a Gram matrix \[2, 2\], found"
    ):
        optimizer.step()
    assert_same(snapshot(model, optimizer), before)
    optimizer.zero_grad()
    optimizer.rule = gs.rules.gru
    works_on(model, optimizer)


def test_parameters_without_names_added_under_a_scope_that_needs_them() -> None:
    model = mlp()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model[0].named_parameters(), lr=0.1), scope=lambda name: name[0])
    before = values(model)
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": list(model[2].parameters())})
    contexts(model, optimizer, LOSSES, [0])
    assert not torch.equal(values(model[0]), before[:25])
    assert torch.equal(values(model[2]), before[25:])


# Rows that are not finite --------------------------------------------------------------------------------------------------------


def with_bad_batch(objective: str, bad: float) -> Callable[[nn.Module, int, int], dict[str, Tensor]]:
    """Step 2's loss of one objective has a gradient that is not finite in one weight."""

    def losses(model: nn.Module, step: int, micro: int) -> dict[str, Tensor]:
        found = classification(FOUR)(model, step, micro)
        if step == 2:
            found[objective] = found[objective] + bad * next(model.parameters())[0, 0]
        return found

    return losses


def four(**options: Any) -> tuple[nn.Sequential, gs.GradientSurgery]:
    model = mlp()
    if options.get("rule") == "GradVac":
        options["rule"] = gs.rules.GradVac(beta=0.5)
    return model, gs.GradientSurgery(torch.optim.AdamW(model.parameters(), lr=0.02), objectives=FOUR, **options)


@pytest.mark.parametrize("front_end", ["contexts", "join"])
@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.5},
        {"scope": "tensor", "ema_decay": 0.5},
        {"rule": "sum"},
        {"rule": lambda gram: torch.ones_like(gram[0])},
        {"rule": lambda gram: torch.eye(4)[0]},  # looks at no protected row, whose NaN is in .grad all the same
        {"guard": "update", "max_norm": 0.5},
        {"metric": "optimizer"},
        {"rule": "GradVac"},
        {"accumulate": True, "ema_decay": 0.5},
    ],
    ids=["gru", "tensor", "sum", "ones", "forget only", "guard", "metric", "GradVac", "accumulate"],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("objective", ["forget", "utility"])
def test_a_row_that_is_not_finite_is_named_and_zero_grad_recovers(
    objective: str, bad: float, options: dict[str, Any], front_end: str
) -> None:
    losses = with_bad_batch(objective, bad)
    model, optimizer = four(**options)
    FRONT_ENDS[front_end](model, optimizer, losses, [0, 1])
    before, record = snapshot(model, optimizer), optimizer.record
    with pytest.raises(
        FloatingPointError, match=f"in the gradient of '{objective}'; nothing was stepped and zero_grad"
    ):
        FRONT_ENDS[front_end](model, optimizer, losses, [2])
    assert any(bool(p.grad is not None and not p.grad.isfinite().all()) for p in model.parameters()), (
        "a GradScaler must see it"
    )
    assert optimizer.record is not record
    assert optimizer.record is not None
    assert not optimizer.record.applied
    with pytest.raises(FloatingPointError):
        optimizer.step()
    optimizer.zero_grad()
    assert_same(snapshot(model, optimizer), before)
    other, reference = four(**options)
    FRONT_ENDS[front_end](other, reference, losses, [0, 1])
    for each, surgeon in ((model, optimizer), (other, reference)):
        FRONT_ENDS[front_end](each, surgeon, losses, [3, 4])
    assert_same(snapshot(model, optimizer), snapshot(other, reference))


def test_a_rule_that_answers_nan_to_finite_rows() -> None:
    model, optimizer = trained()
    optimizer.rule = lambda gram: torch.full_like(gram[0], torch.nan)
    before = snapshot(model, optimizer)
    capture(optimizer, model, "retain", "forget")
    with pytest.raises(FloatingPointError, match=r"finite rows but a non-finite rule .*choose another rule"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.rule = gs.rules.gru
    assert_same(snapshot(model, optimizer), before)
    works_on(model, optimizer)


def test_model_zero_grad_recovers_too() -> None:
    model, optimizer = trained()
    with optimizer.objective("forget"):
        (LOSSES(model, 2, 0)["forget"] * torch.inf).backward()
    capture(optimizer, model, "retain")
    with pytest.raises(FloatingPointError, match="'forget'"):
        optimizer.step()
    model.zero_grad()
    works_on(model, optimizer)


def test_a_step_whose_update_was_zeroed_is_refused_and_moves_no_average() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = gs.GRU(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.join(forget=model.weight.sum(), retain=model.bias.sum()).backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="zeroed"):
        optimizer.step()
    assert optimizer._ema.steps == {}


def test_the_class_of_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="construct it"):
        gs.GradientSurgery(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), rule=gs.rules.GradVac)


def test_a_checkpoint_of_another_decay_is_refused() -> None:
    def made(decay: float) -> gs.GradientSurgery:
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = gs.GRU(torch.optim.SGD([weight], lr=0.1), ema_decay=decay)
        optimizer.join(forget=weight.sum(), retain=weight[0]).backward()
        optimizer.step()
        return optimizer

    with pytest.raises(ValueError, match=r"ema_decay=0\.9"):
        made(0.9).load_state_dict(made(0.2).state_dict())


def test_data_parallel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices are not here, but the wrapper around the parameters is enough."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    model = mlp()
    wrapper = nn.DataParallel(model)
    wrapper.device_ids = [0, 1]
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    sentence = r"found a torch\.nn\.DataParallel wrapper.*use DistributedDataParallel or .*fully_shard"
    with pytest.raises(RuntimeError, match=sentence), optimizer.objective("retain"):
        pass
