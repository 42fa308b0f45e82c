"""Elementwise rules against loops over coordinates, and the optimizer that steps with them against a plain training loop."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gradsurgery as gs
from gradsurgery import rules
from gradsurgery.rules import elementwise
from gradsurgery.rules.elementwise import ELEMENTWISE, cglearn, graddrop, sago, saliency_mask, sign_agreement
from tests.gradsurgery.optimizer import distributed_workers as workers
from tests.problems import BASES, FOUR, FRONT_ENDS, TWO, classification, contexts, joined, mlp, taken, values
from tests.reference import elementwise as reference
from tests.tolerances import COMBINED, STEPPED, close

STEPS = 6
SHAPES = ((7,), (3, 5), (), (0, 4), (2, 3, 2))
BOUND: dict[str, Callable[..., Any]] = {
    **ELEMENTWISE,
    "cglearn": functools.partial(cglearn, tau=1.0),
    "graddrop": lambda rows: graddrop(rows, generator=torch.Generator().manual_seed(3)),
}
# A rule, its options and the loop that it must equal.
LOOPS: dict[str, tuple[Callable[..., Any], dict[str, float], Callable[..., float]]] = {
    "sago": (sago, {}, reference.sago),
    "sago, weights": (sago, {"gamma": 0.5, "alpha": 3.0}, reference.sago),
    "sago, no retain": (sago, {"alpha": 0.0}, reference.sago),
    "sign_agreement": (sign_agreement, {}, reference.sign_agreement),
    "cglearn 0": (cglearn, {"tau": 0.0}, reference.cglearn),
    "cglearn 0.25": (cglearn, {"tau": 0.25}, reference.cglearn),
    "cglearn 1": (cglearn, {"tau": 1.0}, reference.cglearn),
    "cglearn 4": (cglearn, {"tau": 4.0}, reference.cglearn),
}
every_rule = pytest.mark.parametrize("name", ELEMENTWISE)


def random_rows(
    number: int, *, dtype: torch.dtype = torch.float64, seed: int = 0, holes: bool = True
) -> list[list[Tensor | None]]:
    """K rows of small integers over 5 parameters, some of them None: zeros, ties, coordinates that agree and coordinates that do not."""
    generator = torch.Generator().manual_seed(seed)
    common = [torch.randint(-4, 5, shape, generator=generator) for shape in SHAPES]

    def row() -> list[Tensor | None]:
        noise = [torch.randint(-4, 5, shape, generator=generator) for shape in SHAPES]
        return [((2 * c + n * (c.abs() < 3)) / 4).to(dtype) for c, n in zip(common, noise, strict=True)]

    rows = [row() for _ in range(number)]
    if holes:
        rows[0][1] = rows[-1][4] = None
        rows[0].append(None)
        for row in rows[1:]:
            row.append(None)
    return rows


def flatten(row: Sequence[Tensor | None], like: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """One float64 vector, 0 for None where another row has a tensor."""
    parts = []
    for index, tensor in enumerate(row):
        shape = next((other[index].shape for other in like if other[index] is not None), None)
        if shape is not None:
            parts.append(torch.zeros(shape).double().flatten() if tensor is None else tensor.double().flatten())
    return torch.cat(parts)


def copies(rows: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
    return [[None if t is None else t.clone() for t in row] for row in rows]


# The formulas --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize("name", LOOPS)
def test_every_coordinate_is_the_loops(name: str, number: int, dtype: torch.dtype) -> None:
    rule, options, loop = LOOPS[name]
    rows = random_rows(number, dtype=dtype, seed=number)
    found = flatten(rule(rows, **options), rows)
    expected = reference.everywhere(loop, [flatten(row, rows).tolist() for row in rows], **options)
    close(found, torch.tensor(expected, dtype=torch.float64), COMBINED[dtype], scale=8.0)
    assert found.any()
    if "sago" not in name and options.get("tau") != 0.0:
        assert not found.all()


@pytest.mark.parametrize("size", [(1 << 17) + 5])
def test_chunks_make_no_difference(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randn(size, generator=generator)], [torch.randn(size, generator=generator)]]
    (found,) = sago(rows)
    f, r = rows[0][0], rows[1][0]
    assert torch.equal(found, torch.where(torch.signbit(f) != torch.signbit(r), r, f))
    transposed = [[row[0][: size - 1].view(-1, 2).T] for row in rows]
    assert torch.equal(sago(transposed)[0], found[: size - 1].view(-1, 2).T)


def test_sago_never_moves_a_coordinate_against_retention() -> None:
    rows = random_rows(2, seed=9)
    assert bool((flatten(sago(rows), rows) * flatten(rows[1], rows) >= 0.0).all())


def test_sago_protects_the_sum_of_several_rows() -> None:
    rows = [[torch.tensor([1.0, 1.0])], [torch.tensor([-3.0, -1.0])], [torch.tensor([1.0, 2.0])]]
    assert torch.equal(sago(rows)[0], torch.tensor([-2.0, 1.0]))


@pytest.mark.parametrize("rule", [sago, functools.partial(cglearn, tau=0.5), sign_agreement])
def test_small_gradients_are_treated_as_large_ones(rule: Callable[..., Any]) -> None:
    """Products and squares of 1e-30 are 0 in float32."""
    generator = torch.Generator().manual_seed(2)
    rows = [[torch.randn(200, generator=generator)] for _ in range(3)]
    tiny = [[t * 2.0**-100 for t in row] for row in rows]
    (large,), (small,) = rule(rows), rule(tiny)
    close(small * 2.0**100, large, COMBINED[torch.float32], scale=4.0)


def test_cglearn_keeps_what_is_the_same_everywhere_and_asks_for_two_rows() -> None:
    same = [torch.tensor([2.0, 0.0, -1e-9])]
    assert torch.equal(cglearn([same, same, same], tau=1e6)[0], same[0])
    with pytest.raises(ValueError, match="rows: cglearn compares at least two, found 1"):
        cglearn([same], tau=1.0)


def test_graddrop_keeps_one_sign_with_its_probability() -> None:
    coordinate, draws = [3.0, -1.0, 0.5, 0.0], 40_000
    rows = [[torch.full((draws,), x)] for x in coordinate]
    (found,) = graddrop(rows, generator=torch.Generator().manual_seed(0))
    share, positive, negative = reference.graddrop_choices(coordinate)
    kept = found == positive
    assert bool((kept | (found == negative)).all())
    # Five standard deviations of a binomial share.
    assert abs(float(kept.float().mean()) - share) < 5.0 * math.sqrt(share * (1.0 - share) / draws)


def test_graddrop_leaves_agreement_and_zeros_alone() -> None:
    rows = [[torch.tensor([1.0, -1.0, 0.0, 2.0])], [torch.tensor([2.0, -0.5, 0.0, 0.0])]]
    for seed in range(20):
        found = graddrop(rows, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found[0], torch.tensor([3.0, -1.5, 0.0, 2.0]))


def test_graddrop_draws_from_its_generator_and_nowhere_else() -> None:
    rows = [[torch.ones(50), torch.ones(50)], [-torch.ones(50), -torch.ones(50)]]

    def draw(generator: torch.Generator | None) -> Tensor:
        return torch.cat(graddrop(rows, generator=generator))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (torch.Generator().manual_seed(seed) for seed in (5, 5))
    found = draw(first)
    assert torch.equal(found, draw(second))
    assert not torch.equal(found, draw(first)), "every call draws anew"
    assert not torch.equal(found[:50], found[50:]), "and every parameter"
    assert torch.equal(torch.get_rng_state(), state)
    without = draw(None)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert torch.equal(draw(None), without)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.75, 0.999])
def test_saliency_mask_keeps_the_largest_of_the_whole_model(quantile: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    forget = [torch.randn(shape, generator=generator).to(dtype) for shape in ((40,), (6, 7), (0,), ())]
    forget.append((torch.randn(5, generator=generator) * 1e-38).to(dtype))  # subnormal in float32
    row = [forget[0], None, *forget[1:]]
    retain = [torch.ones_like(t) for t in (forget[0], torch.ones(3), *forget[1:])]
    found = saliency_mask([row, retain], quantile=quantile)
    expected = reference.saliency_mask(torch.cat([t.flatten() for t in forget]).tolist(), quantile=quantile)
    assert torch.equal(torch.cat([t.flatten() for t in found if t.shape != (3,)]), torch.tensor(expected, dtype=dtype))
    assert not found[1].any()


def test_saliency_mask_of_ties_and_of_nothing() -> None:
    ties = [torch.tensor([1.0, -1.0, 1.0, 2.0])]
    assert torch.equal(saliency_mask([ties], quantile=0.5)[0], ties[0])
    assert torch.equal(saliency_mask([[torch.zeros(3)]])[0], torch.zeros(3))
    assert saliency_mask([[None, None]]) == [None, None]


# Every rule ----------------------------------------------------------------------------------------------------------------------


@every_rule
def test_rows_are_left_alone_and_the_answer_is_new(name: str) -> None:
    rows = random_rows(3)
    before = copies(rows)
    for made, *given in zip(BOUND[name](rows), *rows, strict=True):
        if made is not None:
            made.add_(1.0)
        assert made is None or made.shape == next(t.shape for t in given if t is not None)
    for row, old in zip(rows, before, strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(row, old, strict=True))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_none_stays_none_and_types_stay_the_first_rows(name: str, dtype: torch.dtype) -> None:
    rows = random_rows(2, dtype=dtype)
    rows[1] = [None if t is None else t.float() for t in rows[1]]  # an average in float32
    found = BOUND[name](rows)
    assert [t is None for t in found] == [False] * 5 + [True]
    assert {found[index].dtype for index in (0, 2, 3, 4)} == {dtype}


@every_rule
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_stays_where_it_is(name: str, where: int) -> None:
    rows = [[torch.tensor([1.0, 2.0, -3.0])] for _ in range(3)]
    clean = BOUND[name](copies(rows))[0]
    rows[where][0][1] = math.nan
    found = BOUND[name](rows)[0]
    assert found.isnan().tolist() == [False, True, False]
    assert name == "saliency_mask" or torch.equal(found[[0, 2]], clean[[0, 2]])


@every_rule
def test_wrong_rows_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected one entry per parameter in every row"):
        BOUND[name]([[torch.zeros(2)], [torch.zeros(2), None]])
    with pytest.raises(ValueError, match="expected tensors of one shape"):
        BOUND[name]([[torch.zeros(2)], [torch.zeros(3)]])
    with pytest.raises(ValueError, match=r"at least one row|at least two"):
        BOUND[name]([])
    for dtype in (torch.complex64, torch.int64):
        with pytest.raises(TypeError, match="expected real floating-point rows, found"):
            BOUND[name]([[torch.zeros(2, dtype=dtype)], [torch.zeros(2)]])


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (sago, {"gamma": -1.0}),
        (sago, {"alpha": math.nan}),
        (cglearn, {"tau": -0.1}),
        (cglearn, {"tau": math.nan}),
        (saliency_mask, {"quantile": 1.0}),
        (saliency_mask, {"quantile": -0.1}),
        (saliency_mask, {"quantile": math.nan}),
    ],
)
def test_options_out_of_range_are_refused_before_anything_else(
    rule: Callable[..., Any], options: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        rule([[], []], **options)


def test_rules_are_found_by_their_names() -> None:
    for name, rule in ELEMENTWISE.items():
        assert rules.by_name(name) is rule
        assert elementwise.is_elementwise(functools.partial(rule, tau=1.0))
        assert "Source" in (rule.__doc__ or "")
    assert not set(ELEMENTWISE) & set(rules.RULES)
    assert not any(elementwise.is_elementwise(rule) for rule in rules.RULES.values())
    with pytest.raises(ValueError, match=r"gru.*sago.*found 'sage'"):
        rules.by_name("sage")


# The optimizer -------------------------------------------------------------------------------------------------------------------


def surgeon(model: nn.Module, rule: Any, base: str = "AdamW", **options: Any) -> gs.GradientSurgery:
    return gs.GradientSurgery(
        BASES[base](model.named_parameters()), rule=rule, **{"ema_dtype": torch.float64, **options}
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema": {"ema_decay": 0.7},
    "add": {"add": 0.5},
    "max_norm": {"max_norm": 0.3},
    "everything": {"ema_decay": 0.4, "add": 1.5, "max_norm": 0.2},
}
RULES = {
    "sago": ("sago", reference.sago),
    "sago, weights": (
        functools.partial(sago, gamma=0.5, alpha=2.0),
        functools.partial(reference.sago, gamma=0.5, alpha=2.0),
    ),
    "sign_agreement": (sign_agreement, reference.sign_agreement),
    "cglearn": (functools.partial(cglearn, tau=0.5), functools.partial(reference.cglearn, tau=0.5)),
}


@pytest.mark.parametrize("objectives", [TWO, FOUR], ids=["two", "four"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_step_is_the_plain_loops(
    name: str, front_end: str, micro_batches: int, objectives: tuple[str, ...]
) -> None:
    rule, loop = RULES["sago, weights"] if objectives is TWO else RULES["cglearn"]
    check_against_loop(rule, loop, OPTIONS[name], objectives, front_end, micro_batches)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_steps(name: str) -> None:
    rule, loop = RULES[name]
    check_against_loop(rule, loop, OPTIONS["everything"], TWO, "contexts", 1)


def check_against_loop(
    rule: Any, loop: Any, options: dict[str, Any], objectives: tuple[str, ...], front_end: str, micro_batches: int
) -> None:
    losses, model, plain = classification(objectives), mlp(), mlp()
    ours = {**options, "add": {"retain": options["add"]}} if "add" in options else options
    accumulate = front_end == "join" and micro_batches > 1
    optimizer = surgeon(model, rule, "momentum", objectives=objectives, accumulate=accumulate, guard="measure", **ours)
    oracle = reference.Training(plain, BASES["momentum"](plain.parameters()), loop, **options)

    def compare(step: int, record: gs.Record) -> None:
        rows, update, change = oracle.step([losses(plain, step, micro) for micro in range(micro_batches)])
        close(values(model), values(plain), STEPPED)
        close(record.gram, rows @ rows.T, STEPPED)
        close(record.predicted_change, -rows @ update, STEPPED)
        close(record.update_norm, update.norm(), STEPPED)
        assert record.actual_change is not None
        close(record.actual_change, rows[1:] @ change, STEPPED)
        assert record.coefficients is None
        assert record.blocks is None
        assert record.cosines.shape == (len(objectives),) * 2

    FRONT_ENDS[front_end](model, optimizer, losses, range(STEPS), micro_batches=micro_batches, after_step=compare)


def test_saliency_mask_steps_with_the_masked_forget_gradient() -> None:
    model = mlp()
    optimizer = surgeon(model, "saliency_mask", "SGD")
    losses = classification()(model, 0, 0)
    forget = torch.autograd.grad(losses["forget"], list(model.parameters()), retain_graph=True)
    flat = torch.cat([g.flatten() for g in forget])
    masked = torch.tensor(reference.saliency_mask(flat.tolist(), quantile=0.5), dtype=torch.float64)
    expected = values(model) - 0.1 * masked
    optimizer.join(**losses).backward()
    optimizer.step()
    close(values(model), expected, STEPPED)


def test_the_guard_protects_an_elementwise_step_too() -> None:
    model = mlp()
    optimizer = surgeon(model, "sago", "AdamW", objectives=FOUR, guard="update", ema_decay=0.5)
    corrected = []

    def look(step: int, record: gs.Record) -> None:
        assert record.actual_change is not None
        assert record.unguarded_change is not None
        assert bool((record.actual_change <= 1e-12).all())
        corrected.append(bool((record.unguarded_change > 1e-9).any()))

    contexts(model, optimizer, classification(FOUR), range(STEPS), after_step=look)
    assert any(corrected), "a test in which nothing is corrected says nothing about the guard"


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_loss_scale_changes_nothing_even_for_a_rule_that_is_not_homogeneous(front_end: str) -> None:
    @elementwise.rule
    def squares(rows: Any) -> list[Tensor | None]:
        return elementwise.each(rows, lambda f, r: f * r.abs())

    models = mlp(), mlp()
    plain, scaled = (surgeon(m, squares, ema_decay=0.5, add={"retain": 0.5}, max_norm=0.1) for m in models)
    for step in range(STEPS):
        FRONT_ENDS[front_end](models[0], plain, classification(), [step])
        losses = classification()(models[1], step, 0)
        if front_end == "join":
            (scaled.join(**losses) * 1024.0).backward()
        else:
            for name, loss in losses.items():
                with scaled.objective(name):
                    (loss * 1024.0).backward()
            scaled.combine(scale=1024.0)
        for parameter in models[1].parameters():
            assert parameter.grad is not None
            parameter.grad /= 1024.0
        scaled.step()
        scaled.zero_grad()
        close(values(models[1]), values(models[0]), STEPPED)
        close(taken(scaled).update_norm, taken(plain).update_norm, STEPPED)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_rule_may_hand_back_a_row(kept: int) -> None:
    """What clips .grad in place must not reach the row that the guard measures with."""

    @elementwise.rule
    def choose(rows: Any) -> Any:
        return rows[kept]

    model = mlp()
    optimizer = surgeon(model, choose, "SGD", guard="measure")
    losses = classification()(model, 0, 0)
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])
        for loss in losses.values()
    ]
    optimizer.join(**losses).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)
    before = values(model)
    optimizer.step()
    close(values(model), before - 0.1 * 0.5 * gradients[kept], STEPPED)
    change = taken(optimizer).actual_change
    assert change is not None
    close(change[0], -0.1 * 0.5 * gradients[kept] @ gradients[1], STEPPED)


def test_low_precision_parameters_keep_their_type() -> None:
    for options in ({}, {"ema_decay": 0.5}, {"ema_decay": 0.5, "add": {"retain": 1.0}, "max_norm": 0.1}):
        model = mlp(dtype=torch.bfloat16)
        optimizer = surgeon(model, "sago", **{"ema_dtype": torch.float32, **options})
        contexts(model, optimizer, classification(), range(3))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert values(model).isfinite().all()


def test_a_parameter_that_no_objective_reaches_gets_no_gradient() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = gs.GradientSurgery(torch.optim.AdamW([used, unused], weight_decay=0.5), rule="sago")
    optimizer.join(forget=used.sum(), retain=-used[0]).backward()
    assert used.grad is not None
    assert used.grad.tolist() == [-1.0, 1.0]
    assert unused.grad is None
    optimizer.step()
    assert unused.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("broken", TWO)
@pytest.mark.parametrize("name", ["sago", "graddrop", "sign_agreement", "saliency_mask"])
def test_a_row_that_is_not_finite_is_named_and_nothing_is_stepped(name: str, broken: str) -> None:
    model = mlp()
    optimizer = surgeon(model, name, ema_decay=0.5)
    before = values(model)
    losses = classification()(model, 0, 0)
    losses[broken] = losses[broken] * math.inf
    optimizer.join(**losses).backward()
    assert all(bool(p.grad.isnan().any()) for p in model.parameters() if p.grad is not None)
    with pytest.raises(FloatingPointError, match=f"in the gradient of '{broken}'"):
        optimizer.step()
    assert torch.equal(values(model), before)
    optimizer.zero_grad()
    contexts(model, optimizer, classification(), [0])
    assert taken(optimizer).applied


def test_a_rule_that_makes_nan_of_finite_rows_is_seen() -> None:
    @elementwise.rule
    def broken(rows: Any) -> list[Tensor | None]:
        return elementwise.each(rows, lambda f, r: f / (r - r))

    model = mlp()
    optimizer = surgeon(model, broken)
    optimizer.join(**classification()(model, 0, 0)).backward()
    with pytest.raises(FloatingPointError, match="finite rows but a non-finite rule"):
        optimizer.step()


@pytest.mark.parametrize("answer", [lambda rows: [], lambda rows: [torch.zeros(2)] * 4])
def test_an_answer_that_is_no_row_is_refused(answer: Callable[..., Any]) -> None:
    model = mlp()
    optimizer = surgeon(model, elementwise.rule(answer))
    with pytest.raises(
        ValueError, match="expected an elementwise rule to return a tensor shaped like each of 4 parameters"
    ):
        contexts(model, optimizer, classification(), [0])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scope": "tensor"}, "scope: expected 'global' with an elementwise rule.*'tensor' with 'sago'"),
        ({"scope": lambda name: name}, "scope: expected 'global' with an elementwise rule"),
        ({"metric": "optimizer"}, "metric: expected 'euclidean' with an elementwise rule"),
    ],
)
def test_what_only_a_gram_matrix_has_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        surgeon(mlp(), "sago", **options)


def test_wrong_options_of_a_rule_show_when_the_optimizer_is_made() -> None:
    with pytest.raises(TypeError, match="tau"):
        surgeon(mlp(), "cglearn")
    with pytest.raises(ValueError, match="cglearn compares at least two"):
        surgeon(mlp(), functools.partial(cglearn, tau=1.0), objectives=("forget",))
    with pytest.raises(ValueError, match="alpha: expected"):
        surgeon(mlp(), functools.partial(sago, alpha=-1.0))
    generator = torch.Generator().manual_seed(0)
    surgeon(mlp(), functools.partial(graddrop, generator=generator))
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state()), "making it draws nothing"


def test_copies_and_checkpoints_go_on_as_if_nothing_had_happened() -> None:
    model, again = mlp(), mlp()
    optimizer = surgeon(model, functools.partial(sago, alpha=2.0), ema_decay=0.5)
    contexts(model, optimizer, classification(), range(3))
    resumed = surgeon(again, functools.partial(sago, alpha=2.0), ema_decay=0.5)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    contexts(model, optimizer, classification(), range(3, 6))
    contexts(again, resumed, classification(), range(3, 6))
    assert torch.equal(values(model), values(again))
    assert pickle.loads(pickle.dumps(optimizer)).record is None


@pytest.mark.parametrize(
    ("options", "rows"), [({}, 2), ({"objectives": FOUR}, 4), ({"accumulate": True}, 2), ({"guard": "update"}, 3)]
)
def test_memory_estimate_counts_the_new_row(options: dict[str, Any], rows: int) -> None:
    assert surgeon(mlp(), "sago", **options).memory_estimate() == rows * 43 * 8


def test_captured_rows_are_freed_before_the_base_steps() -> None:
    model = mlp()
    optimizer = surgeon(model, "sago", ema_decay=0.5, guard="update")
    optimizer.join(**classification()(model, 0, 0)).backward()
    combined = optimizer._window.combined
    assert combined is not None
    assert all(tensor is None for tensor in combined[0].lists[0])


# Several processes ---------------------------------------------------------------------------------------------------------------


def ddp_scenario(rank: int) -> None:
    model, plain = mlp(), mlp()
    wrapped = DistributedDataParallel(model)
    optimizer = surgeon(model, "sago", ema_decay=0.5, add={"retain": 0.5}, max_norm=0.3)
    oracle = reference.Training(
        plain, BASES["AdamW"](plain.parameters()), reference.sago, ema_decay=0.5, add=0.5, max_norm=0.3
    )
    for step in range(STEPS):
        joined(wrapped, optimizer, workers.of_rank(rank), [step])
        oracle.step(workers.whole(plain, step))
        workers.check(model, plain)


def ddp_draws(rank: int, alike: bool) -> None:
    model = mlp()
    wrapped = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(7 if alike else rank)
    optimizer = surgeon(model, functools.partial(graddrop, generator=generator))
    if alike:
        joined(wrapped, optimizer, workers.of_rank(rank), range(STEPS))
        workers.assert_ranks_agree(model)
        return
    before = values(model)
    with pytest.raises(RuntimeError, match="rows differ across ranks") as raised:
        joined(wrapped, optimizer, workers.of_rank(rank), [0])
    assert "same seed on every rank" in raised.value.__notes__[0]
    assert torch.equal(values(model), before)


def fsdp_scenario(rank: int, options: dict[str, Any]) -> None:
    model, plain = workers.sharded(), workers.Scaled()
    ours = {**options, "add": {"retain": options["add"]}} if "add" in options else options
    optimizer = surgeon(model, functools.partial(sago, alpha=2.0), **ours)
    loop = functools.partial(reference.sago, alpha=2.0)
    oracle = reference.Training(plain, BASES["AdamW"](plain.parameters()), loop, **options)
    for step in range(STEPS):
        joined(model, optimizer, workers.of_rank(rank), [step])
        rows, update, _ = oracle.step(workers.whole(plain, step))
        close(workers.gathered(model), values(plain), STEPPED)
        close(taken(optimizer).predicted_change, -rows @ update, STEPPED)
        close(taken(optimizer).update_norm, update.norm(), STEPPED)


def fsdp_saliency(rank: int) -> None:
    model = workers.sharded()
    optimizer = surgeon(model, "saliency_mask")
    with pytest.raises(RuntimeError, match="saliency_mask: expected whole gradients, found a sharded one"):
        joined(model, optimizer, workers.of_rank(rank), [0])
    assert isinstance(next(model.parameters()), DTensor)


needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


@needs_gloo
def test_ddp_is_the_single_process_run() -> None:
    workers.run(ddp_scenario)


@needs_gloo
@pytest.mark.parametrize("alike", [True, False])
def test_ddp_ranks_draw_alike_or_are_told(alike: bool) -> None:
    workers.run(ddp_draws, alike)


@needs_gloo
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_fsdp2_is_the_single_process_run(name: str) -> None:
    workers.run(fsdp_scenario, OPTIONS[name])


@needs_gloo
def test_fsdp2_with_a_quantile_over_the_model_is_refused() -> None:
    workers.run(fsdp_saliency)
