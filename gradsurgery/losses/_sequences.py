r"""Losses with one value per sequence, functions of one number $x$ that grows as the sequence is forgotten.

$$-\frac{2}{\beta} \log\sigma(\beta x)$$

They take negative log-likelihoods (nll) that are summed over a sequence's answer tokens, so that their gradient is a
sum over those tokens and not a mean. Where nothing has been forgotten yet, the gradient of `npo` is about T times that
of the mean `gradient_ascent`, T the number of answer tokens, and the entries of a Gram matrix are about T squared times
as large. Be aware of that when you combine a loss per sequence with a mean per token.

Example:
    A batch of two sequences, from logits to a loss:

    >>> import torch
    >>> from gradsurgery.losses import answer_tokens, cross_entropy, sequence_sum
    >>> logits, labels = torch.zeros(2, 4, 10, requires_grad=True), torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, 5]])
    >>> nll = sequence_sum(cross_entropy(*answer_tokens(logits, labels)), labels)
    >>> npo(nll, reference_nll=nll.detach()).mean().backward()
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["npo", "simnpo", "dpo"]  # noqa: RUF022 (in the order of the table `SEQUENCE_LOSSES`)


def npo(nll: Tensor, reference_nll: Tensor, beta: float = 0.1) -> Tensor:
    r"""Negative preference optimisation (NPO) of a forget sequence.

    $$-\frac{2}{\beta}\log\sigma(\beta D), \quad D = \mathrm{nll} - \mathrm{nll_{reference}}$$

    The loss falls towards its lower bound 0 as the model's likelihood of the sequence falls below the reference's.

    Args:
        nll: ``[B]`` nats, the model's negative log-likelihood summed over each sequence's answer tokens
            (`sequence_sum`).
        reference_nll: ``[B]`` nats, the same for the model before unlearning (a second model, the model with its
            adapter switched off, or numbers from a file); a constant, whatever graph it carries.
        beta: Inverse temperature, > 0. The paper and open-unlearning's configuration use 0.1 (its class 1). For beta ->
            0 the gradient becomes that of gradient ascent.

    Returns:
        ``[B]``, float32 (float64 if an input is), one value per sequence; take the mean for the paper's loss.

    Raises:
        ValueError: If the shapes are not the same ``[B]``, or beta is not positive.
        TypeError: If an input is not of a floating-point type.

    Gradient by nll: $-2\,\sigma(-\beta D)$, between -2 and 0. It is -1 at the start, where $D = 0$, and goes to 0 as
    the sequence is forgotten. It is as large as that of ascent on the sum of the tokens, about T times that of ascent
    on their mean. A sequence without answer tokens (nll 0) has the constant value $2 \log(2) / \beta$ and no gradient.

    Source: NPO (2404.05868); open-unlearning's ``compute_dpo_loss`` without a winner, with the same value and gradient.

    Example:
        >>> npo(torch.tensor([7.0, 37.0]), torch.tensor([7.0, 7.0]))
        tensor([13.8629,  0.9717])
    """
    _check(nll=nll, reference_nll=reference_nll)
    return _bounded(_wide(nll) - _wide(reference_nll.detach()), beta)


def simnpo(nll: Tensor, lengths: Tensor, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    r"""Simple NPO, without a reference model; $T$ is the number of answer tokens.

    $$-\frac{2}{\beta}\log\sigma(\beta(\mathrm{nll}/T - \delta))$$

    Args:
        nll: ``[B]`` nats, summed over each sequence's answer tokens (`sequence_sum`). This function divides by their
            number.
        lengths: ``[B]``, the number of those tokens (`answer_lengths`, with the same ``skip_first``).
        beta: Inverse temperature, > 0; open-unlearning's configuration uses 4.5 (its class 1), with 0.125 as the forget
            loss's weight.
        delta: Mean nll in nats at which the gradient has half its largest size. The paper's margin is gamma = beta *
            delta.

    Returns:
        ``[B]``, float32 (float64 if nll is), one value per sequence.

    Raises:
        ValueError: If the shapes are not the same ``[B]``, if beta is not positive, or if a length is not: a sequence
            whose answer was cut off has no mean. The check of the lengths waits for the device once.
        TypeError: If nll is not of a floating-point type.

    Gradient by nll: $-2\,\sigma(-\beta(\mathrm{nll}/T - \delta)) / T$, so that every sequence has the same weight,
    however long.

    Source: SimNPO (2410.07163). Difference from open-unlearning's code: it counts lengths before the shift, so that a
    label at position 0, which nothing predicts, adds 1 to the length; and an empty answer gives NaN.

    Example:
        >>> simnpo(torch.tensor([6.0, 6.0]), torch.tensor([3, 6]))
        tensor([5.4845e-05, 4.9101e-03])
    """
    _check(nll=nll)
    if lengths.shape != nll.shape:
        raise ValueError(f"lengths: expected {list(nll.shape)}, one of each sequence, found {list(lengths.shape)}")
    if bool((lengths <= 0).any()):
        raise ValueError(
            "lengths: expected at least one answer token in every sequence, found none in sequences "
            f"{(lengths <= 0).nonzero().flatten().tolist()}; drop them (a limit on the length may have cut their answers off)"
        )
    return _bounded(_wide(nll) / lengths - delta, beta)


def dpo(
    chosen_nll: Tensor,
    rejected_nll: Tensor,
    reference_chosen_nll: Tensor,
    reference_rejected_nll: Tensor,
    beta: float = 0.1,
) -> Tensor:
    r"""Direct preference optimisation of one answer over another.

    $$-\frac{2}{\beta}\log\sigma(\beta(D_r - D_c)), \quad D = \mathrm{nll} - \mathrm{nll_{reference}}$$

    $D$ is taken of the chosen answer ($c$) and of the rejected one ($r$). If the chosen answer is a
    refusal ("I don't know") and the rejected one is the answer to forget, this is IdkDPO. IdkNLL needs no function of
    its own: it is `cross_entropy` of the refusals and of the retain set.

    Args:
        chosen_nll: ``[B]`` nats, summed over the tokens of each chosen answer (`sequence_sum`).
        rejected_nll: ``[B]`` nats, the same of the rejected answer to the same question.
        reference_chosen_nll: ``[B]`` nats, the chosen answers' nll under the model before unlearning; a constant.
        reference_rejected_nll: ``[B]`` nats, the rejected answers' nll under that model; a constant.
        beta: Inverse temperature, > 0; open-unlearning's configuration uses 0.1 (its class 1).

    Returns:
        ``[B]``, float32 (float64 if an input is), one value per pair.

    Raises:
        ValueError: If the shapes are not the same ``[B]``, or beta is not positive.
        TypeError: If an input is not of a floating-point type.

    Gradient: $2 s$ by the chosen nll and $-2 s$ by the rejected one, with $s = \sigma(-\beta(D_r - D_c))$. If
    $D_c = 0$, this is `npo`.

    Source: DPO (2305.18290), equation 7, and TOFU (2401.06121) for refusals. Difference from DPO: the factor 2 / beta
    (DPO has 1), which open-unlearning uses to match NPO. Multiply by beta / 2 for the standard loss.

    Example:
        >>> dpo(*torch.tensor([[3.0], [9.0], [5.0], [2.0]]), beta=1.0)  # the refusal gained 2 nats, the answer lost 7
        tensor([0.0002])
    """
    _check(
        chosen_nll=chosen_nll,
        rejected_nll=rejected_nll,
        reference_chosen_nll=reference_chosen_nll,
        reference_rejected_nll=reference_rejected_nll,
    )
    chosen = _wide(chosen_nll) - _wide(reference_chosen_nll.detach())
    rejected = _wide(rejected_nll) - _wide(reference_rejected_nll.detach())
    return _bounded(rejected - chosen, beta)


def _bounded(distance: Tensor, beta: float) -> Tensor:
    if not beta > 0:
        raise ValueError(f"beta: expected a number > 0, found {beta}; gradient_ascent is the limit of a vanishing beta")
    # Not softplus(-x), which torch replaces by its argument beyond 20: logsigmoid is exact to the last digit on both
    # sides.
    return (-2.0 / beta) * functional.logsigmoid(beta * distance)


def _check(**values: Tensor) -> None:
    first = next(iter(values.values()))
    for name, value in values.items():
        if value.dim() != 1 or value.shape != first.shape:
            raise ValueError(
                f"{name}: expected [B]{f' with B = {len(first)}' if first.dim() == 1 else ''}, one sum of each sequence, found "
                f"{list(value.shape)}; sequence_sum makes them from values per token"
            )
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point type, found {value.dtype}")


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
