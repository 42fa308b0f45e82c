"""A language-model head, the model's own or its reference's, as `linear` takes it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Head:
    r"""A language-model head: the last layer, from hidden states $h$ to logits.

    $$z = c \tanh(s\,(W h + b) / c)$$

    Attributes:
        weight: $W$, ``[V, H]``.
        bias: $b$, ``[V]``, or None.
        scale: $s$. Some model families multiply their logits by a number (Cohere), or divide them by one (Granite).
        softcap: $c > 0$, by which Gemma 2 keeps its logits between $-c$ and $c$; None for $z = s\,(W h + b)$.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, eq=False)
class Reference:
    """The model that a loss compares with, often the one before unlearning: its hidden states and its head.

    Both are constants, whatever graph they carry.

    Attributes:
        hidden: ``[N, H']``, its hidden states at the tokens of the model's own ``hidden``.
        head: Its head, with a weight ``[V, H']``; None if the two models share the head.
    """

    hidden: Tensor
    head: Head | None = None
