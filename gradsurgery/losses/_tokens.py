"""Losses with one value per token, all functions of the label's log-odds; see `token_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurgery.losses._log_odds import IGNORED, log1p_exp, token_loss


@token_loss
def cross_entropy(odds: Tensor) -> Tensor:  # noqa: D417 (the decorator makes logits and labels of it)
    r"""Negative log-likelihood of each label, :math:`-\log p_y = \mathrm{softplus}(-d)`; the usual retain loss.

    Args:
        logits: ``[N, V]``, any floating-point type (half-precision ones are computed in float32).
        labels: ``[N]`` int64, -100 where a token does not count.

    Returns:
        ``[N]`` nats, float32 (float64 for float64 logits); 0 with a zero gradient where the label is -100.

    Raises:
        ValueError: If the shapes are not ``[N, V]`` and ``[N]``, or V < 2.
        TypeError: If the labels are not integers.

    Gradient row: p - e_y. Cost: one float copy of the logits for the backward pass; `linear` holds none. All losses here share these.

    Example:
        >>> cross_entropy(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, -100]))
        tensor([0.6931, 0.0000])
    """
    return log1p_exp(-odds)


@token_loss
def gradient_ascent(odds: Tensor) -> Tensor:
    r"""Log-likelihood of each label, :math:`\log p_y`: minimising it climbs the cross-entropy, without bound.

    Gradient row: e_y - p, which vanishes on a memorised token and is largest on a forgotten one. Arguments, shapes and errors as
    `cross_entropy`. Source: "GradAscent" of TOFU (2401.06121) and open-unlearning.

    Example:
        >>> gradient_ascent(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([-0.6931])
    """
    return -log1p_exp(-odds)


@token_loss
def ceu(odds: Tensor) -> Tensor:
    r"""CE-U: cross-entropy against the model's own distribution with the label's logit at minus infinity.

    Computed as :math:`-\log(1 - p_y) = \mathrm{softplus}(d)`, which has exactly CE-U's gradient, row p - q: p_y at the label and
    -p_i p_y/(1 - p_y) elsewhere, of 1-norm 2 p_y: largest where the model is most confident, 0 once it has forgotten.

    Source: CE-U (2503.01224). Difference from the authors' code: its value is larger by the entropy of q, a constant for the gradient;
    its gradient, q - p from two softmaxes, is rounding noise for forgotten tokens. The loss is also that of unlikelihood training
    (`unlikelihood`). The paper skips the first answer token: ``answer_tokens(..., skip_first=1)``. It says nothing about retention: pair
    it with surgery or a retain loss. Arguments, shapes and errors as `cross_entropy`.

    Example:
        >>> ceu(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([0.6931])
    """
    return log1p_exp(odds)


@token_loss
def unlikelihood(odds: Tensor) -> Tensor:
    r"""Unlikelihood: :math:`-\log(1 - p_y)`, the same value and gradient as `ceu`, which says why.

    Source: unlikelihood training (1908.04319), equation 4, with the label as the only negative candidate; there it counts every answer
    token, while CE-U skips the first. Arguments, shapes and errors as `cross_entropy`.

    Example:
        >>> unlikelihood(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([0.6931])
    """
    return log1p_exp(odds)


@token_loss
def weighted_gradient_ascent(odds: Tensor, *, beta: float = 1.0) -> Tensor:
    r"""Gradient ascent that lets go of forgotten tokens: :math:`p_y^\beta \log p_y` with the weight held constant.

    Gradient row: :math:`p_y^\beta (e_y - p)`. Normalisation as everywhere per token; open-unlearning takes the mean over the tokens that
    count, `token_mean`.

    Source: WGA of the G-effect paper (2502.19301); beta is 1 in open-unlearning, 5 in the authors' code when unset, and 0.1 in GRU's
    configuration. Arguments, shapes and errors as `cross_entropy`; beta any number, 0 gives `gradient_ascent`.

    Example:
        >>> weighted_gradient_ascent(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([-0.3466])
    """
    log_probability = -log1p_exp(-odds)
    return (beta * log_probability.detach()).exp() * log_probability


@token_loss
def satimp(odds: Tensor, *, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    r"""SatImp: :math:`p_y^{\beta_1} (1 - p_y)^{\beta_2} \log p_y` with the weights held constant.

    The first weight stops at saturated (forgotten) tokens, the second spares those that the model is certain of. Gradient row:
    :math:`w (e_y - p)`.

    Source: SatImp in open-unlearning, whose settings file multiplies this by 0.1 and the retain loss by 1, while its class and its page
    say the reverse; here the weight is yours. Arguments, shapes and errors as `cross_entropy`.

    Example:
        >>> satimp(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([-0.0108])
    """
    log_probability = -log1p_exp(-odds)
    weight = (beta1 * log_probability - beta2 * log1p_exp(odds)).detach().exp()
    return weight * log_probability


@token_loss(runner_up=True)
def inverted_hinge(odds: Tensor, runner_up_odds: Tensor) -> Tensor:
    r"""Inverted hinge: :math:`1 + p_y - \max_{v \ne y} p_v`, in [0, 2].

    Source: LoKU (2408.06621), equation 4. Like gradient ascent its gradient vanishes on perfectly memorised tokens; unlike its
    authors' code it always applies the softmax, and is computed from two log-odds, exact where p_y or p_v rounds to 1. The first of
    equal runners-up is taken. Arguments, shapes and errors as `cross_entropy`.

    Example:
        >>> inverted_hinge(torch.tensor([[0.0, 0.0, -9.0]]), torch.tensor([0]))
        tensor([1.])
    """
    logsigmoid = torch.nn.functional.logsigmoid
    # exp(logsigmoid) and not sigmoid: its derivative p (1 - p) keeps its digits where p rounds to 1.
    return 1.0 + logsigmoid(odds).exp() - logsigmoid(runner_up_odds).exp()


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
