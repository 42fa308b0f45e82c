"""The gradient of every loss of logits: refused where a second one is wanted, and taken for many at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradsurgery import losses
from tests.tolerances import LOSS, close

pytestmark = pytest.mark.usefixtures("path")
LABELS = torch.tensor([0, 3, -100])
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda logits, _: losses.cross_entropy(logits, LABELS),
    "ceu": lambda logits, _: losses.ceu(logits, LABELS),
    "inverted_hinge": lambda logits, _: losses.inverted_hinge(logits, LABELS),
    "kl_divergence": lambda logits, other: losses.kl_divergence(logits, other),
    "uniform": lambda logits, _: losses.uniform(logits),
    "undial": lambda logits, other: losses.undial(logits, LABELS, other),
    "jensen_shannon": lambda logits, other: losses.jensen_shannon(logits, other),
    "logit_margin": lambda logits, _: losses.logit_margin(logits, LABELS),
}


@pytest.mark.parametrize("whole", [Tensor.sum, lambda values: values.square().sum()], ids=["linear", "square"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_second_derivative_is_refused_and_not_taken_for_zero(
    loss: Callable[[Tensor, Tensor], Tensor], whole: Callable[[Tensor], Tensor]
) -> None:
    head, other = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="expected a first derivative, found create_graph=True"):
        torch.autograd.grad(whole(loss(torch.randn(3, 5).tanh() @ head, other)), head, create_graph=True)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_of_many_at_once_are_those_of_each(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits, other, many = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), torch.randn(5, 3)
    values = loss(logits, other)
    (found,) = torch.autograd.grad(values, logits, many, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(loss(logits, other), logits, one)[0] for one in many]
    close(found, torch.stack(expected), LOSS[torch.float32], scale=1.0)
