"""What losses of rows refuse, with and without their kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradsurgery.losses import kl_divergence, logit_margin, undial, uniform

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: kl_divergence(torch.zeros(3), torch.zeros(3)), ValueError, r"\[N, V\]"),
        (lambda: kl_divergence(torch.zeros(3, 4), torch.zeros(3, 5)), ValueError, "vocabulary"),
        (lambda: kl_divergence(torch.zeros(3, 4).long(), torch.zeros(3, 4)), TypeError, "floating"),
        (lambda: kl_divergence(torch.zeros(3, 4), torch.zeros(3, 4).long()), TypeError, "reference_logits"),
        (lambda: uniform(torch.zeros(2, 3, 4)), ValueError, "answer_tokens"),
        (lambda: undial(torch.zeros(3, 4), torch.zeros(2).long(), torch.zeros(3, 4)), ValueError, "expected"),
        (lambda: undial(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, 4)), TypeError, "integers"),
        (lambda: undial(torch.zeros(3, 4), torch.zeros(3).long(), torch.zeros(1, 4)), ValueError, "reference_logits"),
        (lambda: undial(torch.zeros(3, 4), torch.zeros(3).long(), torch.zeros(3, 4), -1.0), ValueError, "beta"),
        (lambda: undial(torch.zeros(3, 4), torch.zeros(3).long(), torch.zeros(3, 4), float("nan")), ValueError, "beta"),
        (lambda: logit_margin(torch.zeros(3, 4), torch.zeros(4).long()), ValueError, "labels"),
        (lambda: logit_margin(torch.zeros(3, 4), torch.zeros(3)), TypeError, "integers"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Tensor], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("label", [-1, -101, 4])
def test_a_label_that_is_no_token_is_refused(label: int) -> None:
    labels = torch.tensor([0, label, -100])
    with pytest.raises(ValueError, match=f"labels: expected -100 or one of 4 tokens, found {label}"):
        undial(torch.zeros(3, 4), labels, torch.zeros(3, 4))
