"""LoKU's formulas as its paper and code write them: loops, float64, dense decompositions, one loss at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Mean over the answer tokens, token by token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = [
        -torch.log_softmax(logits[row, position - 1], -1)[label]
        for row, labels in enumerate(batch["labels"].tolist())
        for position, label in enumerate(labels)
        if label != -100 and position > 0
    ]
    return (torch.stack(losses).mean() if losses else torch.zeros(())), len(losses)


def fisher(model: nn.Module, batches: Sequence[dict[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """Sum of n g^2 over sum of n, with one autograd call a batch, in a float64 copy of the model."""
    model = copy.deepcopy(model).double().eval()
    parameters = dict(model.named_parameters())
    chosen = [parameters[name].requires_grad_() for name in names]
    total, tokens = [torch.zeros_like(parameter) for parameter in chosen], 0
    for batch in batches:
        loss, number = cross_entropy(model, batch)
        if number:
            gradients = torch.autograd.grad(loss, chosen)
            total = [value + number * gradient**2 for value, gradient in zip(total, gradients, strict=True)]
            tokens += number
    return {name: (value / tokens).detach() for name, value in zip(names, total, strict=True)}


def fila(weight: Tensor, importance: Tensor, rank: int, scaling: float, eps: float) -> tuple[Tensor, Tensor]:
    """B A and the residual, from a dense float64 decomposition."""
    weight, s = weight.double(), importance.double().sum(1).sqrt()
    left, values, right = torch.linalg.svd(torch.diag(s) @ weight, full_matrices=False)
    values = values[:rank] / scaling
    a = torch.diag(values.sqrt()) @ right[:rank]
    b = torch.diag(1 / (s + eps)) @ left[:, :rank] @ torch.diag(values.sqrt())
    return b @ a, weight - scaling * b @ a


def least_error(weight: Tensor, importance: Tensor, rank: int) -> float:
    """The least weighted error that any matrix of this rank has (Eckart and Young)."""
    s = importance.double().sum(1).sqrt()
    return float(torch.linalg.svdvals(s[:, None] * weight.double())[rank:].square().sum().sqrt())
