"""What every loss checks in its logits and labels, and the type that it computes in."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that no loss counts. Hugging Face and torch use the same number."""


def checked(logits: Tensor, labels: Tensor) -> Tensor:
    """Check the arguments of a loss per token. Returns which tokens count, ``[N]`` bool."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits [N, V] with V >= 2 and labels [N], found {list(logits.shape)} and {list(labels.shape)}; "
            "answer_tokens makes them from a model's [B, T, V] and [B, T]"
        )
    check_integers(labels)
    return labels != IGNORED


def check_integers(labels: Tensor) -> None:
    """Refuse labels of a type that is not an integer, or that cannot hold -100."""
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise TypeError(f"labels: expected signed integers, found {labels.dtype}")


def check_rows(logits: Tensor, reference_logits: Tensor | None = None) -> None:
    """Check the arguments of a loss of whole rows of logits."""
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(
            f"logits: expected [N, V], found {list(logits.shape)}; answer_tokens makes them from [B, T, V]"
        )
    if reference_logits is not None and reference_logits.shape != logits.shape:
        raise ValueError(
            f"reference_logits: expected the logits' shape {list(logits.shape)}, found {list(reference_logits.shape)}; the models must "
            "share their vocabulary"
        )
    for name, value in (("logits", logits), ("reference_logits", reference_logits)):
        if value is not None and not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point type, found {value.dtype}")


def float_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which rows of logits of the given type are computed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tokens(labels: Tensor, vocabulary: int) -> None:
    """Refuse labels that are no token; those that do not count are left out, or 0."""
    if not len(labels):
        return
    least, most = torch.stack(labels.aminmax()).tolist()
    if least < 0 or most >= vocabulary:
        raise ValueError(
            f"labels: expected -100 or one of {vocabulary} tokens, found {least if least < 0 else most}; a tokenizer that outgrew "
            "the model's embeddings makes such labels"
        )


def check_values(values: object, tokens: Tensor) -> None:
    """Refuse what is not one value per token: the mean over tokens is taken later."""
    if not isinstance(values, Tensor) or values.shape != tokens.shape:
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"loss: expected one value per token, {list(tokens.shape)}, found {found}; take no mean in it")
