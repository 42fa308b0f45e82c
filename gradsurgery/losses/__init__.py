"""Unlearning losses: pure functions of logits ``[N, V]`` and labels ``[N]``, one value per token, no hidden mean.

`linear` applies any of them to hidden states and a head without ever holding ``[N, V]``.

Example:
    >>> import torch
    >>> logits, labels = torch.zeros(2, 4, 10, requires_grad=True), torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, 5]])
    >>> tokens = answer_tokens(logits, labels, skip_first=1)
    >>> loss = token_mean(ceu(*tokens), tokens[1])
    >>> loss.backward()
"""

from gradsurgery.losses._answers import answer_tokens
from gradsurgery.losses._linear import linear
from gradsurgery.losses._log_odds import IGNORED, TokenLoss, token_loss
from gradsurgery.losses._representations import rmu, rmu_direction
from gradsurgery.losses._rows import kl_divergence, logit_margin, undial, uniform
from gradsurgery.losses._sequences import answer_lengths, dpo, npo, sequence_sum, simnpo
from gradsurgery.losses._table import LOSSES, ROW_LOSSES, SEQUENCE_LOSSES, as_row_loss, by_name
from gradsurgery.losses._tokens import (
    ceu,
    cross_entropy,
    gradient_ascent,
    inverted_hinge,
    satimp,
    token_mean,
    unlikelihood,
    weighted_gradient_ascent,
)
from gradsurgery.losses._multiplier import DualVariable

__all__ = [
    "IGNORED",
    "LOSSES",
    "ROW_LOSSES",
    "SEQUENCE_LOSSES",
    "DualVariable",
    "TokenLoss",
    "answer_lengths",
    "answer_tokens",
    "as_row_loss",
    "by_name",
    "ceu",
    "cross_entropy",
    "dpo",
    "gradient_ascent",
    "inverted_hinge",
    "kl_divergence",
    "linear",
    "logit_margin",
    "npo",
    "rmu",
    "rmu_direction",
    "satimp",
    "sequence_sum",
    "simnpo",
    "token_loss",
    "token_mean",
    "undial",
    "uniform",
    "unlikelihood",
    "weighted_gradient_ascent",
]
