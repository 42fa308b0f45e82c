"""Every loss per token against its textbook form: value, gradient, and where ordinary arithmetic breaks down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gradsurgery as gs
from tests.reference import losses as reference
from tests.tolerances import LOSS

pytestmark = pytest.mark.usefixtures("path")

NAMES = list(gs.losses.LOSSES)
VOCABULARY = 17


def batch(margin: float | None = None, offset: float = 0.0, n: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 logits and labels; the label's logit `margin` above the largest other one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (n,), generator=generator)
    if margin is not None:
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
        logits.scatter_(1, labels[:, None], others + margin)
    return logits + offset, labels


CASES = {
    "ordinary": {},
    "forgotten": {"margin": -30.0},
    "long forgotten": {"margin": -80.0},
    "nearly certain": {"margin": 18.0},
    "certain": {"margin": 200.0},
    "all large": {"offset": 1e4},
    "all very negative": {"offset": -1e4},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_textbook_to_the_last_digits(name: str, case: str, dtype: torch.dtype) -> None:
    logits, labels = batch(**CASES[case])
    if dtype == torch.float16 and "offset" in CASES[case]:
        pytest.skip("1e4 and its neighbours are 8 apart in float16")
    logits = logits.to(dtype).requires_grad_()
    values = gs.losses.LOSSES[name](logits, labels)
    weights = torch.linspace(-1, 2, len(labels), dtype=values.dtype)
    (values * weights).sum().backward()
    tolerance = LOSS[dtype].relative
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    for row, label, value, gradient, weight in zip(
        logits.tolist(), labels.tolist(), values.tolist(), logits.grad.double(), weights.tolist(), strict=True
    ):
        expected, expected_row = reference.exact(name, row, label)
        # The value is computed in at least float32; a relative error: a vanishing loss has right digits too. The inverted hinge is a
        # difference of numbers near 1, so its error is absolute.
        size = 1.0 if name == "inverted_hinge" else abs(expected)
        assert abs(value - expected) <= LOSS[torch.float64 if dtype == torch.float64 else torch.float32].relative * max(
            size, 1e-37
        )
        wanted = torch.tensor(expected_row, dtype=torch.float64) * weight
        smallest = torch.finfo(dtype).smallest_normal * tolerance + torch.finfo(dtype).tiny
        assert (gradient - wanted).norm() <= tolerance * wanted.norm() + smallest


@pytest.mark.parametrize("name", NAMES)
def test_autograd_of_the_textbook_form_agrees(name: str) -> None:
    logits, labels = batch(seed=3)
    logits.requires_grad_()
    gs.losses.LOSSES[name](logits, labels).sum().backward()
    for index, label in enumerate(labels.tolist()):
        row = logits.detach()[index].clone().requires_grad_()
        value = getattr(reference, name)(row, label)
        value.backward()
        torch.testing.assert_close(logits.grad[index], row.grad, rtol=LOSS[torch.float64].relative, atol=1e-14)
        torch.testing.assert_close(
            gs.losses.LOSSES[name](logits, labels)[index], value, rtol=LOSS[torch.float64].relative, atol=1e-12
        )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("weighted_gradient_ascent", "satimp")])
def test_gradcheck(name: str) -> None:
    logits, labels = batch(seed=4)
    assert torch.autograd.gradcheck(lambda z: gs.losses.LOSSES[name](z, labels), logits.requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_a_second_backward_through_a_retained_graph_gives_the_same(name: str) -> None:
    logits, labels = batch(seed=5)
    loss = gs.losses.LOSSES[name](logits.requires_grad_(), labels).sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0])


@pytest.mark.parametrize("name", NAMES)
def test_ignored_tokens_give_zero_and_no_gradient(name: str) -> None:
    logits, labels = batch(seed=6)
    labels[1:3] = -100
    logits[2, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])  # padding may hold anything
    logits = logits.float().requires_grad_()
    values = gs.losses.LOSSES[name](logits, labels)
    assert values[1] == values[2] == 0
    values.sum().backward()
    assert (logits.grad[1:3] == 0).all()
    assert (logits.grad[[0, 3, 4]].abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gathered", [True, False])
def test_an_all_masked_batch_gives_a_zero_loss_with_a_zero_gradient(name: str, gathered: bool) -> None:
    logits = torch.randn(2, 4, VOCABULARY, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.full((2, 4), -100)
    tokens = gs.losses.answer_tokens(logits, labels) if gathered else (logits.flatten(0, 1), labels.flatten())
    loss = gs.losses.token_mean(gs.losses.LOSSES[name](*tokens), tokens[1])
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_where_all_other_tokens_are_excluded_the_label_is_certain(name: str, dtype: torch.dtype) -> None:
    logits = torch.full((2, VOCABULARY), -torch.inf, dtype=dtype)
    logits[0, 0], logits[1, 7] = 1.0, -3.0
    near = torch.where(logits.isinf(), -1e4, logits).requires_grad_()
    logits.requires_grad_()
    values, others = (gs.losses.LOSSES[name](rows, torch.tensor([0, 7])) for rows in (logits, near))
    if name not in ("ceu", "unlikelihood"):  # theirs have no bound
        torch.testing.assert_close(values, others, rtol=1e-6, atol=0)
    found, expected = (torch.autograd.grad(value.sum(), rows)[0] for value, rows in ((values, logits), (others, near)))
    kept = torch.zeros_like(found, dtype=torch.bool)
    kept[0, 0] = kept[1, 7] = True
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-6, atol=0)
    assert (found[~kept] == 0).all()


@pytest.mark.parametrize("margin", [30.0, 60.0, 85.0, 95.0])
def test_the_odds_of_a_runner_up_that_is_certain_have_their_gradient(margin: float) -> None:
    @gs.losses.token_loss(runner_up=True)
    def odds(own: Tensor, runner_up: Tensor) -> Tensor:
        return runner_up + 0.0 * own

    logits, labels = torch.tensor([[0.0, -200.0, -margin, -margin - 1.0] + 30 * [-300.0]]), torch.tensor([1])
    logits.requires_grad_()
    (found,) = torch.autograd.grad(odds(logits, labels).sum(), logits)
    (expected,) = torch.autograd.grad(-logits.double()[:, 1:].logsumexp(1).sum(), logits)
    # In float32 the exponential of -95 has 15 bits.
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=1e-3 if margin > 87 else 1e-5, atol=1e-30)
    assert found[0, 0] == 1.0


@pytest.mark.parametrize("name", ["cross_entropy", "ceu", "inverted_hinge"])
@pytest.mark.parametrize(
    "row", [[0.0, -194.4, -150.0, -150.0], [0.0, -150.0, -150.0, -170.0], [-torch.inf, 0.0, -120.0, -torch.inf]]
)
def test_far_below_a_certain_token_gradients_are_numbers(name: str, row: list[float]) -> None:
    label = torch.tensor([row.index(min(row))])
    logits = torch.tensor([row], requires_grad=True)
    (found,) = torch.autograd.grad(gs.losses.LOSSES[name](logits, label).sum(), logits)
    expected = torch.tensor([[1.0 if i == int(label) else -1.0 if i == 0 + (row[0] < 0) else 0.0 for i in range(4)]])
    torch.testing.assert_close(found, -expected if name == "cross_entropy" else torch.zeros(1, 4), rtol=1e-5, atol=1e-6)


def test_a_steep_slope_by_a_certain_runner_up_does_not_overflow() -> None:
    @gs.losses.token_loss(runner_up=True)
    def steep(own: Tensor, runner_up: Tensor) -> Tensor:
        return 50.0 * runner_up + 0.0 * own

    logits = torch.tensor([[0.0, -200.0, -200.0]], requires_grad=True)
    (found,) = torch.autograd.grad(steep(logits, torch.tensor([1])).sum(), logits)
    assert found.isfinite().all()
    assert found[0, 0] == 50.0


@pytest.mark.parametrize("name", ["cross_entropy", "ceu", "inverted_hinge"])
def test_a_row_that_is_no_distribution_gives_no_number(name: str) -> None:
    for row in ([-torch.inf] * 3, [torch.nan, -torch.inf, -torch.inf], [0.0, torch.inf, 1.0], [0.0, torch.nan, 1.0]):
        logits = torch.tensor([row], requires_grad=True)
        values = gs.losses.LOSSES[name](logits, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert values.isnan().all(), row
        assert gradient.isnan().any(), row


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_upstream_gradients_gives_each_its_own(name: str) -> None:
    logits, labels = batch()
    logits = logits.float().requires_grad_()
    values = gs.losses.LOSSES[name](logits, labels)
    outer = torch.eye(len(values))
    (found,) = torch.autograd.grad(values, logits, outer, is_grads_batched=True, retain_graph=True)
    expected = torch.stack([torch.autograd.grad(values, logits, one, retain_graph=True)[0] for one in outer])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_nan_in_a_token_that_counts_is_not_hidden() -> None:
    logits, labels = batch()
    logits[0, 0] = torch.nan
    for name in NAMES:
        assert gs.losses.LOSSES[name](logits, labels)[0].isnan()


def test_ceu_is_bounded_where_ascent_is_not() -> None:
    logits, labels = batch(margin=-25.0)
    logits.requires_grad_()
    gs.losses.ceu(logits, labels).sum().backward()
    assert logits.grad.abs().sum() < 1e-8
    logits.grad = None
    gs.losses.gradient_ascent(logits, labels).sum().backward()
    assert logits.grad.abs().sum() > 1.9 * len(labels)


def test_answer_tokens_shifts_masks_and_skips_the_first_of_each_answer() -> None:
    logits = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    labels = torch.tensor([[-100, -100, 5, 6, 7, -100], [-100, 3, 4, -100, 8, 9]])  # the second has two spans
    kept, tokens = gs.losses.answer_tokens(logits, labels)
    assert tokens.tolist() == [5, 6, 7, 3, 4, 8, 9]
    assert torch.equal(
        kept,
        torch.stack([logits[0, 1], logits[0, 2], logits[0, 3], logits[1, 0], logits[1, 1], logits[1, 3], logits[1, 4]]),
    )
    assert gs.losses.answer_tokens(logits, labels, skip_first=1)[1].tolist() == [6, 7, 4, 8, 9]
    assert gs.losses.answer_tokens(logits, labels, skip_first=9)[1].tolist() == []


def test_answer_tokens_counts_skipped_tokens_before_the_shift() -> None:
    labels = torch.tensor([[4, 5, 6]])  # the label at position 0 is an answer token that nothing predicts
    assert gs.losses.answer_tokens(torch.zeros(1, 3, 9), labels, skip_first=1)[1].tolist() == [5, 6]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_answer_tokens_do_not_depend_on_the_side_of_the_padding(padding: str) -> None:
    core, pad = [-100, 7, 8, 9], [-100, -100]
    labels = torch.tensor([pad + core if padding == "left" else core + pad])
    assert gs.losses.answer_tokens(torch.zeros(1, 6, 12), labels, skip_first=1)[1].tolist() == [8, 9]


@pytest.mark.parametrize(
    ("logits", "labels", "error"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), ValueError),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), ValueError),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), ValueError),
        (torch.zeros(3, 4), torch.zeros(3), TypeError),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_and_types_are_refused(name: str, logits: Tensor, labels: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        gs.losses.LOSSES[name](logits, labels)


@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_a_label_that_is_no_token_is_refused(label: int) -> None:
    logits = torch.zeros(2, VOCABULARY, requires_grad=True)
    with pytest.raises(ValueError, match=f"labels: expected -100 or one of {VOCABULARY} tokens, found {label}"):
        gs.losses.ceu(logits, torch.tensor([-100, label]))


def test_wrong_answer_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        gs.losses.answer_tokens(torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="skip_first"):
        gs.losses.answer_tokens(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), skip_first=-1)
    with pytest.raises(ValueError, match="ceu"):
        gs.losses.by_name("ceuu")
