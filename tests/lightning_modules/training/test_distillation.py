"""Forgetting by imitating a model that never learned: the divergence from the teacher, and nothing of the start model."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.run.assembly import kind_of_start_model
from lightning_modules.run.options import UnlearnOptions, fitted
from lightning_modules.training import objectives
from lightning_modules.training.finish import finishing_module
from tests.lightning_modules.training.test_objectives import FAMILIES, batches, gradients, logits_of, make
from tests.tolerances import LINEAR, close


def divergence(model: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    """KL(teacher || model), a row and a token at a time."""
    return compared(model, teacher, batch, lambda q, p: (q.exp() * (q - p)).sum())


def lowered(model: Any, teacher: Any, batch: dict[str, Tensor], beta: float) -> Tensor:
    """Cross-entropy against the teacher whose true tokens' logits are lowered, a row and a token at a time."""
    return compared(model, teacher, batch, lambda q, p: -(q.exp() * p).sum(), beta)


def compared(model: Any, teacher: Any, batch: dict[str, Tensor], with_: Any, beta: float = 0.0) -> Tensor:
    found = []
    for row, other, labels in zip(logits_of(model, batch), logits_of(teacher, batch), batch["labels"], strict=True):
        for place in (t - 1 for t in range(1, len(labels)) if labels[t] != -100):
            logits = other[place].detach().clone()
            logits[labels[place + 1]] -= beta
            found.append(with_(log_softmax(logits, -1), log_softmax(row[place], -1)))
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


@pytest.mark.parametrize("family", FAMILIES)
def test_undial_lowers_the_teachers_true_tokens_not_those_of_the_start_model(family: str) -> None:
    model, teacher, data = make(family), make(family, 1), batches()
    module = lm.UnlearningModule(
        model,
        forget_loss=objectives.distillation(lm.references.SecondModel(teacher), partial(gs.losses.undial, beta=1.5)),
        reference=lm.references.SecondModel(make(family, 2)),
    )
    found = module.objectives["forget"](module, data, "forget")
    wanted = lowered(model, teacher, data["forget"], 1.5)
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
    with pytest.raises(ValueError, match="expected kl_divergence or undial, found ceu"):
        objectives.distillation(lm.references.SecondModel(make("Llama")), gs.losses.ceu)
    model, data = make("Llama"), batches()
    module = lm.UnlearningModule(model, forget_loss=objectives.distillation(lm.references.SecondModel(model)))
    with pytest.raises(ValueError, match="another model"):
        module.objectives["forget"](module, data, "forget")


def test_the_finish_brings_the_answers_to_the_teacher() -> None:
    model, teacher, data = make("Llama"), make("Llama", 1), batches()
    start = lm.references.SecondModel(make("Llama", 2))
    module = finishing_module(model, start, teacher=lm.references.SecondModel(teacher))
    found = module.objectives["forget"](module, data, "forget")
    wanted = divergence(model, teacher, data["forget"])
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=LINEAR[torch.float64].relative)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget_loss": "ceu"}, "--teacher: expected --forget-loss kl_divergence or undial, or --finish-steps"),
        ({"recipe": "imitate", "teacher": None}, "--recipe imitate: expected --model, and a model that never learned"),
        ({"finish_steps": 2, "substitutes": "answers.json"}, "--substitutes: expected no --teacher"),
        ({"finish_steps": 2, "strategy": "fsdp2"}, "--teacher: expected a teacher that each device can hold"),
    ],
)
def test_a_teacher_without_effect_or_place_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnlearnOptions.of(**{"model": "model", "tofu": "forget10", "teacher": "base"} | options).check()


def test_a_teacher_of_the_model_from_scratch_and_a_search_for_its_rate_are_refused() -> None:
    with pytest.raises(ValueError, match="--teacher: expected --model"):
        UnlearnOptions.of(teacher="base", finish_steps=2).check()
    with pytest.raises(ValueError, match="--lr auto: expected a loss that brings"):
        UnlearnOptions.of(model="m", tofu="forget10", teacher="base", forget_loss="kl_divergence", lr="auto").check()


def test_a_run_that_imitates_has_no_target_below_the_teacher() -> None:
    plain = UnlearnOptions.of(model="m", tofu="forget10", teacher="base", forget_loss="kl_divergence")
    found = fitted(plain, 40).resolved().training
    assert (found.stop_below, found.lr) == (0.0, 1e-5)
    assert fitted(plain.but(reference="r"), 40).training.stop_below is None


def test_the_start_model_is_not_needed_for_a_loss_that_compares_with_the_teacher() -> None:
    with_teacher = UnlearnOptions.of(model="m", tofu="forget10", teacher="base", forget_loss="kl_divergence").resolved()
    assert kind_of_start_model(with_teacher) is None
    assert kind_of_start_model(with_teacher.but(teacher=None)) == "copy"
