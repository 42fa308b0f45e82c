r"""Losses with one value per token.

Each function here maps the labels' log-odds $d$ to values, and `token_loss` makes a loss of it.
A new loss is one function here and its name in ``__all__``: the table `LOSSES`, `linear` and the package's names
follow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradsurgery.losses._log_odds import log1p_exp
from gradsurgery.losses._token_loss import token_loss

__all__ = [  # noqa: RUF022 (in the order of the table `LOSSES`)
    "cross_entropy",
    "gradient_ascent",
    "ceu",
    "inverted_hinge",
    "weighted_gradient_ascent",
    "satimp",
    "unlikelihood",
    "jensen_shannon_label",
]


@token_loss
def cross_entropy(odds: Tensor) -> Tensor:  # noqa: D417 (the decorator makes logits and labels of it)
    r"""Negative log-likelihood of each label, $-\log p_y = \mathrm{softplus}(-d)$; the usual retain loss.

    Args:
        logits: ``[N, V]``, any floating-point type (half-precision ones are computed in float32).
        labels: ``[N]`` int64, -100 where a token does not count.

    Returns:
        ``[N]`` nats, float32 (float64 for float64 logits); 0 with a zero gradient where the label is -100.

    Raises:
        ValueError: If the shapes are not ``[N, V]`` and ``[N]``, V < 2, or a label on the CPU is no token.
        TypeError: If the labels are not integers.

    Gradient row: $p - e_y$. Cost: for 262 144 or more float32 or bfloat16 logits on a CPU with a C++ compiler one
    exponential per logit twice, and six numbers per row that are kept for the backward pass, which reads the logits
    again (`backend`); elsewhere one float copy of the logits is kept. `linear` holds none. Arguments, shapes, errors
    and cost are the same for all losses per token.

    Example:
        >>> cross_entropy(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, -100]))
        tensor([0.6931, 0.0000])
    """
    return log1p_exp(-odds)


@token_loss
def gradient_ascent(odds: Tensor) -> Tensor:
    r"""Log-likelihood of each label, $\log p_y$: minimising it raises the cross-entropy without bound.

    Gradient row: $e_y - p$, which vanishes on a memorised token and is largest on a forgotten one. Arguments, shapes
    and errors as `cross_entropy`. Source: "GradAscent" of TOFU (2401.06121) and open-unlearning.

    Example:
        >>> gradient_ascent(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([-0.6931])
    """
    return -log1p_exp(-odds)


@token_loss
def ceu(odds: Tensor) -> Tensor:
    r"""CE-U: cross-entropy against the model's own distribution with the label's logit at minus infinity.

    Computed as $-\log(1 - p_y) = \mathrm{softplus}(d)$, which has exactly CE-U's gradient. The gradient row is $p - q$,
    $q$ the softmax without the label: $p_y$ at the label and $-p_i\, p_y / (1 - p_y)$ elsewhere. Its 1-norm is $2 p_y$,
    largest where the model is most confident and 0 once it has forgotten.

    Source: CE-U (2503.01224). Difference from the authors' code: its value is larger by the entropy of $q$, a constant
    for the gradient; its gradient, a difference of two softmaxes, is rounding noise for forgotten tokens. Unlikelihood
    training has the same loss (`unlikelihood`). The paper skips the first answer token:
    ``answer_tokens(..., skip_first=1)``. The loss does nothing for retention: combine it with surgery or a retain loss.
    Arguments, shapes and errors as `cross_entropy`.

    Example:
        >>> ceu(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([0.6931])
    """
    return log1p_exp(odds)


@token_loss
def unlikelihood(odds: Tensor) -> Tensor:
    r"""Unlikelihood: $-\log(1 - p_y)$, with the same value and gradient as `ceu`; see there for the reason.

    Source: unlikelihood training (1908.04319), equation 4, with the label as the only negative candidate. Unlikelihood
    training counts every answer token, while CE-U skips the first. Arguments, shapes and errors as `cross_entropy`.

    Example:
        >>> unlikelihood(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([0.6931])
    """
    return log1p_exp(odds)


@token_loss
def weighted_gradient_ascent(odds: Tensor, *, beta: float = 1.0) -> Tensor:
    r"""Gradient ascent that lets go of forgotten tokens: $p_y^\beta \log p_y$, with the weight $p_y^\beta$ a constant.

    Gradient row: $p_y^\beta (e_y - p)$. The weights are not normalised; open-unlearning takes the mean over the tokens
    that count (`token_mean`).

    Source: WGA of the G-effect paper (2502.19301); beta is 1 in open-unlearning, 5 in the authors' code when unset, and
    0.1 in GRU's configuration. Arguments, shapes and errors as `cross_entropy`; beta any number, 0 gives
    `gradient_ascent`.

    Example:
        >>> weighted_gradient_ascent(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([-0.3466])
    """
    log_probability = -log1p_exp(-odds)
    return (beta * log_probability.detach()).exp() * log_probability


@token_loss
def satimp(odds: Tensor, *, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    r"""SatImp: $p_y^{\beta_1} (1 - p_y)^{\beta_2} \log p_y$, with the weight $w$ in front of the logarithm a constant.

    Its first factor vanishes on saturated (forgotten) tokens, its second on those that the model is certain of.
    Gradient row: $w\,(e_y - p)$.

    Source: SatImp in open-unlearning. Its settings file multiplies this loss by 0.1 and the retain loss by 1, while its
    class and its page say the reverse; here the caller chooses. Arguments, shapes and errors as `cross_entropy`.

    Example:
        >>> satimp(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([-0.0108])
    """
    log_probability = -log1p_exp(-odds)
    weight = (beta1 * log_probability - beta2 * log1p_exp(odds)).detach().exp()
    return weight * log_probability


@token_loss(runner_up=True)
def inverted_hinge(odds: Tensor, runner_up_odds: Tensor) -> Tensor:
    r"""Inverted hinge: $1 + p_y - \max_{v \ne y} p_v$, between 0 and 2.

    As with gradient ascent, its gradient vanishes on perfectly memorised tokens. Of several likeliest other tokens the
    first is taken.

    Source: LoKU (2408.06621), equation 4. Difference from the authors' code: the softmax is always applied, and the
    value is computed from two log-odds, so that it is exact where $p_y$ or $p_v$ rounds to 1. Arguments, shapes and
    errors as `cross_entropy`.

    Example:
        >>> inverted_hinge(torch.tensor([[0.0, 0.0, -9.0]]), torch.tensor([0]))
        tensor([1.])
    """
    logsigmoid = torch.nn.functional.logsigmoid
    # Not sigmoid: the derivative of exp(logsigmoid), p (1 - p), stays exact where p rounds to 1.
    return 1.0 + logsigmoid(odds).exp() - logsigmoid(runner_up_odds).exp()


@token_loss
def jensen_shannon_label(odds: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence of the model from its label, between 0 (certain of it) and log 2.

    $$\mathrm{JSD}(p, e_y) = \log 2 + \tfrac12 \left[ p_y \log p_y - (1 + p_y) \log(1 + p_y) \right]$$

    It teaches the label, and moves a token hardly where the model excludes it: the gradient row
    $\tfrac12\, p_y \log(p_y / (1 + p_y))\,(e_y - p)$ vanishes with $p_y$ and nowhere exceeds 0.155. JensUn forgets by
    it: its labels are those of "No idea", over and over.

    Source: JensUn (2509.02820), its forget loss, written from the formula. `jensen_shannon` is its retain loss.
    Arguments, shapes and errors as `cross_entropy`.

    Example:
        >>> jensen_shannon_label(torch.tensor([[0.0, 0.0], [-50.0, 50.0]]), torch.tensor([0, 0]))
        tensor([0.2158, 0.6931])
    """
    # With r = 1 - p, so that a token that is nearly certain has a value with all its digits.
    surprise, p, r = log1p_exp(-odds), (-log1p_exp(-odds)).exp(), (-log1p_exp(odds)).exp()
    return 0.5 * (r * math.log(2.0) - p * surprise - (2.0 - r) * torch.log1p(-r / 2.0))
