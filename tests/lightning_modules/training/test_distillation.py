"""Forgetting by imitating a model that never learned: the divergence from the teacher, and nothing of the start model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

import lightning_modules as lm
from lightning_modules.training import objectives
from tests.lightning_modules.training.test_objectives import FAMILIES, batches, gradients, logits_of, make
from tests.tolerances import LINEAR, close


def divergence(model: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    """KL(teacher || model), a row and a token at a time."""
    found = []
    for row, other, labels in zip(logits_of(model, batch), logits_of(teacher, batch), batch["labels"], strict=True):
        for place in (t - 1 for t in range(1, len(labels)) if labels[t] != -100):
            q, p = log_softmax(other[place].detach(), -1), log_softmax(row[place], -1)
            found.append((q.exp() * (q - p)).sum())
    return torch.stack(found).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_divergence_from_the_teacher_whatever_the_start_model(family: str) -> None:
    model, teacher, data = make(family), make(family, 1), batches()
    module = lm.UnlearningModule(
        model,
        forget_loss=objectives.distillation(lm.references.SecondModel(teacher)),
        reference=lm.references.SecondModel(make(family, 2)),
    )
    found = module.objectives["forget"](module, data, "forget")
    wanted = divergence(model, teacher, data["forget"])
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=LINEAR[torch.float64].relative)
    close(gradients(found, model), gradients(wanted, model), LINEAR[torch.float64])


def test_a_model_that_says_what_the_teacher_says_has_nothing_to_forget() -> None:
    model, data = make("Llama"), batches()
    module = lm.UnlearningModule(model, forget_loss=objectives.distillation(lm.references.SecondModel(make("Llama"))))
    loss = module.objectives["forget"](module, data, "forget")
    assert abs(float(loss.detach())) < 1e-12
    assert float(gradients(loss, model).abs().max()) < 1e-12


def test_a_teacher_without_a_model_or_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a teacher"):
        objectives.distillation(lm.references.SecondModel())
    model, data = make("Llama"), batches()
    module = lm.UnlearningModule(model, forget_loss=objectives.distillation(lm.references.SecondModel(model)))
    with pytest.raises(ValueError, match="another model"):
        module.objectives["forget"](module, data, "forget")
