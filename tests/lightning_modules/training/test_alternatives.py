"""What a teacher says in the answer's place, beside a loss that leaves it open: the objective and the options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.ablation.reading import read_grid
from lightning_modules.run.options import UnlearnOptions, fitted
from lightning_modules.run.options.names import OF_TOKENS
from lightning_modules.run.options.recipes import expanded
from lightning_modules.training import objectives
from lightning_modules.training.means import of_tokens
from lightning_modules.training.references import SecondModel
from tests.lightning_modules.training.test_distillation import lowered
from tests.lightning_modules.training.test_objectives import FAMILIES, batches, gradients, logits_of, make
from tests.tolerances import LINEAR, close

WEIGHT, BETA = 0.3, 4.0
FIRST: dict[str, Any] = {"model": "base", "tofu": "forget10", "finetune_first": True}


def unlikelihood(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean of -log(1 - p), whose gradient is CE-U's, without the first token of each answer, one token at a time."""
    found = []
    for row, labels in zip(logits_of(model, batch), batch["labels"], strict=True):
        places = [t for t in range(1, len(labels)) if labels[t] != -100]
        found += [-torch.log1p(-log_softmax(row[t - 1], -1)[labels[t]].exp()) for t in places[1:]]
    return torch.stack(found).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_its_gradient_is_that_of_unlikelihood_and_of_the_lowered_teacher(family: str) -> None:
    model, teacher, data = make(family), make(family, 1), batches()
    loss = objectives.with_alternatives(gs.losses.ceu, SecondModel(teacher), WEIGHT, beta=BETA)
    module = lm.UnlearningModule(model, forget_loss=loss)
    found = module.objectives["forget"](module, data, "forget")
    slow = (1 - WEIGHT) * unlikelihood(model, data["forget"])
    slow = slow + WEIGHT * lowered(model, teacher, data["forget"], BETA)
    # Norms of Transformers compute in float32, also in a model of float64, and the two sums reach them rounded otherwise.
    close(gradients(found, model), gradients(slow, model), LINEAR[torch.float32])


def test_with_a_large_beta_it_is_unlikelihood_and_the_other_tokens_cross_entropy() -> None:
    """What the docstring says the weight means."""
    generator = torch.Generator().manual_seed(0)
    logits, theirs = (torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 3, 6, 2, 2])
    others = torch.ones(5, 7, dtype=torch.bool).scatter_(1, labels[:, None], value=False)
    p, q = (log_softmax(each[others].view(5, 6), -1) for each in (logits, theirs))
    true = log_softmax(logits, -1).gather(1, labels[:, None]).squeeze(1)
    wanted = -torch.log1p(-true.exp()) - (q.exp() * p).sum(1)
    close(gs.losses.undial(logits, labels, theirs, beta=60.0), wanted, LINEAR[torch.float64])


def test_what_it_cannot_be_made_of_is_refused() -> None:
    teacher = SecondModel(make("Llama"))
    for weight in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="expected a weight between 0 and 1"):
            objectives.with_alternatives(gs.losses.ceu, teacher, weight)
    for beta in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="expected beta >= 0"):
            objectives.with_alternatives(gs.losses.ceu, teacher, beta=beta)
    with pytest.raises(ValueError, match="with_alternatives: expected a teacher"):
        objectives.with_alternatives(gs.losses.ceu, SecondModel())
    for name in set(objectives.NAMES) - set(OF_TOKENS):
        with pytest.raises(ValueError, match=f"expected a loss of single tokens, such as ceu, found {name}"):
            objectives.with_alternatives(objectives.by_name(name), teacher)


def test_the_names_that_the_parser_knows_are_those_losses() -> None:
    assert tuple(name for name in objectives.NAMES if of_tokens(objectives.by_name(name))) == OF_TOKENS


@pytest.mark.parametrize(
    ("given", "teacher", "weight"),
    [
        (FIRST, "base", 0.3),
        (FIRST | {"teacher": "mine"}, "mine", 0.3),
        (FIRST | {"teacher_weight": 0.5}, "base", 0.5),
        (FIRST | {"teacher_weight": 0.0}, None, 0.0),
        (FIRST | {"teacher": None}, None, 0.0),
        (FIRST | {"revision": "main"}, None, 0.0),
        (FIRST | {"strategy": "fsdp2"}, None, 0.0),
        (FIRST | {"keep_asked_words": False}, None, 0.0),
        (FIRST | {"forget_loss": "npo"}, None, 0.0),
        (FIRST | {"substitute_weight": 1.0}, None, 0.0),
        (FIRST | {"finish_steps": 4}, None, 0.0),
        (FIRST | {"rule": "none"}, None, 0.0),
        (FIRST | {"recipe": "paper"}, None, 0.0),
        ({"model": "tuned", "tofu": "forget10"}, None, 0.0),
        ({"model": "tuned", "tofu": "forget10", "teacher": "base"}, "base", 0.3),
        ({"model": "tuned", "tofu": "forget10", "teacher": "base", "forget_loss": "undial"}, "base", 0.0),
    ],
)
def test_balanced_asks_a_model_that_never_learned_where_one_is_known(
    given: dict[str, Any], teacher: str | None, weight: float
) -> None:
    found = expanded(given)
    assert (found.get("teacher"), found.get("teacher_weight", 0.0)) == (teacher, weight)
    UnlearnOptions.of(**given).check()


def test_its_rate_can_be_searched_and_it_has_a_target() -> None:
    found = fitted(UnlearnOptions.of(**FIRST), 40)
    assert (found.training.lr, found.training.stop_below) == ("auto", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_weight": 1.0}, "--teacher-weight: expected a share >= 0 and below 1, found 1.0"),
        ({"teacher_weight": -0.1}, "--teacher-weight: expected a share >= 0 and below 1, found -0.1"),
        ({"teacher_weight": float("nan")}, "--teacher-weight: expected a share"),
        ({"teacher_weight": 0.3, "teacher": None}, "--teacher-weight: expected --teacher, a model that never learned"),
        ({"teacher_weight": 0.3, "forget_loss": "npo"}, "--teacher-weight: expected a --forget-loss of single tokens"),
        ({"teacher_weight": 0.3, "forget_loss": "undial"}, "--teacher-weight: expected a --forget-loss of single"),
        ({"teacher_weight": 0.3, "strategy": "fsdp2"}, "--teacher: expected a teacher that each device can hold"),
    ],
)
def test_a_share_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnlearnOptions.of(**{"model": "model", "tofu": "forget10", "teacher": "base"} | options).check()


def test_a_grid_takes_its_own_model_as_it_was(tmp_path: Any) -> None:
    text = "data: {tofu: forget10, authors: 12, forget_authors: 2}\nmodel: base\nmethods:\n"
    text += "  - {name: a, teacher_weight: 0.3}\n"
    file = tmp_path / "grid.yaml"
    file.write_text(text + "first: {finetune_first: true}\n")
    method = read_grid(str(file), str(tmp_path)).runs()[0].options().method
    assert (method.teacher, method.teacher_weight) == ("base", 0.3)
    file.write_text(text)
    with pytest.raises(ValueError, match="--teacher-weight: expected --teacher"):
        read_grid(str(file), str(tmp_path))
