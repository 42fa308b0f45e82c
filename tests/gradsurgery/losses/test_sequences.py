"""Losses per sequence against their textbook forms, and the way from tokens to sequences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradsurgery.losses import (
    answer_lengths,
    answer_tokens,
    cross_entropy,
    dpo,
    gradient_ascent,
    npo,
    sequence_sum,
    simnpo,
)
from tests.reference import row_losses as reference
from tests.tolerances import LOSS, close

DISTANCES = [-1e30, -1e4, -300.0, -21.0, -1.0, 0.0, 1e-8, 1.0, 21.0, 25.0, 300.0, 900.0, 5e3]
BETAS = [0.1, 1.0, 4.5]


def losses(distance: Tensor, beta: float) -> dict[str, Tensor]:
    """Each loss where its argument is `distance`, with nll of other sizes."""
    zero, seven = torch.zeros_like(distance), torch.full_like(distance, 4.0)
    lengths = torch.full(distance.shape, 4)
    return {
        "npo": npo(distance, zero, beta),
        "simnpo": simnpo(4 * distance, lengths, beta, 0.0),
        "dpo": dpo(seven, distance, seven, zero, beta),
        "dpo, chosen": dpo(-distance, seven, zero, seven, beta),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", BETAS)
def test_value_and_gradient_equal_the_textbook_to_the_last_digits(beta: float, dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    for name in ("npo", "simnpo", "dpo", "dpo, chosen"):
        distance = torch.tensor(DISTANCES, dtype=torch.float64).to(dtype).requires_grad_()
        values = losses(distance, beta)[name]
        assert values.dtype == wide
        weights = torch.linspace(-1, 2, len(DISTANCES), dtype=wide)
        (values * weights).sum().backward()
        assert distance.grad.dtype == dtype
        for x, weight, value, slope in zip(
            distance.tolist(), weights.tolist(), values.tolist(), distance.grad.tolist(), strict=True
        ):
            expected, expected_slope = reference.exact_preference(x, beta)
            smallest = torch.finfo(wide).smallest_normal * LOSS[wide].relative + torch.finfo(wide).tiny
            # Gradients pass a factor 2 / beta that is not among their digits.
            assert abs(value - expected) <= LOSS[wide].relative * expected + 20 * smallest
            assert (
                abs(slope - weight * expected_slope)
                <= LOSS[dtype].relative * abs(weight * expected_slope) + 20 * smallest
            )


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    nll = [
        (9 * torch.randn(5, generator=generator, dtype=torch.float64)).requires_grad_(index < 2) for index in range(4)
    ]
    assert torch.autograd.gradcheck(lambda a: npo(a, nll[2]), nll[0])
    assert torch.autograd.gradcheck(lambda a: simnpo(a, torch.arange(1, 6), 2.0, 0.5), nll[0])
    assert torch.autograd.gradcheck(lambda a, b: dpo(a, b, nll[2], nll[3], 0.7), nll[:2])


def test_defaults_are_open_unlearnings_and_the_papers_margin_is_beta_times_delta() -> None:
    nll, other = torch.tensor([[5.0, 60.0], [8.0, 20.0]], dtype=torch.float64)
    lengths = torch.tensor([2, 30])
    assert torch.equal(npo(nll, other), npo(nll, other, 0.1))
    assert torch.equal(dpo(nll, other, other, nll), dpo(nll, other, other, nll, 0.1))
    assert torch.equal(simnpo(nll, lengths), simnpo(nll, lengths, 4.5, 0.0))
    papers = -2 / 4.5 * torch.sigmoid(4.5 * nll / lengths - 1.8).log()
    close(simnpo(nll, lengths, delta=0.4), papers, LOSS[torch.float64])


def test_dpo_with_an_indifferent_refusal_is_npo_and_twice_over_beta_the_standard_loss() -> None:
    chosen, rejected, old = torch.tensor([[3.0, 9.0], [40.0, 2.0], [7.0, 7.0]])
    assert torch.equal(dpo(chosen, rejected, chosen, old, 0.3), npo(rejected, old, 0.3))
    standard = -torch.sigmoid(0.3 * ((old - chosen) - (7.0 - rejected))).log()
    close(dpo(chosen, rejected, old, torch.full((2,), 7.0), 0.3), 2 / 0.3 * standard, LOSS[torch.float32], scale=100.0)


def test_npo_starts_as_gradient_ascent_on_the_sum_of_the_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 7, 11, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(11, (3, 7), generator=generator)
    labels[0, :5], labels[1, :2], labels[2, 3:] = -100, -100, -100
    tokens = answer_tokens(logits, labels)
    nll = sequence_sum(cross_entropy(*tokens), labels)
    found = torch.autograd.grad(npo(nll, nll).sum(), logits, retain_graph=True)[0]
    close(found, torch.autograd.grad(gradient_ascent(*tokens).sum(), logits)[0], LOSS[torch.float64])


def test_references_are_constants() -> None:
    nll = [torch.ones(3, requires_grad=True) for _ in range(4)]
    (npo(nll[0], nll[2]) + dpo(nll[0], nll[1], nll[2], nll[3])).sum().backward()
    assert nll[2].grad is None
    assert nll[3].grad is None
    assert nll[1].grad is not None


def test_what_is_not_finite_is_not_hidden_and_stays_in_its_sequence() -> None:
    bad, good = torch.tensor([torch.nan, -torch.inf, 1.0]), torch.ones(3)
    for values in (npo(bad, good), simnpo(bad, torch.ones(3).long()), dpo(good, bad, good, good), npo(good, -bad)):
        assert values.isfinite().tolist() == [False, False, True]
    nll = torch.tensor([torch.nan, 1.0], requires_grad=True)
    npo(nll, torch.ones(2)).sum().backward()
    assert nll.grad.isnan().tolist() == [True, False]


def test_a_sequence_without_an_answer_is_a_constant_for_npo_and_refused_by_simnpo() -> None:
    labels = torch.tensor([[-100, 3, 4], [-100, -100, -100], [5, -100, -100]])
    values = torch.ones(2, requires_grad=True)
    nll = sequence_sum(values, labels)
    loss = npo(nll, torch.zeros(3))
    close(loss[1:], torch.full((2,), 20 * 0.6931471805599453), LOSS[torch.float32], scale=10.0)
    loss.sum().backward()
    assert values.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"sequences \[1, 2\]"):
        simnpo(nll, answer_lengths(labels))


LABELS = [
    [[-100, -100, 5, 6, 7, -100], [-100, 3, 4, -100, 8, 9]],  # padding on the right, two spans
    [[-100, -100, -100, 1, 2, 3], [4, 5, 6, 7, 8, 9], [-100] * 6],  # on the left, an unpredicted label, no answer
    [[-100], [5]],
    [[-100] * 4] * 3,
]


@pytest.mark.parametrize("skip_first", [0, 1, 2, 9])
@pytest.mark.parametrize("labels", LABELS)
def test_sums_and_lengths_are_those_of_a_loop_over_the_answer_tokens(labels: list[list[int]], skip_first: int) -> None:
    answers = reference.answers(labels, skip_first)
    values = torch.arange(1.0, len(answers) + 1).requires_grad_()
    sums, lengths = [0.0] * len(labels), [0] * len(labels)
    for (sequence, _), value in zip(answers, values.tolist(), strict=True):
        sums[sequence] += value
        lengths[sequence] += 1
    found = sequence_sum(values, torch.tensor(labels), skip_first=skip_first)
    assert found.tolist() == sums
    assert answer_lengths(torch.tensor(labels), skip_first=skip_first).tolist() == lengths
    weights = torch.arange(1.0, len(labels) + 1)
    (found * weights).sum().backward()
    assert values.grad.tolist() == [sequence + 1.0 for sequence, _ in answers]


def test_sums_of_half_precision_values_have_float32_digits() -> None:
    labels = torch.zeros(1, 1002, dtype=torch.long)
    assert sequence_sum(torch.full((1001,), 1.0, dtype=torch.bfloat16), labels).tolist() == [1001.0]
    nll, old = torch.tensor([[100.5, 64.0], [0.125, 0.25]], dtype=torch.bfloat16)
    assert torch.equal(npo(nll, old), npo(nll.float(), old.float()))
    assert torch.equal(dpo(old, nll, nll, old), dpo(old.float(), nll.float(), nll.float(), old.float()))
    assert sequence_sum(torch.ones(1001, dtype=torch.float64), labels).dtype == torch.float64


def test_no_sequences_give_no_values() -> None:
    labels, none = torch.zeros(0, 5, dtype=torch.long), torch.zeros(0)
    assert answer_lengths(labels).shape == sequence_sum(none, labels).shape == (0,)
    assert simnpo(none, torch.zeros(0)).shape == npo(none, none).shape == (0,)


ONE = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: npo(torch.ones(()), torch.ones(())), ValueError, "sequence_sum"),
        (lambda: npo(ONE, torch.ones(1)), ValueError, "reference_nll"),
        (lambda: npo(ONE[:, None], ONE[:, None]), ValueError, "nll"),
        (lambda: npo(ONE.long(), ONE), TypeError, "floating"),
        (lambda: npo(ONE, ONE, 0.0), ValueError, "beta"),
        (lambda: npo(ONE, ONE, float("nan")), ValueError, "beta"),
        (lambda: simnpo(ONE, torch.ones(1)), ValueError, "lengths"),
        (lambda: simnpo(ONE, ONE, -1.0), ValueError, "beta"),
        (lambda: simnpo(ONE, torch.tensor([1, 0, -2])), ValueError, r"\[1, 2\]"),
        (lambda: dpo(ONE, ONE, ONE, torch.ones(2)), ValueError, "reference_rejected_nll"),
        (lambda: dpo(ONE, ONE, ONE, ONE, 0.0), ValueError, "beta"),
        (lambda: sequence_sum(ONE, torch.zeros(1, 3).long()), ValueError, "skip_first"),
        (lambda: sequence_sum(ONE, torch.zeros(4).long()), ValueError, r"\[B, T\]"),
        (lambda: answer_lengths(torch.zeros(4).long()), ValueError, r"\[B, T\]"),
        (lambda: answer_lengths(torch.zeros(1, 4).long(), skip_first=-1), ValueError, "skip_first"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Tensor], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
