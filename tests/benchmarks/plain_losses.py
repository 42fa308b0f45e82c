"""Losses of bare logits as anybody would write them in PyTorch, beside ours."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

import gradsurgery as gs


def plain_divergence(logits: Tensor, labels: Tensor, other: Tensor) -> Tensor:
    target = torch.log_softmax(other.float(), -1)
    return functional.kl_div(torch.log_softmax(logits.float(), -1), target, reduction="none", log_target=True).sum(1)


def plain_uniform(logits: Tensor, labels: Tensor, other: Tensor) -> Tensor:
    return -torch.log_softmax(logits.float(), -1).mean(1) - math.log(logits.shape[1])


def plain_undial(logits: Tensor, labels: Tensor, other: Tensor) -> Tensor:
    label = labels.clamp_min(0)[:, None]
    target = torch.softmax(other.float().scatter_add(1, label, other.new_full((), -10.0).float().expand_as(label)), -1)
    return functional.cross_entropy(logits.float(), target, reduction="none")


def plain_tokens(logits: Tensor, labels: Tensor, other: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def plain_ceu(logits: Tensor, labels: Tensor, other: Tensor) -> Tensor:
    masked = logits.float().scatter(1, labels[:, None], -torch.inf)
    return functional.cross_entropy(logits.float(), torch.softmax(masked, -1).detach(), reduction="none")


def plain_hinge(logits: Tensor, labels: Tensor, other: Tensor) -> Tensor:
    probabilities = torch.softmax(logits.float(), -1)
    others = probabilities.scatter(1, labels[:, None], -1.0).amax(1)
    return 1.0 + probabilities.gather(1, labels[:, None]).squeeze(1) - others


def plain_jensen_shannon(logits: Tensor, labels: Tensor, other: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(logits.float(), -1), torch.log_softmax(other.float(), -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    each = (functional.kl_div(log_m, log, reduction="none", log_target=True).sum(1) for log in (log_p, log_q))
    return 0.5 * sum(each, start=logits.new_zeros(()))


def plain_margin(logits: Tensor, labels: Tensor, other: Tensor) -> Tensor:
    rows = logits.float()
    return (rows.amax(1) - rows.mean(1)).square()


ROWS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "kl_divergence": (plain_divergence, lambda logits, labels, other: gs.losses.kl_divergence(logits, other)),
    "uniform": (plain_uniform, lambda logits, labels, other: gs.losses.uniform(logits)),
    "undial": (plain_undial, gs.losses.undial),
}
"""Losses of rows: in plain PyTorch, and ours."""

ON_LOGITS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "cross_entropy": (plain_tokens, lambda logits, labels, other: gs.losses.cross_entropy(logits, labels)),
    "ceu": (plain_ceu, lambda logits, labels, other: gs.losses.ceu(logits, labels)),
    "inverted_hinge": (plain_hinge, lambda logits, labels, other: gs.losses.inverted_hinge(logits, labels)),
    "jensen_shannon": (plain_jensen_shannon, lambda logits, labels, other: gs.losses.jensen_shannon(logits, other)),
    "logit_margin": (plain_margin, lambda logits, labels, other: gs.losses.logit_margin(logits)),
    **ROWS,
}
"""The same for bare logits, with losses per token."""
