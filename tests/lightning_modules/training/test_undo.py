"""UNDO: the noise is the formula's, vectors stay, and the student learns to answer as the teacher does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from lightning_modules.training.undo import UndoSettings, perturb_, undo_settings, undoing_module
from tests.lightning_modules.training.test_module import Bigram, batches, fit
from tests.lightning_modules.training.test_perturbed import llama, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*computes all its logits.*", "ignore:.*does not have many workers.*")


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.1), (0.3, 0.0), (1.0, 1.0)])
def test_matrices_are_mixed_with_xaviers_noise_and_vectors_stay(alpha: float, beta: float) -> None:
    before, model = dict(llama().named_parameters()), llama()
    perturb_(model, UndoSettings(alpha=alpha, beta=beta))
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            assert torch.equal(weight, before[name])
            continue
        noise = (weight.detach() - (1 - alpha) * before[name]) / alpha
        bound = beta * math.sqrt(6 / sum(weight.shape))
        assert float(noise.abs().max()) <= bound + 1e-6
        if beta:
            assert abs(float(noise.std()) - bound / math.sqrt(3)) < 0.35 * bound  # 64 to 88 draws


def test_the_noise_depends_on_the_seed_alone() -> None:
    models = [llama() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(seed + 7)
        perturb_(model, UndoSettings(seed=seed))
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))


def divergence(teacher: nn.Module, student: nn.Module, batch: dict[str, Tensor]) -> float:
    logits = [
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for model in (teacher, student)
    ]
    rows = [gs.losses.answer_tokens(each, batch["labels"])[0].double() for each in logits]
    q, p = (torch.log_softmax(row, 1) for row in rows)
    return float((q.exp() * (q - p)).sum(1).mean())


def test_the_student_learns_to_answer_as_the_teacher_of_both_sets() -> None:
    model, data = Bigram(), batches(40)
    teacher = copy.deepcopy(model)
    module = undoing_module(model, UndoSettings(steps=40, alpha=0.5, beta=0.1, lr=5e-2))
    before = {name: divergence(teacher, model, data[0][name]) for name in ("forget", "retain")}
    fit(module, data)
    for name, start in before.items():
        assert divergence(teacher, model, data[0][name]) < 0.2 * start
    assert all(
        torch.equal(a, b) for a, b in zip(module.reference.model.parameters(), teacher.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"steps": 2.5}, "steps: expected a whole number"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": 1.1}, "alpha"),
        ({"beta": -0.1}, "beta"),
        ({"lr": 0}, "lr"),
        ({"max_norm": 0}, "max_norm"),
    ],
)
def test_settings_outside_their_domain_are_refused(given: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=f"undo, {said}"):
        undo_settings(given)


def test_each_matrix_gets_xaviers_noise_also_of_experts_in_one_tensor_and_of_kernels() -> None:
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(8, 128, 64))
    model.down = nn.Linear(64, 128, bias=False)
    model.kernel = nn.Conv1d(64, 32, 3, bias=False)
    perturb_(model, UndoSettings(alpha=1.0, beta=1.0))
    bounds = {"experts": 128 + 64, "down.weight": 64 + 128, "kernel.weight": 32 + 64 * 3}
    for name, weight in model.named_parameters():
        bound = (6.0 / bounds[name]) ** 0.5
        assert 0.97 * bound < weight.abs().max() <= bound, name
