"""Unlearning losses: pure functions of logits ``[N, V]`` and labels ``[N]``, one value per token, no hidden mean.

Example:
    >>> import torch
    >>> logits, labels = torch.zeros(2, 4, 10, requires_grad=True), torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, 5]])
    >>> tokens = answer_tokens(logits, labels, skip_first=1)
    >>> loss = token_mean(ceu(*tokens), tokens[1])
    >>> loss.backward()
"""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from gradsurgery.losses._answers import answer_tokens
from gradsurgery.losses._tokens import IGNORED, ceu, cross_entropy, gradient_ascent, inverted_hinge, token_mean

TokenLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Logits [N, V] and labels [N] -> one value per token [N]."""

LOSSES: dict[str, TokenLoss] = {
    function.__name__: function for function in (cross_entropy, gradient_ascent, ceu, inverted_hinge)
}
"""Every loss per token by its name; tests and the command line read this."""

__all__ = [
    "IGNORED",
    "LOSSES",
    "TokenLoss",
    "answer_tokens",
    "by_name",
    "ceu",
    "cross_entropy",
    "gradient_ascent",
    "inverted_hinge",
    "token_mean",
]


def by_name(name: str) -> TokenLoss:
    """The loss called ``name``.

    Raises:
        ValueError: If there is none.

    Example:
        >>> by_name("ceu") is ceu
        True
    """
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, found {name!r}")
    return LOSSES[name]
