"""How probable answers are to a model, on average; and a copy of a model that may be ruined to find out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_modules.data.tokenization import Encoded
from lightning_modules.evaluation.likelihood import answer_nll


def mean_probabilities(
    model: nn.Module, splits: Mapping[str, Sequence[Encoded]], *, pad_token_id: int, batch_size: int = 32
) -> dict[str, float]:
    r"""The mean over each split's answers of :math:`\exp(-\mathrm{nll})`, nll the mean over an answer's tokens, in nats.

    NaN where the model gives NaN for any answer.
    """
    found: dict[str, float] = {}
    for split, encoded in splits.items():
        nll = answer_nll(model, encoded, pad_token_id=pad_token_id, batch_size=batch_size)
        found[split] = float(torch.exp(-nll).mean())
    return found


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy with the same weights, adapters merged into it, without gradients: what somebody who is given the model holds.

    Raises:
        RuntimeError: If the weights are sharded over processes.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RuntimeError(
            "expected a model that one process holds whole, found sharded weights; save it, and probe the saved model in one process"
        )
    copied: Any = copy.deepcopy(model)
    if hasattr(copied, "merge_and_unload"):
        copied = copied.merge_and_unload()
    for parameter in copied.parameters():
        parameter.grad = None
    return copied
