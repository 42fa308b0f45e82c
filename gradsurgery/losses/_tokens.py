r"""Losses with one value per token, all functions of one number: the log-odds of the label.

With logits z, label y and :math:`d = z_y - \log\sum_{j \ne y} e^{z_j}`, the label's probability is sigmoid(d), its negative
log-likelihood softplus(-d), and every loss :math:`\varphi(d)` has the gradient :math:`\varphi'(d)\,(e_y - q)` with q the softmax
without y. Nothing here subtracts nearly equal numbers, so that a forgotten token gets a vanishing gradient and not rounding noise, and
a certain one no NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""The label of a token that no loss counts: Hugging Face's and torch's convention."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Negative log-likelihood of each label, :math:`-\log p_y = \mathrm{softplus}(-d)`; the usual retain loss.

    Args:
        logits: ``[N, V]``, any floating-point type (half-precision ones are computed in float32).
        labels: ``[N]`` int64, -100 where a token does not count.

    Returns:
        ``[N]`` nats, float32 (float64 for float64 logits); 0 with a zero gradient where the label is -100.

    Raises:
        ValueError: If the shapes are not ``[N, V]`` and ``[N]``, or V < 2.
        TypeError: If the labels are not integers.

    Gradient row: p - e_y. Cost: one float copy of the logits for the backward pass. All losses here share these.

    Example:
        >>> cross_entropy(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, -100]))
        tensor([0.6931, 0.0000])
    """
    return _of_log_odds(logits, labels, lambda odds: functional.softplus(-odds))


def gradient_ascent(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Log-likelihood of each label, :math:`\log p_y`: minimising it climbs the cross-entropy, without bound.

    Gradient row: e_y - p, which vanishes on a memorised token and is largest on a forgotten one. Arguments, shapes and errors as
    `cross_entropy`. Source: "GradAscent" of TOFU (2401.06121) and open-unlearning.

    Example:
        >>> gradient_ascent(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([-0.6931])
    """
    return -cross_entropy(logits, labels)


def ceu(logits: Tensor, labels: Tensor) -> Tensor:
    r"""CE-U: cross-entropy against the model's own distribution with the label's logit at minus infinity.

    Computed as :math:`-\log(1 - p_y) = \mathrm{softplus}(d)`, which has exactly CE-U's gradient, row p - q: p_y at the label and
    -p_i p_y/(1 - p_y) elsewhere, of 1-norm 2 p_y: largest where the model is most confident, 0 once it has forgotten.

    Source: CE-U (2503.01224). Difference from the authors' code: its value is larger by the entropy of q, a constant for the gradient;
    its gradient, q - p from two softmaxes, is rounding noise for forgotten tokens. The loss is also that of unlikelihood training
    (1908.04319). The paper skips the first answer token: ``answer_tokens(..., skip_first=1)``. It says nothing about retention: pair
    it with surgery or a retain loss. Arguments, shapes and errors as `cross_entropy`.

    Example:
        >>> ceu(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([0.6931])
    """
    return _of_log_odds(logits, labels, functional.softplus)


def inverted_hinge(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Inverted hinge: :math:`1 + p_y - \max_{v \ne y} p_v`, in [0, 2].

    Source: LoKU (2408.06621), equation 4. Like gradient ascent its gradient vanishes on perfectly memorised tokens; unlike its
    authors' code it always applies the softmax, and is computed from two log-odds, exact where p_y or p_v rounds to 1. The first of
    equal runners-up is taken. Arguments, shapes and errors as `cross_entropy`.

    Example:
        >>> inverted_hinge(torch.tensor([[0.0, 0.0, -9.0]]), torch.tensor([0]))
        tensor([1.])
    """
    valid, safe = _checked(logits, labels)
    with torch.no_grad():
        runner_up = logits.scatter(1, safe[:, None], -torch.inf).argmax(-1)
    own, other = (_LogOdds.apply(logits, index) for index in (safe, runner_up))
    # exp(logsigmoid) and not sigmoid: its derivative p (1 - p) keeps its digits where p rounds to 1.
    return torch.where(valid, 1.0 + functional.logsigmoid(own).exp() - functional.logsigmoid(other).exp(), 0.0)


def token_mean(values: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens that count; 0 with a zero gradient if none does.

    Args:
        values: ``[N]`` from one of the losses.
        labels: ``[N]``, -100 where a token does not count.

    Returns:
        0-dim.

    Example:
        >>> token_mean(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([5, 6, -100]))
        tensor(2.)
    """
    return values.sum() / (labels != IGNORED).sum().clamp_min(1)


def _of_log_odds(logits: Tensor, labels: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    valid, safe = _checked(logits, labels)
    return torch.where(valid, function(_LogOdds.apply(logits, safe)), 0.0)


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens count, and labels that can index where they do not."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits [N, V] with V >= 2 and labels [N], found {list(logits.shape)} and {list(labels.shape)}; "
            "answer_tokens makes them from a model's [B, T, V] and [B, T]"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, found {labels.dtype}")
    valid = labels != IGNORED
    return valid, torch.where(valid, labels, 0).long()


class _LogOdds(torch.autograd.Function):
    """d = z_y - logsumexp of the others, ``[N]``; gradient e_y - q."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        others = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32, copy=True)
        index = labels[:, None]
        own = others.gather(1, index)
        largest = others.scatter_(1, index, -torch.inf).amax(1, keepdim=True)
        # Differences to the largest logit are exact, and small: logits of 1e4 would leave a logsumexp with three decimals.
        others.sub_(largest)
        own = own - largest
        total = others.exp().sum(1, keepdim=True).log_()
        ctx.save_for_backward(others, total, index)
        ctx.dtype = logits.dtype
        return (own - total).squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        others, total, index = ctx.saved_tensors
        outer = gradients[0][:, None]
        row = (others - total).exp_().mul_(-outer).scatter_(1, index, outer)
        return row.to(ctx.dtype), None
