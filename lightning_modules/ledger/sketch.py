r"""A sketch of a request's gradient: what is kept of it where the text must be gone.

Of each weight matrix's gradient $G$ ($m \times n$) its truncated singular value decomposition of rank r is kept,
$r (m + n)$ numbers, the nearest matrix of that rank; of every other tensor the gradient itself. The gradient is that of
the protected loss (`training.protecting`) over all rows of the request, at the weights that have just forgotten it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gradsurgery as gs
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.evaluation.likelihood import device_of
from lightning_modules.files import replacing
from lightning_modules.training.heads import AnswerHead, answer_values

_LEFT, _RIGHT, _WHOLE = ".sketch_left", ".sketch_right", ".sketch_whole"


def request_gradient(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_size: int = 8,
    loss: Any = gs.losses.ceu,
    skip_first: int = 1,
) -> dict[str, Tensor]:
    """The gradient of the mean loss of some rows' answer tokens, by the name of each weight, in float32.

    The model's gradients, its mode and which of its weights are trained are left as they were.

    Args:
        model: A causal language model.
        rows: Tokenized.
        pad_token_id: Of the tokenizer.
        batch_size: Rows a backward pass.
        loss: Of a token; that which an earlier request is protected by, and unlearning descends, if not given.
        skip_first: Answer tokens left out at the start of each answer, by both of them 1.
    """
    training, head = model.training, AnswerHead(model.eval())
    named = dict(model.named_parameters())
    total, count = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in named.items()}, 0
    for start in range(0, len(rows), batch_size):
        batch = {
            key: value.to(device_of(model))
            for key, value in collate(rows[start : start + batch_size], pad_token_id).items()
        }
        values, tokens = answer_values(loss, head.states(batch), batch["labels"], skip_first=skip_first)
        count += len(tokens)
        found: Any = torch.autograd.grad(values.sum(), list(named.values()), allow_unused=True)
        for name, gradient in zip(named, found, strict=True):
            if gradient is not None:
                total[name] += gradient.float()
    model.train(training)
    return {name: gradient / max(count, 1) for name, gradient in total.items()}


def sketched(gradient: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The sketch of a gradient, as the tensors that are kept.

    Args:
        gradient: By the name of each weight.
        rank: r; a matrix of a lower rank is kept exactly.
    """
    kept: dict[str, Tensor] = {}
    for name, value in gradient.items():
        if value.dim() != 2 or rank * sum(value.shape) >= value.numel():
            kept[name + _WHOLE] = value.contiguous()
            continue
        left, singular, right = torch.linalg.svd(value.double(), full_matrices=False)
        kept[name + _LEFT] = (left[:, :rank] * singular[:rank]).to(value.dtype).contiguous()
        kept[name + _RIGHT] = right[:rank].to(value.dtype).contiguous()
    return kept


def dense(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient that a sketch stands for, by the name of each weight."""
    found: dict[str, Tensor] = {}
    for key, value in kept.items():
        if key.endswith(_WHOLE):
            found[key.removesuffix(_WHOLE)] = value
        elif key.endswith(_LEFT):
            name = key.removesuffix(_LEFT)
            found[name] = value @ kept[name + _RIGHT]
    return found


def share_kept(gradient: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> float:
    """The share of the gradient's squared length that its sketch has, in [0, 1]."""
    there = sum(float(value.square().sum()) for value in gradient.values())
    return sum(float(value.square().sum()) for value in dense(kept).values()) / there if there else 1.0


def save_sketch(path: Path, kept: Mapping[str, Tensor], **said: Any) -> None:
    """Write a sketch, the whole file or nothing."""
    with replacing(path) as temporary:
        save_file(dict(kept), temporary, metadata={name: str(value) for name, value in said.items()})


def load_sketch(path: Path) -> dict[str, Tensor]:
    """The gradient that a file's sketch stands for."""
    return dense(load_file(path))
