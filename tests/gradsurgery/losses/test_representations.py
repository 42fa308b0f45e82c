"""Representation misdirection against a loop over tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradsurgery.losses import rmu, rmu_direction
from tests.reference import row_losses as reference
from tests.tolerances import LINEAR, LOSS, close


def states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, target = (torch.randn(4, 6, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 2:], mask[1, 5], mask[2, :3] = True, True, True  # the last sequence has no tokens
    return hidden, target, mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["direction", "states"])
def test_value_equals_a_loop_and_each_sequence_is_divided_by_its_own_length(kind: str, dtype: torch.dtype) -> None:
    hidden, target, mask = states(dtype)
    target = target if kind == "states" else target[0, 0]
    values = rmu(hidden, target, mask)
    assert values.dtype == torch.promote_types(dtype, torch.float32)
    expected = torch.tensor(reference.rmu(hidden, target.expand_as(hidden), mask), dtype=values.dtype)
    close(values, expected, LOSS[values.dtype])
    assert values[3] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_is_twice_the_difference_over_dimension_and_length(dtype: torch.dtype) -> None:
    hidden, target, mask = states(dtype)
    hidden.requires_grad_()
    target.requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.promote_types(dtype, torch.float32))
    (rmu(hidden, target, mask) * weights).sum().backward()
    rmu(hidden.detach().requires_grad_(), target[0, 0], mask).sum().backward()
    assert target.grad is None
    assert hidden.grad.dtype == dtype
    factor = 2 * weights / (5 * mask.sum(1).clamp_min(1))
    expected = (hidden.double() - target.double()) * factor.double()[:, None, None] * mask[..., None]
    close(hidden.grad.double(), expected.detach(), LOSS[dtype])


def test_gradcheck() -> None:
    hidden, target, mask = states()
    assert torch.autograd.gradcheck(lambda h: rmu(h, target, mask), hidden.requires_grad_())


def test_padding_may_hold_anything_and_a_nan_that_counts_is_not_hidden() -> None:
    hidden, target, mask = states()
    hidden[~mask] = target[~mask] = torch.nan
    values = rmu(hidden.requires_grad_(), target, mask)
    values.sum().backward()
    assert values.isfinite().all()
    assert torch.equal(hidden.grad[~mask], torch.zeros_like(hidden.grad[~mask]))
    hidden = hidden.detach()
    hidden[1, 5, 2] = torch.nan
    assert rmu(hidden, target, mask).isnan().tolist() == [False, True, False, False]


def test_all_tokens_masked_gives_zero_and_a_zero_gradient() -> None:
    hidden, target, mask = states()
    values = rmu(hidden.requires_grad_(), target[0, 0], torch.zeros_like(mask))
    values.sum().backward()
    assert values.tolist() == [0.0] * 4
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_a_direction_is_positive_of_the_given_length_and_its_generators() -> None:
    first, again, other = (rmu_direction(4096, 20.0, generator=torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first >= 0).all()
    close(first.norm(), torch.tensor(20.0), LOSS[torch.float32], scale=20.0)
    assert abs(torch.cosine_similarity(first, other, dim=0) - 0.75) < 0.02
    close(rmu_direction(7).norm(), torch.tensor(2.0), LOSS[torch.float32])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: rmu(torch.zeros(2, 3), torch.zeros(3), torch.ones(2).bool()), ValueError, r"\[B, T, d\]"),
        (lambda: rmu(torch.zeros(2, 3, 4), torch.zeros(3), torch.ones(2, 3).bool()), ValueError, r"target \[d\]"),
        (lambda: rmu(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4), torch.ones(2, 3).bool()), ValueError, "target"),
        (lambda: rmu(torch.zeros(2, 3, 4), torch.zeros(4), torch.ones(3, 2).bool()), ValueError, "mask"),
        (lambda: rmu(torch.zeros(2, 3, 4), torch.zeros(4), torch.ones(2, 3).long()), TypeError, "bools"),
        (lambda: rmu(torch.zeros(2, 3, 4).long(), torch.zeros(4), torch.ones(2, 3).bool()), TypeError, "floating"),
        (lambda: rmu_direction(0), ValueError, "dimension"),
        (lambda: rmu_direction(3, float("inf")), ValueError, "coefficient"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Tensor], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_a_direction_is_on_the_device_of_its_generator_whatever_the_default() -> None:
    with torch.device("meta"):
        found = rmu_direction(8, 3.0, generator=torch.Generator("cpu").manual_seed(0))
    close(found.norm(), torch.tensor(3.0), LINEAR[torch.float32])
