"""The losses as their papers write them, in float64, with gradients by autograd: slow, obvious, and only for small vocabularies."""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return -torch.log_softmax(logits, -1)[label]


def gradient_ascent(logits: Tensor, label: int) -> Tensor:
    return torch.log_softmax(logits, -1)[label]


def ceu(logits: Tensor, label: int) -> Tensor:
    """Cross-entropy against the detached softmax without the label, less that softmax's entropy (a constant)."""
    with torch.no_grad():
        target = torch.softmax(logits.index_fill(0, torch.tensor([label]), -torch.inf), -1)
        entropy = -torch.xlogy(target, target).sum()
    return -(target * torch.log_softmax(logits, -1)).sum() - entropy


def unlikelihood(logits: Tensor, label: int) -> Tensor:
    return -torch.log(1 - torch.softmax(logits, -1)[label])


def weighted_gradient_ascent(logits: Tensor, label: int, beta: float = 1.0) -> Tensor:
    weight = torch.softmax(logits, -1)[label].detach() ** beta
    return weight * torch.log_softmax(logits, -1)[label]


def satimp(logits: Tensor, label: int, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    p = torch.softmax(logits, -1)[label].detach()
    return p**beta1 * (1 - p) ** beta2 * torch.log_softmax(logits, -1)[label]


def inverted_hinge(logits: Tensor, label: int) -> Tensor:
    probabilities = torch.softmax(logits, -1)
    return 1 + probabilities[label] - probabilities.index_fill(0, torch.tensor([label]), -torch.inf).max()


def jensen_shannon_label(logits: Tensor, label: int) -> Tensor:
    """Half the divergences of both from their middle, as the definition says."""
    p = torch.softmax(logits, -1)
    middle = 0.5 * p.index_add(0, torch.tensor([label]), torch.ones(1, dtype=p.dtype))
    return 0.5 * (p * (p / middle).log()).sum() - 0.5 * middle[label].log()


def exact(name: str, logits: list[float], label: int) -> tuple[float, list[float]]:
    """Value and gradient with 250 digits, for tokens where float64 itself rounds everything away."""
    with mpmath.workdps(250):
        z = [mpmath.mpf(value) for value in logits]
        total = mpmath.fsum(mpmath.exp(value) for value in z)
        p = [mpmath.exp(value) / total for value in z]
        y, rest = label, 1 - p[label]
        if name in ("ceu", "unlikelihood"):
            value = -mpmath.log(rest)
            row = [p[y] if i == y else -p[i] * p[y] / rest for i in range(len(z))]
        elif name == "inverted_hinge":
            v = max((i for i in range(len(z)) if i != y), key=lambda i: p[i])
            value = 1 + p[y] - p[v]
            row = [p[i] * (p[v] - p[y]) for i in range(len(z))]
            row[y] = p[y] * (1 - p[y] + p[v])
            row[v] = -p[v] * (1 - p[v] + p[y])
        elif name == "jensen_shannon_label":
            middle = [(p[i] + (i == y)) / 2 for i in range(len(z))]
            value = (
                mpmath.fsum(a * mpmath.log(a / m) for a, m in zip(p, middle, strict=True)) - mpmath.log(middle[y])
            ) / 2
            slope = mpmath.log(p[y] / (1 + p[y])) * p[y] / 2
            row = [slope * ((i == y) - p[i]) for i in range(len(z))]
        elif name in ("weighted_gradient_ascent", "satimp"):
            weight = p[y] if name == "weighted_gradient_ascent" else p[y] ** 5 * rest
            value = weight * mpmath.log(p[y])
            row = [weight * ((i == y) - p[i]) for i in range(len(z))]
        else:
            sign = 1 if name == "cross_entropy" else -1
            value = -sign * mpmath.log(p[y])
            row = [sign * (p[i] - (i == y)) for i in range(len(z))]
        return float(value), [float(entry) for entry in row]
