"""Every rule of the table, on every Gram matrix of the zoo, by named properties; equivalences, closed forms, oracles; the rule with a memory.

A rule added to `RULES` is tested by the first part with no new code here; what it promises beyond that is one line in `FACTS`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery as gs
from gradsurgery import gram as gram_module
from gradsurgery import rules
from gradsurgery.rules import elementwise, multi_task, projections
from tests import tolerances, zoo
from tests.problems import classification, contexts, mlp, values
from tests.reference import rules as reference
from tests.tolerances import close


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On matrices of this size several threads are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ANY = 99  # rows: a promise that holds for any number of them


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a rule promises. Numbers are the largest K for which it does; the defaults promise nothing."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # required ones
    degree: int | None = None  # rule(s^2 G) = s^degree rule(G)
    alone: float | None = None  # its coefficient for the matrix [[4]]
    protects: int = 0  # (G c)[1:] >= 0
    helps_all: int = 0  # G c >= 0
    identity: int = 0  # c = (1, 0, ..., 0) where no protected row conflicts with the forget row
    rescaling: int = 0  # the update does not change when a protected row is rescaled
    symmetric: int = 0  # permuting all rows permutes the coefficients
    protected_symmetric: int = 0  # permuting the protected rows does
    resolves_longest: bool = False  # accurate relative to the longest row only
    nearly_dependent: tolerances.Tolerance = tolerances.ILL_CONDITIONED
    ambiguous: tuple[str, ...] = ()  # animals for which several updates are equally good, up to rounding
    unbounded: tuple[str, ...] = ()  # animals for which the coefficients may be non-finite


FACTS = {
    "sum": Facts(degree=0, alone=1.0, symmetric=ANY),
    "gradient_difference": Facts(degree=0, alone=1.0, protected_symmetric=ANY),
    "gru": Facts(degree=0, alone=1.0, protects=ANY, identity=ANY, rescaling=ANY, protected_symmetric=ANY),
    "gem": Facts(degree=0, alone=1.0, protects=ANY, identity=ANY, rescaling=ANY, protected_symmetric=ANY),
    "a_gem": Facts(degree=0, alone=1.0, protects=2, identity=ANY, rescaling=2, protected_symmetric=ANY),
    "cos_clip": Facts(degree=0, alone=1.0, identity=ANY, rescaling=ANY, protected_symmetric=ANY),
    "gu": Facts(degree=0, alone=1.0, protects=ANY, rescaling=ANY, protected_symmetric=ANY),
    "gradvac": Facts(degree=0, alone=1.0, protects=2, identity=ANY, rescaling=ANY, protected_symmetric=2),
    "blur": Facts(degree=0, alone=1.0, protected_symmetric=ANY),
    "hamu": Facts(options={"gain": 0.5, "radius": 1.0}, alone=0.125, protected_symmetric=ANY),
    "hamu_u": Facts(options={"gain": 0.5, "radius": 1.0}, alone=0.5, protected_symmetric=ANY),
    "orthograd": Facts(degree=0, alone=1.0, protects=2, protected_symmetric=ANY),
    "pcgrad": Facts(degree=0, alone=1.0, helps_all=2, symmetric=2),
    "mgda": Facts(degree=0, alone=1.0, helps_all=ANY, symmetric=ANY, resolves_longest=True),
    "cagrad": Facts(
        degree=0, alone=1.5, symmetric=ANY, resolves_longest=True, ambiguous=("different_lengths", "different_lengths_reversed")
    ),
    "imtl_g": Facts(degree=0, alone=1.0, symmetric=ANY, nearly_dependent=tolerances.PSEUDO_INVERSE),
    "ngdiff": Facts(degree=-1, alone=0.5, rescaling=ANY, symmetric=ANY),
    "nash_mtl": Facts(
        degree=-1, alone=0.5, helps_all=ANY, rescaling=ANY, symmetric=ANY,
        unbounded=("rank_one", "rank_two", "opposite", "opposite_protected"),
    ),
    "aligned_mtl": Facts(degree=0, alone=1.0, symmetric=ANY, resolves_longest=True),
    "upgrad": Facts(degree=0, alone=1.0, helps_all=ANY, symmetric=ANY),
}  # fmt: skip


def facts_of(name: str) -> Facts:
    return FACTS.get(name, Facts())


def promising(most: Callable[[Facts], int]) -> pytest.MarkDecorator:
    """Every rule and every number of rows for which it promises something."""
    pairs = [(name, number) for name in rules.RULES for number in zoo.SIZES if number <= most(facts_of(name))]
    return pytest.mark.parametrize(("name", "number"), pairs)


every_rule = pytest.mark.parametrize("name", rules.RULES)
every_size = pytest.mark.parametrize("number", zoo.SIZES)

NEARLY_DEPENDENT = ("nearly_parallel", "nearly_opposite")
ORDINARY = ("random", "random_again", "no_conflict", "conflict_with_all", "tiny", "huge")


def bound(name: str) -> Callable[..., Tensor]:
    """The rule with its required options."""
    return functools.partial(rules.RULES[name], **facts_of(name).options)


def update(coefficients: Tensor, rows: Tensor) -> Tensor:
    return (coefficients[..., None, :] @ rows).squeeze(-2)


def lengths(rows: Tensor) -> Tensor:
    return rows.norm(dim=-1)


def size_of(name: str, coefficients: Tensor, rows: Tensor) -> Tensor:
    """The length against which a rule's errors count: its longest term, or the longest row where it resolves no better."""
    longest = (coefficients.abs() * lengths(rows)).amax(-1)
    if facts_of(name).resolves_longest:
        longest = torch.maximum(longest, lengths(rows).amax(-1))
    return longest


def tolerance_for(name: str, kind: str) -> tolerances.Tolerance:
    if kind in NEARLY_DEPENDENT:
        return facts_of(name).nearly_dependent
    return tolerances.SAME if kind in ORDINARY else tolerances.OUT_OF_ORDER


def same_updates(
    name: str, kinds: tuple[str, ...], rows: Tensor, found: Tensor, other_rows: Tensor, expected: Tensor
) -> None:
    """Both coefficients lead to the same update. Coefficients themselves are not unique where rows depend on each other."""
    for z, kind in enumerate(kinds):
        if kind in facts_of(name).unbounded + facts_of(name).ambiguous:
            continue
        scale = torch.maximum(size_of(name, found[z], rows[z]), size_of(name, expected[z], other_rows[z]))
        close(
            update(found[z], rows[z])[None],
            update(expected[z], other_rows[z])[None],
            tolerance_for(name, kind),
            scale=scale,
            names=(f"{name} on {kind}",),
        )


# ---------------------------------------------------------------------------------------------------------------------------------
# Every rule
# ---------------------------------------------------------------------------------------------------------------------------------


def test_facts_are_about_rules_that_exist() -> None:
    assert set(FACTS) <= set(rules.RULES)


@every_rule
def test_the_table_names_each_rule_by_its_function(name: str) -> None:
    assert rules.by_name(name) is rules.RULES[name]
    assert rules.RULES[name].__name__ == name
    assert "Source" in (rules.RULES[name].__doc__ or "") or name == "sum"


def test_every_public_function_of_the_two_modules_is_in_the_table_and_in_the_package() -> None:
    written = {
        name: value
        for module in (projections, multi_task)
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and value.__module__ == module.__name__
    }
    assert written == rules.RULES
    assert all(getattr(rules, name) is rule for name, rule in rules.RULES.items())
    assert set(rules.RULES) < set(rules.__all__)
    assert set(elementwise.ELEMENTWISE) < set(elementwise.__all__)


def test_the_package_exports_rules_and_no_helpers() -> None:
    names = {name for name, value in vars(rules).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert names | {"elementwise"} == {*rules.__all__, "Tensor"}


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"gru.*found 'gro'"):
        rules.by_name("gro")


@every_rule
@every_size
def test_coefficients_are_float64_and_shaped_like_a_row_of_the_matrix(name: str, number: int) -> None:
    for leading in ((), (3,), (2, 3), (0,), (2, 0)):
        gram = torch.eye(number, dtype=torch.float64).expand(*leading, number, number)
        coefficients = bound(name)(gram)
        assert coefficients.shape == (*leading, number)
        assert coefficients.dtype == torch.float64
        assert not coefficients.requires_grad


@every_rule
@every_size
def test_coefficients_are_finite_on_the_zoo(name: str, number: int) -> None:
    kinds, _, grams = zoo.stacked(number)
    finite = bound(name)(grams).isfinite().all(-1)
    wrong = [kind for kind, fine in zip(kinds, finite.tolist(), strict=True) if not fine]
    assert set(wrong) <= set(facts_of(name).unbounded)


@every_rule
@every_size
def test_a_batch_equals_a_loop(name: str, number: int) -> None:
    kinds, rows, grams = zoo.stacked(number)
    batched = bound(name)(grams)
    looped = torch.stack([bound(name)(gram) for gram in grams])
    same_updates(name, kinds, rows, batched, rows, looped)
    twice = bound(name)(torch.stack([grams, grams.flip(0)]))
    same_updates(name, kinds, rows, twice[0], rows, looped)
    same_updates(name, kinds, rows, twice[1].flip(0), rows, looped)


@every_rule
@every_size
def test_rules_work_under_vmap(name: str, number: int) -> None:
    kinds, rows, grams = zoo.stacked(number)
    same_updates(name, kinds, rows, torch.vmap(bound(name))(grams), rows, bound(name)(grams))


@every_rule
@every_size
def test_the_input_is_not_modified_and_not_returned(name: str, number: int) -> None:
    _, _, grams = zoo.stacked(number)
    given_grams = grams.clone()
    coefficients = bound(name)(given_grams)
    assert torch.equal(given_grams, grams)
    coefficients.add_(1.0)
    assert torch.equal(given_grams, grams)


@every_rule
@every_size
def test_a_graph_on_the_input_is_left_behind(name: str, number: int) -> None:
    gram = torch.eye(number, dtype=torch.float64, requires_grad=True) * 2.0
    assert not bound(name)(gram).requires_grad


@every_rule
@every_size
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_matrix_gives_non_finite_coefficients_for_itself_alone(name: str, number: int, bad: float) -> None:
    _, _, grams = zoo.stacked(number, *ORDINARY)
    clean = bound(name)(grams)
    spoilt = [(z, i, j) for z, (i, j) in enumerate([(0, 0), (0, -1), (-1, -1)])]
    dirty = grams.clone()
    for z, i, j in spoilt:
        dirty[2 * z, i, j] = bad
        dirty[2 * z, j, i] = bad
    found = bound(name)(dirty)
    for z in range(len(grams)):
        if z % 2 == 0:
            assert not found[z].isfinite().any()
        else:
            assert torch.equal(found[z], clean[z])


@every_rule
@every_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_of_lower_precision_is_its_float64_self(name: str, number: int, dtype: torch.dtype) -> None:
    gram = zoo.animals(number)[0].gram.to(dtype)
    assert torch.equal(bound(name)(gram), bound(name)(gram.double()))


@every_rule
def test_wrong_shapes_and_dtypes_are_refused(name: str) -> None:
    for shape in ((), (3,), (2, 3), (0, 0), (4, 2, 3), (4, 0, 0)):
        with pytest.raises(ValueError, match=r"gram: expected \[\.\.\., K, K\]"):
            bound(name)(torch.zeros(shape, dtype=torch.float64))
    for dtype in (torch.int64, torch.bool, torch.complex128):
        with pytest.raises(TypeError, match="gram: expected a real floating-point matrix"):
            bound(name)(torch.ones(2, 2, dtype=dtype))
    with pytest.raises(TypeError):
        bound(name)(torch.eye(2), no_such_option=1.0)


class _NoQuestions(TorchDispatchMode):
    """Fails on every operation that would make the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = (
            "_local_scalar_dense",
            "item",
            "nonzero",
            "is_nonzero",
            "unique",
            "masked_select",
            "equal",
            "is_all_true",
        )
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in asked, f"{func.name()} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


@every_rule
@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_host_never_waits_for_the_device(name: str, number: int) -> None:
    _, _, grams = zoo.stacked(number, "random")
    with _NoQuestions():
        bound(name)(grams)
    assert bound(name)(grams.to("meta")).device.type == "meta"  # no values there to look at


@promising(lambda facts: 0 if facts.degree is None else ANY)
def test_scaling_all_rows_scales_the_coefficients_by_its_degree(name: str, number: int) -> None:
    degree = facts_of(name).degree or 0
    kinds, rows, grams = zoo.stacked(number)
    plain = bound(name)(grams)
    for power in (-100, -30, 30, 100):  # 2^100 = 1.3e30, and powers of two are exact
        s = 2.0**power
        same_updates(name, kinds, rows, bound(name)(grams * s**2) * s**-degree, rows, plain)
    kinds, rows, grams = zoo.stacked(number, *ORDINARY)
    plain = bound(name)(grams)
    for s in (1e-30, 1e-7, 3.0, 1e7, 1e30):
        same_updates(name, kinds, rows, bound(name)(grams * s**2) * s**-degree, rows, plain)


@promising(lambda facts: max(facts.helps_all, facts.protects))
def test_the_update_keeps_its_promise_not_to_conflict(name: str, number: int) -> None:
    facts = facts_of(name)
    start = 0 if number <= facts.helps_all else 1
    kinds, rows, grams = zoo.stacked(number)
    coefficients = bound(name)(grams)
    for z, kind in enumerate(kinds):
        if kind in facts.unbounded:
            continue
        products = (grams[z] @ coefficients[z])[start:]
        scale = lengths(rows[z])[start:] * size_of(name, coefficients[z], rows[z])
        tolerance = tolerances.ILL_CONDITIONED if kind in NEARLY_DEPENDENT else tolerances.QUADRATIC_PROGRAM
        close(
            products.clamp_max(0.0)[None],
            torch.zeros_like(products)[None],
            tolerance,
            scale=scale,
            names=(f"{name} on {kind}",),
        )


@promising(lambda facts: facts.identity)
def test_without_conflict_the_forget_row_is_left_alone(name: str, number: int) -> None:
    kinds, _, grams = zoo.stacked(
        number, "no_conflict", "identical", "parallel", "nearly_parallel", "zero", "zero_forget"
    )
    grams = torch.where((torch.tensor([kind == "zero_forget" for kind in kinds]))[:, None, None], grams.abs(), grams)
    expected = torch.zeros(len(grams), number, dtype=torch.float64)
    expected[:, 0] = 1.0
    assert torch.equal(bound(name)(grams), expected)


@promising(lambda facts: facts.rescaling)
def test_rescaling_a_protected_row_leaves_the_update_alone(name: str, number: int) -> None:
    kinds, rows, grams = zoo.stacked(number)
    plain = bound(name)(grams)
    for row in range(1, number):
        for factor in (2.0**-20, 2.0**20):
            stretched = torch.ones(number, dtype=torch.float64)
            stretched[row] = factor
            found = bound(name)(grams * stretched[:, None] * stretched)
            same_updates(name, kinds, rows * stretched[:, None], found, rows, plain)


@promising(lambda facts: max(facts.symmetric, facts.protected_symmetric))
def test_permuting_rows_permutes_coefficients(name: str, number: int) -> None:
    facts = facts_of(name)
    fixed = 0 if number <= facts.symmetric else 1
    kinds, rows, grams = zoo.stacked(number)
    plain = bound(name)(grams)
    generator = torch.Generator().manual_seed(number)
    for _ in range(3):
        moved = torch.cat([torch.arange(fixed), fixed + torch.randperm(number - fixed, generator=generator)])
        found = bound(name)(grams[:, moved][:, :, moved])
        same_updates(name, kinds, rows[:, moved], found, rows, plain)


@every_rule
def test_one_row_alone(name: str) -> None:
    expected = facts_of(name).alone
    found = bound(name)(torch.tensor([[4.0]], dtype=torch.float64))
    assert found.isfinite().all()
    if expected is not None:
        close(found, torch.tensor([expected], dtype=torch.float64), tolerances.SAME)


@every_rule
@every_size
def test_the_update_depends_on_the_matrix_alone(name: str, number: int) -> None:
    """Rotating all rows rotates the update: the reason why a Gram matrix is all that a rule needs."""
    kinds, rows, grams = zoo.stacked(number, *ORDINARY)
    if name == "hamu":
        kinds, rows, grams = zoo.stacked(number, "random")
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(zoo.DIMENSION, zoo.DIMENSION, dtype=torch.float64, generator=generator))[0]
    turned = rows @ rotation
    same_updates(name, kinds, turned, bound(name)(zoo.gram_of(turned)), turned, bound(name)(grams))


# ---------------------------------------------------------------------------------------------------------------------------------
# Equivalences and closed forms
# ---------------------------------------------------------------------------------------------------------------------------------


def two_rows() -> tuple[Tensor, Tensor]:
    """Rows ``[200, 2, 8]`` of lengths 1e-3 .. 1e3 in every relation, and their matrices."""
    generator = torch.Generator().manual_seed(2)
    stretch = 10.0 ** (6.0 * torch.rand(200, 2, 1, generator=generator, dtype=torch.float64) - 3.0)
    rows = zoo.random_rows(2, 200, seed=1, dimension=3) * stretch
    rows = torch.nn.functional.pad(rows, (0, zoo.DIMENSION - 3))
    return rows, zoo.gram_of(rows)


OPTIONS: dict[str, list[dict[str, float]]] = {
    "gradient_difference": [{}, {"gamma": 0.5, "alpha": 2.0}, {"alpha": 0.0}],
    "gem": [{}, {"margin": 0.3}, {"margin": -0.3}],
    "cos_clip": [{}, {"floor": -0.1}, {"floor": -1.0}, {"floor": 0.0}],
    "gradvac": [{}, {"target": 0.4}, {"target": -0.4}],
    "blur": [{}, {"gamma": 0.25}],
    "orthograd": [{}, {"gamma": 0.5, "alpha": 2.0}, {"alpha": 0.0}],
    "cagrad": [{}, {"c": 0.0}, {"c": 0.2}, {"c": 0.9}],
}
CASES = [(name, options) for name in reference.TWO_ROWS for options in OPTIONS.get(name, [{}])]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_closed_form_for_two_rows(name: str, options: dict[str, float]) -> None:
    rows, grams = two_rows()
    if name in ("hamu", "hamu_u", "gem"):  # options with units: keep the lengths moderate
        rows = rows / lengths(rows)[..., None] * torch.tensor([[2.0], [0.7]])
        grams = zoo.gram_of(rows)
    options = {**facts_of(name).options, **options}
    found = rules.RULES[name](grams, **options)
    expected = torch.tensor(
        [reference.TWO_ROWS[name](float(g[0, 0]), float(g[1, 1]), float(g[0, 1]), **options) for g in grams],
        dtype=torch.float64,
    )
    scale = torch.maximum(size_of(name, found, rows), size_of(name, expected, rows))[:, None]
    # The closed form of Aligned-MTL takes a difference of two traces, and CAGrad's a quotient by one.
    tolerance = tolerances.ITERATIVE_ORACLE if name in ("aligned_mtl", "cagrad") else tolerances.OUT_OF_ORDER
    close(found * lengths(rows), expected * lengths(rows), tolerance, scale=scale)


def test_every_rule_has_a_closed_form_for_two_rows() -> None:
    assert set(reference.TWO_ROWS) == set(FACTS)


@pytest.mark.parametrize(
    "other", [rules.a_gem, rules.gradvac, rules.gem, functools.partial(rules.cos_clip, floor=-1.0)]
)
def test_gru_for_two_rows_is(other: Callable[[Tensor], Tensor]) -> None:
    rows, grams = two_rows()
    found, expected = other(grams), rules.gru(grams)
    close(found * lengths(rows), expected * lengths(rows), tolerances.SAME, scale=lengths(rows)[:, :1])


def test_gru_for_two_rows_is_written_in_one_line() -> None:
    _, grams = two_rows()
    expected = (-grams[:, 0, 1]).clamp_min(0.0) / grams[:, 1, 1]
    close(rules.gru(grams)[:, 1], expected, tolerances.SAME, scale=expected + 1e-300)
    assert bool((rules.gru(grams)[:, 0] == 1.0).all())
    gem = rules.gem(grams, margin=0.5)[:, 1]
    expected = (0.5 - grams[:, 0, 1]).clamp_min(0.0) / grams[:, 1, 1]
    close(gem, expected, tolerances.SAME, scale=expected + 1e-300)


def test_upgrad_for_two_rows_is_half_of_pcgrad() -> None:
    _, grams = two_rows()
    expected = rules.pcgrad(grams) / 2.0
    close(rules.upgrad(grams), expected, tolerances.SAME, scale=expected)


def test_ngdiff_imtl_g_and_nash_mtl_go_the_same_way_for_two_rows() -> None:
    rows, grams = two_rows()
    ways = [
        torch.nn.functional.normalize(update(rule(grams), rows), dim=-1)
        for rule in (rules.ngdiff, rules.imtl_g, rules.nash_mtl)
    ]
    close(ways[1], ways[0], tolerances.OUT_OF_ORDER)
    close(ways[2], ways[0], tolerances.OUT_OF_ORDER)


def test_gradient_difference_with_weights_of_one_is_the_sum() -> None:
    _, _, grams = zoo.stacked(4)
    assert torch.equal(rules.gradient_difference(grams, gamma=1.0, alpha=1.0), rules.sum(grams))


def test_cos_clip_conflicts_by_exactly_what_lies_below_its_floor() -> None:
    rows, grams = two_rows()
    for floor in (-0.9, -0.5, 0.0):
        coefficients = rules.cos_clip(grams, floor=floor)
        product = (grams @ coefficients[..., None])[:, 1, 0]
        both = lengths(rows).prod(-1)
        cosine = grams[:, 0, 1] / both
        expected = torch.where(cosine < 0.0, (cosine - floor).clamp_max(0.0), cosine) * both
        close(product, expected, tolerances.SAME, scale=both)


@every_size
def test_blur_always_forgets_by_gamma(number: int) -> None:
    kinds, rows, grams = zoo.stacked(number, *ORDINARY, "identical", "parallel", "opposite")
    for gamma in (1.0, 0.3):
        coefficients = rules.blur(grams, gamma=gamma)
        product = (grams @ coefficients[..., None])[:, 0, 0]
        scale = lengths(rows)[:, 0] * (coefficients.abs() * lengths(rows)).amax(-1)
        close(product[:, None], gamma * grams[:, :1, 0], tolerances.SAME, scale=scale[:, None], names=kinds)


@every_size
def test_imtl_g_adds_up_to_one(number: int) -> None:
    kinds, _, grams = zoo.stacked(number)
    coefficients = rules.imtl_g(grams)
    total = coefficients.sum(-1, keepdim=True)
    expected = torch.tensor(
        [[0.0 if kind == "zero" or (number == 1 and "zero" in kind) else 1.0] for kind in kinds], dtype=torch.float64
    )
    close(total, expected, tolerances.OUT_OF_ORDER, scale=coefficients.abs().amax(-1, keepdim=True) + 1.0, names=kinds)


@pytest.mark.parametrize("number", [3, 4, 5])
def test_imtl_g_projects_equally_on_every_row(number: int) -> None:
    rows = zoo.random_rows(number, 50, seed=number)
    projections = (zoo.gram_of(rows) @ rules.imtl_g(zoo.gram_of(rows))[..., None]).squeeze(-1) / lengths(rows)
    scale = size_of("imtl_g", rules.imtl_g(zoo.gram_of(rows)), rows)[:, None]
    close(projections, projections[:, :1].expand_as(projections), tolerances.SAME, scale=scale)


@every_size
def test_nash_mtl_is_a_bargain(number: int) -> None:
    kinds, _, grams = zoo.stacked(number, *ORDINARY, "identical", "parallel", "nearly_parallel", "different_lengths")
    coefficients = rules.nash_mtl(grams)
    bargain = coefficients * (grams @ coefficients[..., None]).squeeze(-1)
    close(bargain, torch.ones_like(bargain), tolerances.OUT_OF_ORDER, names=kinds)


def test_nash_mtl_says_nothing_where_rounding_has_left_no_bargain() -> None:
    """Float32 products of nearly opposite rows may be the products of no rows, for which no coefficients exist."""
    generator = torch.Generator().manual_seed(0)
    answers = 0
    for noise in (1e-3, 3e-4, 1e-4, 1e-5):
        for _ in range(20):
            forget, noised, free = torch.randn(3, 50, generator=generator)
            rows = torch.stack([forget, noise * noised - forget, free])
            gram = (rows @ rows.T).double()
            coefficients = rules.nash_mtl(gram)
            if coefficients.isnan().any():
                assert coefficients.isnan().all()
                continue
            answers += 1
            assert (coefficients > 0.0).all()
            assert (coefficients * (gram @ coefficients) - 1.0).abs().max() < 0.05
    assert 20 < answers < 80


@every_size
def test_identical_rows_share_their_weight(number: int) -> None:
    _, _, grams = zoo.stacked(number, "identical")
    for rule in (rules.mgda, rules.imtl_g, rules.aligned_mtl, rules.upgrad, rules.ngdiff, rules.nash_mtl):
        coefficients = rule(grams)
        close(coefficients, coefficients[:, :1].expand_as(coefficients), tolerances.OUT_OF_ORDER)


def test_opposite_rows() -> None:
    gram = torch.tensor([[4.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)
    rows = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    expected = {
        "gru": 0.0,
        "a_gem": 0.0,
        "gem": 0.0,
        "gu": 0.0,
        "cos_clip": 1.0,
        "gradvac": 0.0,
        "ngdiff": 0.0,
        "mgda": 0.0,
    }
    for name, length in expected.items():
        close(update(bound(name)(gram), rows), torch.tensor([length], dtype=torch.float64), tolerances.OUT_OF_ORDER)
    assert not rules.nash_mtl(gram).isfinite().all()


def test_blur_and_hamu_beyond_their_formulas() -> None:
    zero_forget = torch.diag(torch.tensor([0.0, 4.0], dtype=torch.float64))
    assert rules.blur(zero_forget)[1] == 1.0
    hamu = functools.partial(rules.hamu, gain=1.0, radius=1.0)
    close(
        hamu(torch.tensor([[0.25, 0.1], [0.1, 4.0]])), torch.tensor([2.0, 0.0]).double(), tolerances.SAME
    )  # out of reach
    close(
        hamu(torch.tensor([[4.0, 3.9], [3.9, 4.0]]).double()), torch.tensor([0.0, 0.5]).double(), tolerances.SAME
    )  # no need
    close(
        hamu(torch.tensor([[4.0, -4.0], [-4.0, 4.0]])), torch.tensor([0.25, 0.0]).double(), tolerances.SAME
    )  # opposite
    close(
        hamu(torch.diag(torch.tensor([4.0, 0.0]))), torch.tensor([0.25, 0.0]).double(), tolerances.SAME
    )  # nothing to retain


def test_hamu_u_is_hamu_with_the_rows_exchanged() -> None:
    rows = torch.cat([zoo.random_rows(2, 40, seed=60), zoo.degenerate_rows(2, 40, seed=61)])
    grams = zoo.gram_of(rows)
    for gain in (0.0, 0.3, 1.0):
        expected = rules.hamu(grams.flip(-1, -2), gain=gain, radius=1.0).flip(-1)
        close(rules.hamu_u(grams, gain=gain, radius=1.0), expected, tolerances.SAME)


@pytest.mark.parametrize("number", [2, 3, 5])
def test_orthograd_leaves_no_sample_a_share_of_the_forget_row(number: int) -> None:
    rows = torch.cat([zoo.random_rows(number, 40, seed=62), zoo.degenerate_rows(number, 40, seed=63)])
    grams = zoo.gram_of(rows)
    without_mean = rules.orthograd(grams, alpha=0.0)
    close(without_mean, rules.gu(grams), tolerances.SAME)
    products = (grams @ without_mean[..., None]).squeeze(-1)[:, 1:]
    close(products, torch.zeros_like(products), tolerances.OUT_OF_ORDER, scale=lengths(rows)[:, :1] + 1.0)


@every_size
def test_a_margin_in_the_units_of_the_matrix(number: int) -> None:
    kinds, rows, grams = zoo.stacked(number, "random", "random_again", "no_conflict", "conflict_with_all")
    for margin in (0.2, -0.2):
        coefficients = rules.gem(grams, margin=margin)
        slack = (grams @ coefficients[..., None]).squeeze(-1)[:, 1:] - margin
        scale = lengths(rows)[:, 1:] * size_of("gem", coefficients, rows)[:, None]
        if number > 1:
            close(slack.clamp_max(0.0), torch.zeros_like(slack), tolerances.QUADRATIC_PROGRAM, scale=scale, names=kinds)
        for power in (-100, 100):
            stretched = rules.gem(grams * 4.0**power, margin=margin * 4.0**power)
            close(stretched, coefficients, tolerances.SAME, scale=coefficients.abs().amax(-1, keepdim=True))


def test_an_infeasible_margin_gives_non_finite_coefficients_for_itself_alone() -> None:
    row = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    forget = torch.tensor([[0.0, 1.0, 1.0], [-3.0, 0.0, 2.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    for length in (1e-3, 1.0, 1e3):
        infeasible = torch.stack([torch.stack([f, row, -length * row]) for f in forget])
        for margin in (1e-6, 1e-2, 1.0, 1e3):
            assert not rules.gem(zoo.gram_of(infeasible), margin=margin).isfinite().all(-1).any()
    feasible = torch.stack([forget[0], row, 2.0 * row])
    mixed = zoo.gram_of(torch.stack([feasible, infeasible[0]]))
    assert rules.gem(mixed, margin=0.5).isfinite().all(-1).tolist() == [True, False]
    assert rules.gem(zoo.gram_of(infeasible), margin=-0.5).isfinite().all()


def test_pcgrad_draws_its_order_from_the_generator() -> None:
    rows = zoo.random_rows(5, 30, seed=9, dimension=3)
    rows = torch.nn.functional.pad(rows, (0, 5))
    grams = zoo.gram_of(rows)
    draws = [rules.pcgrad(grams, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(5, generator=generator).tolist() for _ in range(5)]
    expected = np.stack([reference.pcgrad(r, orders=orders) for r in rows.numpy()])
    close(
        update(draws[0], rows),
        torch.from_numpy(expected),
        tolerances.SAME,
        scale=size_of("pcgrad", draws[0], rows)[:, None],
    )


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (rules.cos_clip, {"floor": 0.1}),
        (rules.cos_clip, {"floor": -1.1}),
        (rules.cos_clip, {"floor": math.nan}),
        (rules.gradvac, {"target": 1.0}),
        (rules.gradvac, {"target": -1.0}),
        (rules.gradvac, {"target": math.nan}),
        (rules.cagrad, {"c": -0.1}),
        (rules.cagrad, {"c": math.nan}),
        (rules.hamu, {"gain": -1.0, "radius": 1.0}),
        (rules.hamu, {"gain": 1.0, "radius": 0.0}),
        (rules.hamu, {"gain": math.nan, "radius": 1.0}),
    ],
)
def test_options_out_of_range_are_refused(rule: Callable[..., Tensor], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        rule(torch.eye(2), **options)


def test_hamu_has_no_default_gain_and_radius() -> None:
    with pytest.raises(TypeError, match="gain"):
        rules.hamu(torch.eye(2))


@pytest.mark.parametrize("rule", [rules.mgda, rules.cagrad])
def test_rules_that_enumerate_subsets_say_how_many_rows_they_take(rule: Callable[[Tensor], Tensor]) -> None:
    assert rule(torch.eye(10, dtype=torch.float64)).isfinite().all()
    with pytest.raises(ValueError, match="at most 10 rows, found 11"):
        rule(torch.eye(11, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------------------
# Oracles on explicit vectors
# ---------------------------------------------------------------------------------------------------------------------------------


def against_oracle(name: str, rows: Tensor, tolerance: tolerances.Tolerance, **options: float) -> None:
    coefficients = rules.RULES[name](zoo.gram_of(rows), **options)
    expected = torch.from_numpy(np.stack([reference.ORACLES[name](r, **options) for r in rows.numpy()]))
    scale = torch.maximum(size_of(name, coefficients, rows), expected.norm(dim=-1)).clamp_min(
        torch.finfo(torch.float64).tiny
    )
    close(
        update(coefficients, rows), expected, tolerance, scale=scale[:, None], names=tuple(map(str, range(len(rows))))
    )


SEARCHED = {"cagrad", "hamu", "hamu_u"}  # their oracles stop early
FULL_RANK_ONLY = {
    "imtl_g",
    "nash_mtl",
    "hamu",
    "hamu_u",
    "cagrad",
    "gem",
}  # their oracles need it; degenerate cases have tests of their own


@pytest.mark.parametrize("number", [2, 3, 4, 5])
@pytest.mark.parametrize("name", reference.ORACLES)
def test_oracle_on_random_rows(name: str, number: int) -> None:
    rows = zoo.random_rows(number, 15, seed=10 + number)
    tolerance = tolerances.ITERATIVE_ORACLE if name in SEARCHED else tolerances.OUT_OF_ORDER
    for options in OPTIONS.get(name, [{}]):
        against_oracle(name, rows, tolerance, **{**facts_of(name).options, **options})


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", sorted(set(reference.ORACLES) - FULL_RANK_ONLY))
def test_oracle_on_degenerate_rows(name: str, number: int) -> None:
    against_oracle(name, zoo.degenerate_rows(number, 40, seed=20 + number), tolerances.OUT_OF_ORDER)


@pytest.mark.parametrize("name", ["gru", "gu", "orthograd", "gradvac", "blur", "pcgrad", "a_gem", "ngdiff", "upgrad"])
@every_size
def test_oracle_on_the_zoo(name: str, number: int) -> None:
    for animal in zoo.animals(number):
        # Rows of lengths 1e-30 .. 1e30 are beyond the oracle where it does not normalise them itself.
        if "different_lengths" in animal.name and name == "upgrad":
            continue
        tolerance = tolerances.ILL_CONDITIONED if animal.name in NEARLY_DEPENDENT else tolerances.OUT_OF_ORDER
        against_oracle(name, animal.rows[None], tolerance)


@pytest.mark.parametrize("protected", [8, 12])
@pytest.mark.parametrize("dimension", [3, 10, 40])
def test_gru_with_many_protected_rows(protected: int, dimension: int) -> None:
    rows = zoo.random_rows(protected + 1, 20, seed=protected, dimension=dimension)
    rows = torch.cat([rows, rows.sign() * (rows.abs() > 1.0)])
    against_oracle("gru", rows, tolerances.OUT_OF_ORDER)


def test_gru_with_two_protected_rows_case_by_case() -> None:
    rows = torch.cat([zoo.random_rows(3, 100, seed=5, dimension=2), zoo.degenerate_rows(3, 100, seed=6)[..., :2]])
    dependent_first = rows.clone()
    dependent_first[:50, 2] = -1.5 * rows[:50, 1]
    for system in (rows, dependent_first):
        grams = zoo.gram_of(system)
        expected = torch.ones(len(system), 3, dtype=torch.float64)
        for z, g in enumerate(grams.tolist()):
            expected[z, 1], expected[z, 2] = reference.gru_two_protected(g[0][1], g[0][2], g[1][1], g[1][2], g[2][2])
        scale = lengths(system).amax(-1, keepdim=True) + 1e-300
        close(update(rules.gru(grams), system), update(expected, system), tolerances.OUT_OF_ORDER, scale=scale)


def test_one_constraint_after_another_is_not_a_solution() -> None:
    """Where GRU's exact program and the projection one by one differ, the first is right: the second breaks the first constraint."""
    rows = torch.tensor([[-1.0, -1.0], [1.0, 0.0], [-1.0, 2.0]], dtype=torch.float64)
    gram = zoo.gram_of(rows)
    kept = (gram @ rules.gru(gram))[1:]
    broken = (gram @ rules.gradvac(gram))[1:]
    close(kept.clamp_max(0.0), torch.zeros_like(kept), tolerances.QUADRATIC_PROGRAM)
    assert float(broken.min()) < -0.1


@pytest.mark.parametrize("c", [0.0, 0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_cagrad_is_optimal_on_degenerate_rows_too(number: int, c: float) -> None:
    rows = torch.cat([zoo.degenerate_rows(number, 60, seed=30 + number), zoo.random_rows(number, 20, seed=31)])
    for r, coefficients in zip(rows, rules.cagrad(zoo.gram_of(rows), c=c), strict=True):
        check_cagrad(r, coefficients, c)


def check_cagrad(rows: Tensor, coefficients: Tensor, c: float) -> None:
    """Within the ball, and as good for the worst-off row as some point of the dual problem proves to be possible at most."""
    scale = max(float(lengths(rows).max()), 1e-300)
    rows = rows / scale
    mean, u = rows.mean(0), coefficients @ rows
    radius = c * mean.norm()
    close((u - mean).norm().clamp_min(radius), radius, tolerances.ITERATIVE_ORACLE)
    worst = (rows @ u).min()
    least = torch.from_numpy(reference.mgda(rows.numpy()))
    bounds = [least @ mean + radius * least.norm(), (rows @ mean + radius * lengths(rows)).min()]
    weights = coefficients - 1.0 / len(rows)
    if bool((weights >= 0.0).all()) and float(weights.sum()) > 0.0:
        point = weights / weights.sum() @ rows
        bounds.append(point @ mean + radius * point.norm())
    close(worst, torch.stack(bounds).min(), tolerances.ITERATIVE_ORACLE)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_hamu_is_feasible_and_gains_most_on_degenerate_rows(number: int) -> None:
    gain, radius = 0.5, 1.0
    for rows in zoo.degenerate_rows(number, 60, seed=40 + number):
        forget, retain = rows[0], rows[1:].sum(0)
        coefficients = rules.hamu(zoo.gram_of(rows), gain=gain, radius=radius)
        u = coefficients @ rows
        assert u.isfinite().all()
        close(u.norm().clamp_min(radius), torch.tensor(radius).double(), tolerances.OUT_OF_ORDER)
        if gain > radius * forget.norm():
            continue
        close((forget @ u).clamp_max(gain), torch.tensor(gain).double(), tolerances.OUT_OF_ORDER)
        if forget.norm() * retain.norm() > abs(forget @ retain) * (1.0 + 1e-9):
            best = torch.from_numpy(reference.hamu(rows.numpy(), gain=gain, radius=radius)) @ retain
            close(retain @ u, best, tolerances.ITERATIVE_ORACLE, scale=float(retain.norm()))


@pytest.mark.parametrize("number", [2, 3, 4, 5])
@pytest.mark.parametrize("margin", [0.3, -0.3])
def test_gem_with_a_margin_on_degenerate_rows(number: int, margin: float) -> None:
    rows = zoo.degenerate_rows(number, 60, seed=50 + number)
    rows = rows[(lengths(rows)[:, 1:] > 0.0).all(-1)]  # no step of any kind gains on a zero row
    found = rules.gem(zoo.gram_of(rows), margin=margin)
    met = 0
    for r, coefficients in zip(rows, found, strict=True):
        # A margin can be met if and only if 0 is not in the hull of the protected rows, when it is positive.
        if margin > 0.0 and np.linalg.norm(reference.mgda(r[1:].numpy())) < 1e-6:
            assert not coefficients.isfinite().all()
            continue
        met += 1
        expected = torch.from_numpy(reference.gem(r.numpy(), margin=margin))
        close(coefficients @ r, expected, tolerances.OUT_OF_ORDER, scale=float(size_of("gem", coefficients, r)))
    assert met > 5


# ---------------------------------------------------------------------------------------------------------------------------------
# Conditions of optimality on generated rows
# ---------------------------------------------------------------------------------------------------------------------------------

some_examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def row_systems(draw: st.DrawFn) -> Tensor:
    """Two to five rows of small integers in up to four dimensions, each stretched by a power of ten, some nearly equal to others."""
    number, dimension = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    entries = draw(st.lists(st.integers(-2, 2), min_size=number * dimension, max_size=number * dimension))
    rows = torch.tensor(entries, dtype=torch.float64).view(number, dimension)
    if draw(st.booleans()):
        shift = draw(st.sampled_from([1e-3, 1e-6, 1e-9, 1e-12]))
        rows = (
            rows + shift * torch.arange(1.0, number * dimension + 1, dtype=torch.float64).view(number, dimension).sin()
        )
    powers = draw(st.lists(st.integers(-3, 3), min_size=number, max_size=number))
    return rows * 10.0 ** torch.tensor(powers, dtype=torch.float64)[:, None]


@some_examples
@given(row_systems())
def test_gru_meets_the_conditions_of_its_program(rows: Tensor) -> None:
    gram = zoo.gram_of(rows)
    for rule in (rules.gru, rules.gem):
        coefficients = rule(gram)
        multipliers, products = coefficients[1:] * lengths(rows)[1:], (gram @ coefficients)[1:]
        scale = float(gram[0, 0].sqrt() + multipliers.abs().max())
        assert coefficients[0] == 1.0
        assert bool((multipliers >= 0.0).all())
        slack = products / lengths(rows)[1:].clamp_min(torch.finfo(torch.float64).tiny)
        zero = torch.zeros_like(slack)
        close(slack.clamp_max(0.0), zero, tolerances.ILL_CONDITIONED, scale=scale + 1e-300)
        close(torch.minimum(slack, multipliers), zero, tolerances.ILL_CONDITIONED, scale=scale + 1e-300)


@some_examples
@given(row_systems())
def test_upgrad_meets_the_conditions_of_its_programs(rows: Tensor) -> None:
    gram = zoo.gram_of(rows)
    coefficients = rules.upgrad(gram)
    assert bool((coefficients >= 1.0 / len(rows)).all())
    slack = (gram @ coefficients) / lengths(rows).clamp_min(torch.finfo(torch.float64).tiny)
    scale = float(size_of("upgrad", coefficients, rows)) + 1e-300
    close(slack.clamp_max(0.0), torch.zeros_like(slack), tolerances.ILL_CONDITIONED, scale=scale)
    close(
        coefficients @ rows, torch.from_numpy(reference.upgrad(rows.numpy())), tolerances.ILL_CONDITIONED, scale=scale
    )


@some_examples
@given(row_systems())
def test_mgda_meets_the_conditions_of_its_program(rows: Tensor) -> None:
    gram = zoo.gram_of(rows)
    weights = rules.mgda(gram)
    close(weights.sum(), torch.tensor(float(bool(gram.any()))).double().clamp_min(weights.sum()), tolerances.SAME)
    assert bool((weights >= 0.0).all())
    u = weights @ rows
    longest = float(lengths(rows).max()) + 1e-300
    close(
        (rows @ u - u @ u).clamp_max(0.0), torch.zeros(len(rows)).double(), tolerances.ILL_CONDITIONED, scale=longest**2
    )


@pytest.mark.parametrize("length", [1e-5, 1e-7, 1e-10])
def test_mgda_is_as_exact_for_rows_far_shorter_than_another(length: float) -> None:
    """Orthogonal rows have the weights 1 / |row|^2, scaled to sum 1."""
    rows = torch.diag(torch.tensor([1.0, length, 2.0 * length], dtype=torch.float64))
    weights = rules.mgda(zoo.gram_of(rows))
    close(weights[1:], torch.tensor([0.8, 0.2], dtype=torch.float64), tolerances.ILL_CONDITIONED, scale=1.0)


def test_gradvacs_target_stays_where_its_correction_is_finite() -> None:
    """Parallel rows have the cosine 1, at which any other row would need an infinite correction."""
    rule = rules.GradVac(beta=0.5)
    for cosine, target in ((1.0, 0.999999), (-1.0, -0.999999)):
        rule.load_state_dict({"target": None})
        for _ in range(60):
            rule(torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64))
            rule.commit()
        assert rule.state_dict() == {"target": [target]}
        assert rule(torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)).isfinite().all()


@some_examples
@given(row_systems(), st.sampled_from([0.1, 0.5, 1.0, 1.5]))
def test_cagrad_meets_the_conditions_of_its_program(rows: Tensor, c: float) -> None:
    check_cagrad(rows, rules.cagrad(zoo.gram_of(rows), c=c), c)


@some_examples
@given(row_systems())
def test_matrices_of_float32_products_still_have_an_answer(rows: Tensor) -> None:
    """Such matrices are semidefinite only up to rounding, so that an exact solution may not exist. A promise may then hold only approximately."""
    gram = gram_module.gram([[row.float()] for row in rows])
    norms = gram.diagonal().sqrt()
    for name in rules.RULES:
        if name == "nash_mtl":
            continue
        coefficients = bound(name)(gram)
        assert coefficients.isfinite().all(), name
        if name in ("gru", "gem", "upgrad"):
            forget = norms[0] if name != "upgrad" else norms.max()
            slack = (gram @ coefficients) / norms.clamp_min(1e-300)
            close(
                slack[1:].clamp_max(0.0),
                torch.zeros(len(rows) - 1).double(),
                tolerances.ROUNDED_GRAM,
                scale=forget + 1e-300,
            )


def test_nearly_opposite_protected_rows_of_one_small_tensor() -> None:
    """Per-tensor surgery meets scalars and vectors of two elements: three rows there depend on each other, up to rounding."""
    generator = torch.Generator().manual_seed(3)
    for dimension in (1, 2):
        systems = torch.randn(500, 3, dimension, generator=generator)
        grams = torch.stack([gram_module.gram([[row] for row in rows]) for rows in systems])
        for rule in (rules.gru, rules.upgrad, rules.cos_clip):
            assert rule(grams).isfinite().all()
        slack = (grams @ rules.gru(grams)[..., None]).squeeze(-1)[:, 1:]
        norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
        close(slack.clamp_max(0.0), torch.zeros_like(slack), tolerances.ROUNDED_GRAM, scale=norms[:, :1] * norms[:, 1:])


# ---------------------------------------------------------------------------------------------------------------------------------
# The rule with a memory
# ---------------------------------------------------------------------------------------------------------------------------------


def sequence(number: int = 3, count: int = 6) -> Tensor:
    return zoo.gram_of(zoo.random_rows(number, count, seed=70))


def test_gradvac_is_a_stateful_rule_and_the_others_are_not() -> None:
    assert isinstance(rules.GradVac(), rules.StatefulRule)
    assert not isinstance(rules.gradvac, rules.StatefulRule)


def test_gradvac_starts_at_a_target_of_zero() -> None:
    gram = sequence()[0]
    assert torch.equal(rules.GradVac()(gram), rules.gradvac(gram))
    assert rules.GradVac().state_dict() == {"target": None}


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5, 1.0])
def test_gradvac_target_follows_the_cosines(beta: float) -> None:
    rule, target = rules.GradVac(beta=beta), 0.0
    for gram in sequence(number=2):
        expected = rules.gradvac(gram, target=min(max(target, -1.0 + 1e-15), 1.0 - 1e-15))
        close(rule(gram), expected, tolerances.OUT_OF_ORDER, scale=expected.abs().max())
        rule.commit()
        cosine = float(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt())
        target = (1.0 - beta) * target + beta * cosine
        close(torch.tensor(rule.state_dict()["target"]), torch.tensor([target]), tolerances.SAME)


def test_gradvac_keeps_a_target_for_each_protected_row() -> None:
    """Each target follows the cosine of its row with the update so far, as in the paper's loop."""
    rule, targets = rules.GradVac(beta=0.3), [0.0, 0.0, 0.0]
    rows = zoo.random_rows(4, 5, seed=71)
    for r in rows:
        u = r[0].clone()
        for k in range(1, 4):
            cosine = float(u @ r[k] / (u.norm() * r[k].norm()))
            if cosine < targets[k - 1]:
                u = torch.from_numpy(reference.gradvac(torch.stack([u, r[k]]).numpy(), target=targets[k - 1]))
            targets[k - 1] = 0.7 * targets[k - 1] + 0.3 * cosine
        close(rule(zoo.gram_of(r)) @ r, u, tolerances.OUT_OF_ORDER)
        rule.commit()
        close(torch.tensor(rule.state_dict()["target"]), torch.tensor(targets), tolerances.OUT_OF_ORDER)


def test_gradvac_changes_nothing_without_a_commit() -> None:
    grams = sequence()
    rule = rules.GradVac(beta=0.5)
    rule(grams[0])
    rule.commit()
    before, answer = rule.state_dict(), rule(grams[1])
    rule(grams[2])
    assert rule.state_dict() == before
    assert torch.equal(rule(grams[1]), answer)
    rule.commit()
    after = rule.state_dict()
    assert after != before
    rule.commit()  # no call since the last commit
    assert rule.state_dict() == after


def test_gradvac_commits_the_latest_call_alone() -> None:
    grams = sequence()
    tried, direct = rules.GradVac(beta=0.5), rules.GradVac(beta=0.5)
    tried(grams[0])
    tried(grams[1])
    tried.commit()
    direct(grams[1])
    direct.commit()
    assert tried.state_dict() == direct.state_dict()


def test_gradvac_commits_nothing_before_its_first_call() -> None:
    rule = rules.GradVac()
    rule.commit()
    assert rule.state_dict() == {"target": None}


@pytest.mark.parametrize("through", ["torch", "json"])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_gradvac_resumes_exactly(through: str, blocks: bool, begun: bool) -> None:
    grams = sequence(count=6)
    steps = grams.view(3, 2, 3, 3) if blocks else grams[:3]
    rule = rules.GradVac(beta=0.4)
    if begun:
        rule(steps[0])
        rule.commit()
    if through == "json":
        state = json.loads(json.dumps(rule.state_dict()))
    else:
        file = io.BytesIO()
        torch.save(rule.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    resumed = rules.GradVac(beta=0.4)
    resumed(steps[2])  # a call without a commit, which loading discards
    resumed.load_state_dict(state)
    resumed.commit()
    assert resumed.state_dict() == rule.state_dict()
    for gram in steps[1:]:
        assert torch.equal(resumed(gram), rule(gram))
        resumed.commit()
        rule.commit()
    assert resumed.state_dict() == rule.state_dict()


def test_gradvac_on_several_blocks_is_one_gradvac_each() -> None:
    steps = sequence(count=6).view(3, 2, 3, 3)
    together, apart = rules.GradVac(beta=0.4), [rules.GradVac(beta=0.4) for _ in range(2)]
    for grams in steps:
        expected = torch.stack([rule(gram) for rule, gram in zip(apart, grams, strict=True)])
        close(together(grams), expected, tolerances.SAME)
        for rule in (together, *apart):
            rule.commit()


def test_gradvac_refuses_a_matrix_that_its_target_does_not_fit() -> None:
    rule = rules.GradVac()
    rule(sequence()[0])
    rule.commit()
    with pytest.raises(ValueError, match="make a new GradVac"):
        rule(sequence(number=4)[0])
    with pytest.raises(ValueError, match="make a new GradVac"):
        rule(sequence())
    for wrong in (torch.zeros(()), torch.zeros(2), torch.zeros(2, 3), torch.zeros(0, 0)):
        with pytest.raises(ValueError, match="gram: expected"):
            rules.GradVac()(wrong)
    with pytest.raises(TypeError, match="floating-point"):
        rules.GradVac()(torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_gradvac_refuses_a_weight_outside_0_and_1(beta: float) -> None:
    with pytest.raises(ValueError, match="beta: expected"):
        rules.GradVac(beta=beta)


def test_gradvac_answers_a_non_finite_matrix_by_nan() -> None:
    gram = sequence()[0].clone()
    gram[1, 2] = math.nan
    assert rules.GradVac()(gram).isnan().all()


def test_gradvac_never_looks_at_a_value() -> None:
    rule = rules.GradVac(beta=0.4)
    grams = sequence()
    rule(grams[0])
    rule.commit()
    with _NoQuestions():
        rule(grams[1])
        rule.commit()


# ---------------------------------------------------------------------------------------------------------------------------------
# Any callable is a rule
# ---------------------------------------------------------------------------------------------------------------------------------

TORCHJD = {
    "MeanWeighting": functools.partial(rules.gradient_difference, gamma=0.5, alpha=0.5),
    "SumWeighting": rules.sum,
    "MGDAWeighting": rules.mgda,
    "PCGradWeighting": rules.pcgrad,
    "IMTLGWeighting": rules.imtl_g,
    "AlignedMTLWeighting": rules.aligned_mtl,
}
"""Those that need no solver of their own, and what they are called here."""


@pytest.mark.parametrize("name", TORCHJD)
def test_weightings_of_torchjd_are_rules_and_agree_with_ours_for_two_rows(name: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation", reason="needs torchjd")
    weighting = getattr(aggregation, name)()
    for rows in zoo.random_rows(2, 20, seed=70):
        gram = zoo.gram_of(rows)
        # Its MGDA is 100 Frank-Wolfe steps; the others are exact in float64 up to their cut-offs.
        close(weighting(gram).double(), TORCHJD[name](gram), tolerances.ITERATIVE_ORACLE, scale=2.0)
    models = mlp(), mlp()
    for model, rule in zip(models, (weighting, TORCHJD[name]), strict=True):
        optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), rule=rule)
        contexts(model, optimizer, classification(), range(4))
    close(values(models[0]), values(models[1]), tolerances.ITERATIVE_ORACLE)
