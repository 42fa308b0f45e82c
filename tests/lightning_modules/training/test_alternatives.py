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
from tests.lightning_modules.training.test_objectives import FAMILIES, batches, gradients, logits_of, make
from tests.tolerances import LINEAR, STEPPED_FLOAT32, close

WEIGHT, BETA = 3.0, 4.0
FIRST: dict[str, Any] = {"model": "base", "tofu": "forget10", "finetune_first": True}


def slow(model: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    """-log(1 - p), whose gradient is CE-U's, and the weighted cross-entropy, without each answer's first token, one by one."""
    found = []
    for row, other, labels in zip(logits_of(model, batch), logits_of(teacher, batch), batch["labels"], strict=True):
        for place in [t - 1 for t in range(1, len(labels)) if labels[t] != -100][1:]:
            theirs = other[place].detach().clone()
            theirs[labels[place + 1]] -= BETA
            p, known = log_softmax(row[place], -1), log_softmax(row[place], -1)[labels[place + 1]].exp()
            found.append(-torch.log1p(-known) - WEIGHT * known.detach() * (log_softmax(theirs, -1).exp() * p).sum())
    return torch.stack(found).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_its_gradient_is_that_of_unlikelihood_and_of_the_weighted_teacher(family: str) -> None:
    model, teacher, data = make(family), make(family, 1), batches()
    loss = objectives.with_alternatives(gs.losses.ceu, SecondModel(teacher), WEIGHT, beta=BETA)
    module = lm.UnlearningModule(model, forget_loss=loss)
    found = gradients(module.objectives["forget"](module, data, "forget"), model)
    # Norms of Transformers compute in float32, also in a model of float64, and the two sums reach them rounded otherwise.
    close(found, gradients(slow(model, teacher, data["forget"]), model), LINEAR[torch.float32])


def test_with_a_large_beta_what_a_forgotten_token_loses_goes_to_what_the_teacher_prefers() -> None:
    """What the docstring says the weight means: the gradient where the true token is nearly forgotten."""
    generator = torch.Generator().manual_seed(0)
    logits, theirs = (torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 3, 6, 2, 2])
    one = torch.nn.functional.one_hot(labels, 7).double()
    logits = (logits - 20.0 * one).requires_grad_()
    known = logits.softmax(-1).gather(1, labels[:, None]).detach()
    loss = gs.losses.ceu(logits, labels) + WEIGHT * known.squeeze(1) * gs.losses.undial(logits, labels, theirs, 60.0)
    (found,) = torch.autograd.grad(loss.sum(), logits)
    q = (theirs - 60.0 * one).softmax(-1)
    wanted = one + (WEIGHT - 1.0) * logits.detach().softmax(-1) - WEIGHT * q
    close(found / known, wanted, STEPPED_FLOAT32)


def test_what_it_cannot_be_made_of_is_refused() -> None:
    teacher = SecondModel(make("Llama"))
    for weight in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a weight > 0"):
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
        (FIRST, "base", 1.0),
        (FIRST | {"teacher": "mine"}, "mine", 1.0),
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
        ({"model": "tuned", "tofu": "forget10", "teacher": "base"}, "base", 1.0),
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
        ({"teacher_weight": -0.1}, "expected --teacher-weight >= 0, found -0.1"),
        ({"teacher_weight": 3.0, "teacher": None}, "--teacher-weight: expected --teacher, a model that never learned"),
        ({"teacher_weight": 3.0, "forget_loss": "npo"}, "--teacher-weight: expected a --forget-loss of single tokens"),
        ({"teacher_weight": 3.0, "forget_loss": "undial"}, "--teacher-weight: expected a --forget-loss of single"),
        ({"teacher_weight": 3.0, "strategy": "fsdp2"}, "--teacher: expected a teacher that each device can hold"),
    ],
)
def test_a_share_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnlearnOptions.of(**{"model": "model", "tofu": "forget10", "teacher": "base"} | options).check()


def test_a_grid_takes_its_own_model_as_it_was(tmp_path: Any) -> None:
    text = "data: {tofu: forget10, authors: 12, forget_authors: 2}\nmodel: base\ntargets: {end: [own]}\nmethods:\n"
    text += "  - {name: a, teacher_weight: 3.0}\n"
    file = tmp_path / "grid.yaml"
    file.write_text(text + "first: {finetune_first: true}\n")
    method = read_grid(str(file), str(tmp_path)).runs()[0].options().method
    assert (method.teacher, method.teacher_weight) == ("base", 3.0)
    file.write_text(text)
    with pytest.raises(ValueError, match="--teacher-weight: expected --teacher"):
        read_grid(str(file), str(tmp_path))
