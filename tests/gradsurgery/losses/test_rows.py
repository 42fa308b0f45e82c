"""Losses of whole rows against their textbook forms: value, gradient, and where ordinary arithmetic breaks down."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor

from gradsurgery.losses import _pairs, kl_divergence, logit_margin, undial, uniform
from tests.gradsurgery.losses.test_tokens import VOCABULARY, batch
from tests.reference import row_losses as reference
from tests.tolerances import LOSS, Tolerance, close

pytestmark = pytest.mark.usefixtures("path")

BETA = 10.0
NEAR: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(
        5e-14, "exact log ratios of 1e-4 but for a common shift of 1e-15, which counts by its square"
    ),
    torch.float32: Tolerance(
        2e-5, "exact log ratios of 1e-4 but for a common shift of 3e-7, which counts by its square"
    ),
}
NEAR_ROW: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(5e-15, "exact log ratios, and a common shift that the sum of the row takes out"),
    torch.float32: Tolerance(2e-6, "exact log ratios, and a common shift that the sum of the row takes out"),
}
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kl_divergence": lambda logits, labels, other: kl_divergence(logits, other),
    "uniform": lambda logits, labels, other: uniform(logits),
    "undial": lambda logits, labels, other: undial(logits, labels, other, BETA),
    "logit_margin": lambda logits, labels, other: logit_margin(logits, labels),
}
MASKED = ["undial", "logit_margin"]


def triple(margin: float | None, other: float | None, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, ...]:
    """Logits, labels, reference logits of the same rows; the labels' margins in either."""
    logits, labels = batch(margin, offset, seed=seed)
    others, _ = batch(other, offset, seed=seed + 100)
    if other is not None:
        largest = others.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
        others = others.scatter(1, labels[:, None], largest + other)
    return logits, labels, others


def spread(seed: int = 0) -> tuple[Tensor, ...]:
    """Single logits of +-1e4, at different places in the two rows."""
    logits, labels, others = triple(None, None, seed=seed)
    for row in range(len(logits)):
        logits[row, row], logits[row, row + 1], others[row, row + 2], others[row, 16 - row] = 1e4, -1e4, 1e4, -1e4
    return logits, labels, others


def agreed() -> tuple[Tensor, ...]:
    """Both nearly certain, of the same token; it is not the label."""
    logits, labels, others = triple(18.0, 21.0)
    return logits, (labels + 1) % VOCABULARY, others


CASES: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "ordinary": lambda: triple(None, None),
    "forgotten": lambda: triple(-30.0, 12.0),
    "never known": lambda: triple(-30.0, -80.0),
    "certain": lambda: triple(200.0, 30.0),
    "certain of something else": lambda: triple(200.0, -200.0),
    "all large": lambda: triple(None, None, 1e4),
    "all very negative": lambda: triple(None, None, -1e4),
    "spread": spread,
    "agreed": agreed,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_textbook_to_the_last_digits(name: str, case: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and (case == "spread" or "all" in case):
        pytest.skip("1e4 and its neighbours are 8 apart in float16")
    logits, labels, others = (value.to(dtype) if value.is_floating_point() else value for value in CASES[case]())
    logits.requires_grad_()
    values = LOSSES[name](logits, labels, others)
    weights = torch.linspace(-1, 2, len(labels), dtype=values.dtype)
    (values * weights).sum().backward()
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    relative = LOSS[dtype].relative
    smallest = torch.finfo(dtype).smallest_normal
    for row, label, other, value, gradient, weight in zip(
        logits.tolist(), labels.tolist(), others.tolist(), values.tolist(), logits.grad.double(), weights.tolist(), strict=True
    ):  # fmt: skip
        expected, expected_row = reference.exact(name, row, other, label, BETA)
        assert (
            abs(value - expected)
            <= LOSS[values.dtype].relative * abs(expected) + torch.finfo(values.dtype).smallest_normal
        )
        wanted = torch.tensor(expected_row, dtype=torch.float64) * weight
        assert (gradient - wanted).norm() <= relative * wanted.norm() + smallest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("distance", [2.0**-4, 2.0**-7, 2.0**-13])
def test_distributions_that_hardly_differ_have_a_divergence_with_digits(distance: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Few binary digits, so that the logits' differences are exact and what is left is the loss's own rounding.
    others = (24 * torch.randn(4, 300, generator=generator)).round().to(dtype) / 8
    logits = (others + distance * torch.randint(-4, 5, (4, 300), generator=generator)).requires_grad_()
    values = kl_divergence(logits, others)
    values.sum().backward()
    for row, other, value, gradient in zip(logits.tolist(), others.tolist(), values.tolist(), logits.grad, strict=True):
        expected, expected_row = reference.exact("kl_divergence", row, other, 0, 0.0)
        assert abs(value - expected) <= NEAR[dtype].relative * expected
        wanted = torch.tensor(expected_row, dtype=torch.float64)
        close(gradient.double(), wanted, NEAR_ROW[dtype], scale=wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("distance", [2.0**-4, 2.0**-7, 2.0**-13])
def test_a_distribution_that_is_hardly_not_uniform_has_a_divergence_with_digits(
    distance: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (distance * torch.randint(-4, 5, (4, 300), generator=generator)).to(dtype).requires_grad_()
    values = uniform(logits)
    values.sum().backward()
    for row, value, gradient in zip(logits.tolist(), values.tolist(), logits.grad, strict=True):
        expected, expected_row = reference.exact("uniform", row, [0.0] * 300, 0, 0.0)
        assert abs(value - expected) <= NEAR[dtype].relative * expected
        wanted = torch.tensor(expected_row, dtype=torch.float64)
        close(gradient.double(), wanted, NEAR_ROW[dtype], scale=wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["kl_divergence", "uniform"])
def test_the_two_ways_to_sum_a_divergence_meet(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    others = torch.zeros(40, 300) if name == "uniform" else torch.randn(40, 300, generator=generator)
    steps = torch.linspace(0.5, 1.0, 40)[:, None]
    logits = (others + steps * torch.randn(40, 300, generator=generator)).to(dtype)
    values = LOSSES[name](logits, torch.zeros(40), others.to(dtype))
    assert values.min() < _pairs.LARGE < values.max()
    for one_by_one in range(40):
        row = slice(one_by_one, one_by_one + 1)
        value = LOSSES[name](logits[row], torch.zeros(1), others[row].to(dtype))
        expected, _ = reference.exact(name, logits[one_by_one].tolist(), others[one_by_one].tolist(), 0, 0.0)
        for found in (float(value), float(values[one_by_one])):
            assert abs(found - expected) <= LOSS[dtype].relative / 4 * expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("farthest", "digits"), [(2 * _pairs.NEAR * (1 - 1e-6), 4), (1.0, 12), (30.0, 12)])
def test_a_term_of_the_divergence_has_the_last_digits_of_its_type(
    farthest: float, digits: int, dtype: torch.dtype
) -> None:
    ratios = torch.linspace(-farthest, farthest, 301, dtype=dtype)
    near = (ratios / 2).clamp(-_pairs.NEAR, _pairs.NEAR)
    terms = _pairs._terms(near, (ratios / 2).tanh(), torch.empty_like(near), torch.empty_like(near))
    for ratio, one, other in zip(ratios.tolist(), terms.tolist(), (ratios / 2 - near).tolist(), strict=True):
        with mpmath.workdps(40):
            p = mpmath.exp(ratio)
            expected, value = p - 1 - mpmath.mpf(ratio), (p + 1) * one - 2 * mpmath.mpf(other)
            assert abs(value - expected) <= digits * torch.finfo(dtype).eps * expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_does_not_diverge_from_itself_and_a_divergence_is_never_negative(dtype: torch.dtype) -> None:
    for case in CASES.values():
        logits = case()[0].to(dtype).requires_grad_()
        values = kl_divergence(logits, logits)
        assert torch.equal(values, torch.zeros_like(values))
        values.sum().backward()
        assert torch.equal(logits.grad, torch.zeros_like(logits))
    others = torch.randn(500, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for distance in (1e-9, 1e-6, 1e-3, 1.0):
        assert (kl_divergence(others + distance * torch.rand_like(others), others) >= 0).all()
    assert uniform(torch.full((2, 9), 1e4, dtype=dtype)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", LOSSES)
def test_autograd_of_the_textbook_form_agrees(name: str) -> None:
    logits, labels, others = triple(None, None, seed=3)
    logits.requires_grad_()
    values = LOSSES[name](logits, labels, others)
    values.sum().backward()
    textbook = {
        "kl_divergence": lambda row, label, other: reference.kl_divergence(row, other),
        "uniform": lambda row, label, other: reference.uniform(row),
        "undial": lambda row, label, other: reference.undial(row, label, other, BETA),
        "logit_margin": lambda row, label, other: reference.logit_margin(row),
    }[name]
    for index, label in enumerate(labels.tolist()):
        row = logits.detach()[index].clone().requires_grad_()
        value = textbook(row, label, others[index])
        value.backward()
        close(logits.grad[index], row.grad, LOSS[torch.float64])
        close(values[index], value, LOSS[torch.float64])


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    logits, labels, others = triple(None, None, seed=4)
    labels[1] = -100
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, labels, others), logits.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_blocks_of_rows_give_what_all_rows_at_once_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1, 2 * VOCABULARY, 1000 * VOCABULARY):
        monkeypatch.setitem(_pairs.BLOCKS, "cpu", size)
        logits, labels, others = triple(None, None, seed=5)
        labels[2] = -100
        loss = LOSSES[name](logits.requires_grad_(), labels, others)
        weights = torch.linspace(-1, 2, len(loss), dtype=loss.dtype)
        first = torch.autograd.grad((loss * weights).sum(), logits, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad((loss * weights).sum(), logits)[0])
        found.append((loss.detach(), first))
    for loss, gradient in found[1:]:
        close(loss, found[0][0], LOSS[torch.float64])
        close(gradient, found[0][1], LOSS[torch.float64])


@pytest.mark.parametrize("name", LOSSES)
def test_the_inputs_stay_as_they_were_and_the_reference_gets_no_gradient(name: str) -> None:
    logits, labels, others = triple(None, None, seed=6)
    before = [value.clone() for value in (logits, labels, others)]
    logits.requires_grad_()
    others.requires_grad_()
    LOSSES[name](logits, labels, others).sum().backward()
    assert others.grad is None
    for value, old in zip((logits, labels, others), before, strict=True):
        assert torch.equal(value, old)


def test_tokens_that_the_reference_excludes_have_no_share() -> None:
    logits, labels, others = triple(None, None, seed=7)
    others[:, :3] = -torch.inf
    for margins in (logits, logits.index_fill(1, torch.tensor([0]), -torch.inf)):
        z = margins.clone().requires_grad_()
        values = kl_divergence(z, others)
        values.sum().backward()
        for row, other, value, gradient in zip(z, others, values, z.grad, strict=True):
            kept = torch.softmax(other[3:], -1)
            log_p = torch.log_softmax(row.detach(), -1)
            close(value, (kept * (kept.log() - log_p[3:])).sum(), LOSS[torch.float64])
            close(gradient, log_p.exp() - torch.softmax(other, -1), LOSS[torch.float64])
    values = undial(logits, labels, others)
    assert values.isfinite().all()
    close(values[0], reference.undial(logits[0], int(labels[0]), others[0], BETA), LOSS[torch.float64])


@pytest.mark.parametrize("name", ["kl_divergence", "uniform", "undial", "logit_margin"])
def test_what_only_the_model_excludes_costs_infinitely_much(name: str) -> None:
    logits, labels, others = triple(None, None, seed=8)
    logits[0, (int(labels[0]) + 1) % VOCABULARY] = -torch.inf
    values = LOSSES[name](logits, labels, others)
    assert values[0] == torch.inf
    assert values[1:].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_in_a_token_that_counts_is_not_hidden(name: str, bad: float) -> None:
    logits, labels, others = triple(None, None, seed=9)
    logits[0, 0] = bad
    logits.requires_grad_()
    values = LOSSES[name](logits, labels, others)
    values.sum().backward()
    assert not values[0].isfinite()
    assert not logits.grad[0].isfinite().all()
    assert values[1:].isfinite().all()
    assert logits.grad[1:].isfinite().all()


@pytest.mark.parametrize("name", ["kl_divergence", "undial"])
def test_a_nan_in_the_reference_is_not_hidden(name: str) -> None:
    logits, labels, others = triple(None, None, seed=9)
    others[0, 0] = torch.nan
    values = LOSSES[name](logits, labels, others)
    assert values[0].isnan()
    assert values[1:].isfinite().all()


@pytest.mark.parametrize("name", MASKED)
def test_ignored_tokens_give_zero_and_no_gradient(name: str) -> None:
    logits, labels, others = triple(None, None, seed=10)
    labels[1:3] = -100
    logits[2] = others[2] = torch.nan  # padding may hold anything
    logits.requires_grad_()
    values = LOSSES[name](logits, labels, others)
    assert values[1:3].tolist() == [0.0, 0.0]
    values.sum().backward()
    assert torch.equal(logits.grad[1:3], torch.zeros_like(logits[1:3]))
    assert (logits.grad[[0, 3, 4]].abs().sum(1) > 0).all()
    labels[:] = -100
    logits.grad = None
    LOSSES[name](logits, labels, others).sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_give_no_values(name: str) -> None:
    logits = torch.zeros(0, 7, requires_grad=True)
    values = LOSSES[name](logits, torch.zeros(0, dtype=torch.long), torch.zeros(0, 7))
    assert values.shape == (0,)
    values.sum().backward()
    assert logits.grad.shape == (0, 7)


def test_undial_lowers_only_the_label_and_beta_zero_is_distillation() -> None:
    logits, labels, others = triple(None, None, seed=11)
    entropy = -(others.softmax(1) * others.log_softmax(1)).sum(1)
    close(undial(logits, labels, others, 0.0), kl_divergence(logits, others) + entropy, LOSS[torch.float64])
    lowered = others.scatter_add(1, labels[:, None], torch.full((len(labels), 1), -3.0, dtype=torch.float64))
    close(undial(logits, labels, others, 3.0), undial(logits, labels, lowered, 0.0), LOSS[torch.float64])


def test_a_reference_of_another_type_is_read_as_it_is() -> None:
    logits, _, others = triple(None, None, seed=12)
    half = others.to(torch.bfloat16)
    close(kl_divergence(logits.float(), half), kl_divergence(logits.float(), half.float()), LOSS[torch.float64])


def test_the_largest_logit_of_equals_is_the_first() -> None:
    logits = torch.tensor([[1.0, 7.0, 7.0, 1.0]], requires_grad=True)
    logit_margin(logits).sum().backward()
    assert logits.grad.tolist() == [[-1.5, 4.5, -1.5, -1.5]]
