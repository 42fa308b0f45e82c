r"""Losses with one value per sequence, all :math:`-\frac{2}{\beta} \log\sigma(\beta x)` of one number x: how far a sequence has come.

They take negative log-likelihoods that are summed over a sequence's answer tokens, so their gradient is the sum over those tokens and not
the mean: where nothing has been forgotten yet, `npo` is `gradient_ascent` times about T, the number of answer tokens. Rows of a Gram matrix
feel that as T squared: do not mix both normalisations without noting it.

Example:
    A batch of two sequences, from logits to a loss:

    >>> import torch
    >>> from gradsurgery.losses import answer_tokens, cross_entropy
    >>> logits, labels = torch.zeros(2, 4, 10, requires_grad=True), torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, 5]])
    >>> nll = sequence_sum(cross_entropy(*answer_tokens(logits, labels)), labels)
    >>> npo(nll, reference_nll=nll.detach()).mean().backward()
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gradsurgery.losses._answers import answer_tokens


def npo(nll: Tensor, reference_nll: Tensor, beta: float = 0.1) -> Tensor:
    r"""Negative preference optimisation: :math:`-\frac{2}{\beta}\log\sigma(\beta D)`, with D = nll - reference nll of a forget sequence.

    Bounded below by 0 and reached from above as the model's likelihood falls below the reference's.

    Args:
        nll: ``[B]`` nats, the model's negative log-likelihood summed over each sequence's answer tokens (`sequence_sum`).
        reference_nll: ``[B]`` nats, that of the model before unlearning (a second model, an adapter switched off, or numbers from a
            disk); a constant, whatever graph it carries.
        beta: Inverse temperature, > 0. The paper and open-unlearning's configuration use 0.1 (its class 1); beta -> 0 is gradient ascent.

    Returns:
        ``[B]``, float32 (float64 if an input is), one value per sequence; take the mean for the paper's loss.

    Raises:
        ValueError: If the shapes are not one ``[B]``, or beta is not positive.
        TypeError: If an input is not of a floating-point type.

    Gradient: -2 sigma(-beta D) by nll, in [-2, 0]: -1 at the start, where D = 0, then 0 as the sequence is forgotten. Its size is that of
    ascent on the sum of the tokens, about T times ascent on their mean. A sequence without answer tokens (nll 0) has the constant value
    2 log(2) / beta and no gradient.

    Source: NPO (2404.05868); open-unlearning's ``compute_dpo_loss`` without a winner. Same value and gradient.

    Example:
        >>> npo(torch.tensor([7.0, 37.0]), torch.tensor([7.0, 7.0]))
        tensor([13.8629,  0.9717])
    """
    _check(nll=nll, reference_nll=reference_nll)
    return _bounded(_wide(nll) - _wide(reference_nll.detach()), beta)


def simnpo(nll: Tensor, lengths: Tensor, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    r"""Simple NPO, without a reference model: :math:`-\frac{2}{\beta}\log\sigma(\beta(\mathrm{nll}/T - \delta))`, T answer tokens.

    Args:
        nll: ``[B]`` nats, summed over each sequence's answer tokens (`sequence_sum`): this function divides.
        lengths: ``[B]``, the number of those tokens (`answer_lengths`, with the same ``skip_first``).
        beta: Inverse temperature, > 0; open-unlearning's configuration uses 4.5 (its class 1), with 0.125 as the forget loss's weight.
        delta: Mean nll in nats at which the gradient is halved. The paper's margin is gamma = beta * delta.

    Returns:
        ``[B]``, float32 (float64 if nll is), one value per sequence.

    Raises:
        ValueError: If the shapes are not one ``[B]``, beta is not positive, or a length is not: a sequence whose answer was cut off has
            no mean. Looking costs one synchronisation with the device.
        TypeError: If nll is not of a floating-point type.

    Gradient: -2 sigma(-beta(nll / T - delta)) / T by nll, so every sequence weighs the same.

    Source: SimNPO (2410.07163). Difference from open-unlearning's code: it counts lengths before the shift, so a label at
    position 0, which nothing predicts, lengthens its sequence; and an empty answer gives it NaN.

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
    r"""Direct preference optimisation of one answer over another: :math:`-\frac{2}{\beta}\log\sigma(\beta(D_r - D_c))`.

    D = nll - reference nll, of the chosen answer (c) and of the rejected one (r). With a refusal ("I don't know") chosen and the answer to
    forget rejected this is IdkDPO. IdkNLL needs no function: it is `cross_entropy` on the refusals, and on the retain set.

    Args:
        chosen_nll: ``[B]`` nats, summed over the answer tokens of each chosen answer (`sequence_sum`).
        rejected_nll: ``[B]`` nats, of each rejected answer to the same question.
        reference_chosen_nll: ``[B]`` nats, the chosen answers' under the model before unlearning; a constant.
        reference_rejected_nll: ``[B]`` nats, the rejected answers' under that model; a constant.
        beta: Inverse temperature, > 0; open-unlearning's configuration uses 0.1 (its class 1).

    Returns:
        ``[B]``, float32 (float64 if an input is), one value per pair.

    Raises:
        ValueError: If the shapes are not one ``[B]``, or beta is not positive.
        TypeError: If an input is not of a floating-point type.

    Gradient: 2 s by the chosen nll and -2 s by the rejected, s = sigma(-beta(D_r - D_c)). With D_c = 0 it is `npo`.

    Source: DPO (2305.18290), equation 7, and TOFU (2401.06121) for refusals. Difference from DPO: the factor 2 / beta (DPO has 1), which
    open-unlearning has for NPO's sake; multiply by beta / 2 for the standard loss.

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


def sequence_sum(values: Tensor, labels: Tensor, *, skip_first: int = 0) -> Tensor:
    """Values per token, in the order of `answer_tokens`, summed over each sequence.

    Args:
        values: ``[N]``, from a loss per token of ``answer_tokens(logits, labels, skip_first=skip_first)``.
        labels: ``[B, T]``, those that ``answer_tokens`` was given.
        skip_first: What ``answer_tokens`` was given.

    Returns:
        ``[B]``, at least float32; 0 for a sequence without tokens that count. The same on every run, on a GPU too.

    Raises:
        ValueError: If the labels are not ``[B, T]``, or there is not one value for each of their tokens that count.

    Example:
        >>> sequence_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[-100, 7, 8], [-100, -100, 9], [-100, -100, -100]]))
        tensor([3., 4., 0.])
    """
    positions = _positions(labels, skip_first)
    if values.shape != positions.shape:
        raise ValueError(
            f"values: expected {list(positions.shape)}, one of each token that counts, found {list(values.shape)}; sum what a loss gave "
            "for answer_tokens(...) with the same labels and skip_first"
        )
    return _by_sequence(_wide(values), positions, labels.shape)


def answer_lengths(labels: Tensor, *, skip_first: int = 0) -> Tensor:
    """How many tokens of each sequence count: what `answer_tokens` returns of it.

    Args:
        labels: ``[B, T]``, -100 on the prompt and the padding.
        skip_first: Answer tokens left out at the start of each sequence.

    Returns:
        ``[B]`` int64. A label at position 0 does not count, for nothing predicts it.

    Raises:
        ValueError: If the labels are not ``[B, T]`` or ``skip_first`` is negative.

    Example:
        >>> answer_lengths(torch.tensor([[-100, 7, 8], [-100, -100, 9], [-100, -100, -100]]))
        tensor([2, 1, 0])
    """
    positions = _positions(labels, skip_first)
    return _by_sequence(torch.ones_like(positions), positions, labels.shape)


def _bounded(distance: Tensor, beta: float) -> Tensor:
    if not beta > 0:
        raise ValueError(f"beta: expected a number > 0, found {beta}; gradient_ascent is the limit of a vanishing beta")
    # logsigmoid and not softplus(-x), which torch cuts off at 20: right to the last digit on both sides.
    return (-2.0 / beta) * functional.logsigmoid(beta * distance)


def _positions(labels: Tensor, skip_first: int) -> Tensor:
    """Where in the flattened ``[B, T]`` each token that counts is predicted, ``[N]``."""
    if labels.dim() != 2:
        raise ValueError(f"labels: expected [B, T], found {list(labels.shape)}")
    # answer_tokens itself chooses, so that which tokens count is said in one place.
    places = torch.arange(labels.numel(), device=labels.device).view(*labels.shape, 1)
    return answer_tokens(places, labels, skip_first=skip_first)[0].squeeze(1)


def _by_sequence(values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    # Laid out and then summed, not index_add: its atomic additions on a GPU have no fixed order.
    return values.new_zeros(shape.numel()).scatter(0, positions, values).view(shape).sum(1)


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
