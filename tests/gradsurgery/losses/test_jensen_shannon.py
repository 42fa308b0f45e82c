"""JensUn's two losses: the divergence from a reference with 250 digits, and the bounded row of the label's."""

from __future__ import annotations

import math

import pytest
import torch

from gradsurgery.losses import jensen_shannon, jensen_shannon_label
from tests.gradsurgery.losses.test_rows import CASES
from tests.reference import row_losses as reference
from tests.tolerances import LOSS

ROUNDED = {torch.float64: 1e-11, torch.float32: 2e-3, torch.bfloat16: 2e-2}
"""Absolute errors: logits of 1e4 have log-probabilities of this accuracy, and the rows 3 significant digits in bfloat16."""


@pytest.mark.parametrize("dtype", list(ROUNDED))
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_250_digits(case: str, dtype: torch.dtype) -> None:
    logits, _, others = (value.to(dtype) if value.is_floating_point() else value for value in CASES[case]())
    logits.requires_grad_()
    values = jensen_shannon(logits, others)
    values.sum().backward()
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.grad is not None
    large = "all" in case or case == "spread"
    value_error = (
        (ROUNDED[torch.float64 if dtype == torch.float64 else torch.float32]) if large else LOSS[values.dtype].relative
    )
    row_error = ROUNDED[dtype] if large else LOSS[dtype].relative
    for row, other, value, gradient in zip(
        logits.tolist(), others.tolist(), values.tolist(), logits.grad.double(), strict=True
    ):
        expected, expected_row = reference.exact("jensen_shannon", row, other, 0, 0.0)
        assert abs(value - expected) <= value_error
        assert (gradient - torch.tensor(expected_row, dtype=torch.float64)).norm() <= row_error


def test_it_is_symmetric_bounded_and_zero_for_the_same() -> None:
    logits, _, others = CASES["ordinary"]()
    close_to = torch.testing.assert_close
    close_to(jensen_shannon(logits, others), jensen_shannon(others, logits))
    close_to(jensen_shannon(logits, logits + 3.0), torch.zeros(len(logits), dtype=logits.dtype), atol=1e-15, rtol=0)
    apart = torch.eye(3, dtype=torch.float64) * 2e4
    close_to(jensen_shannon(apart, apart.roll(1, 0)), torch.full((3,), math.log(2.0), dtype=torch.float64))


def test_what_one_of_them_excludes_is_finite_and_not_a_number_is_not_hidden() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 1.0, torch.nan], [-torch.inf, 0.0, 0.0]], requires_grad=True)
    others = torch.tensor([[0.0, 2.0, -torch.inf], [0.0, 1.0, 2.0], [-torch.inf, 0.0, 0.0]])
    values = jensen_shannon(logits, others)
    p, q = torch.softmax(logits.detach()[0].double(), 0), torch.softmax(others[0].double(), 0)
    m = (p + q) / 2
    expected = (torch.xlogy(p, p / m).sum() + torch.xlogy(q, q / m).sum()) / 2
    torch.testing.assert_close(values[0].double(), expected, rtol=1e-6, atol=0)
    assert values[1].isnan()
    assert values[2] == 0.0
    values[0].backward()
    assert logits.grad is not None
    assert logits.grad[0].isfinite().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        jensen_shannon(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TypeError):
        jensen_shannon(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))


def test_the_row_of_the_label_loss_is_bounded_and_vanishes_where_the_label_is_excluded() -> None:
    """|dL/dz_t| = q (1 - q) log((1 + q) / q) / 2 <= .155."""
    odds = torch.linspace(-60, 60, 2001, dtype=torch.float64, requires_grad=True)
    logits = torch.stack([odds, torch.zeros_like(odds)], 1)
    values = jensen_shannon_label(logits, torch.zeros(2001, dtype=torch.int64))
    values.sum().backward()
    q, rest = torch.sigmoid(odds.detach()), torch.sigmoid(-odds.detach())
    assert odds.grad is not None
    exact = 0.5 * q * rest * torch.log(q / (1 + q))
    torch.testing.assert_close(odds.grad, exact, rtol=1e-9, atol=1e-300)
    assert 0.15 < float(-odds.grad.min()) < 0.155
    assert float(values[0].detach()) == pytest.approx(math.log(2.0))
