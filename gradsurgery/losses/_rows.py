"""Losses of whole rows of logits: divergences from another distribution, and the margin of the largest logit."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gradsurgery.losses._backward import check_first_derivative
from gradsurgery.losses._checks import IGNORED, check_integers, check_rows, checked, float_type
from gradsurgery.losses._divergence import checked_beta, compare, cross_entropy_, divergence_
from gradsurgery.losses._in_memory import check_known_tokens
from gradsurgery.losses._jensen_shannon import compare as compare_jensen_shannon
from gradsurgery.losses._jensen_shannon import jensen_shannon_
from gradsurgery.losses._loss import described
from gradsurgery.losses._pairs import blocks, shifted

__all__ = ["undial", "kl_divergence", "uniform", "logit_margin", "jensen_shannon"]  # noqa: RUF022 (in the order of the table `ROW_LOSSES`)

_BETA = 10.0


@described(takes_labels=False, takes_reference=True, in_place=divergence_)
def kl_divergence(logits: Tensor, reference_logits: Tensor) -> Tensor:
    r"""Divergence of the model from a reference, $\mathrm{KL}(q \,\|\, p)$; a retain loss.

    $$\mathrm{KL}(q \,\|\, p) = \sum_i q_i \log(q_i / p_i)$$

    Args:
        logits: ``[N, V]``, the model's ($p$), any floating-point type (half-precision ones are computed in float32).
        reference_logits: ``[N, V]``, those of the model before unlearning ($q$); a constant, whatever graph it carries.
            A token whose reference logit is minus infinity adds nothing to the sum.

    Returns:
        ``[N]`` nats, float32 (float64 for float64 logits), one value per row; infinite where the model excludes a token
        that the reference does not.

    Raises:
        ValueError: If the shapes are not the same ``[N, V]``.
        TypeError: If the logits are not of a floating-point type.

    Gradient row: $p - q$. Cost: for 262 144 or more float32 or bfloat16 logits on a CPU with a C++ compiler two
    exponentials per logit three times, no temporaries, and six numbers per row that are kept (`backend`). Elsewhere
    temporaries for one block of rows: the forward pass makes the gradient of float32 and float64 logits too, which the
    first backward pass scales in place and hands out; that of other types the backward pass computes, from the inputs
    and five numbers per row. `linear` never holds ``[N, V]``.

    Source: the "KL" retain loss of TOFU (2401.06121) and open-unlearning. Difference from the authors' code: it takes
    the mean over all B T positions, prompt and padding included. Here the caller chooses the rows (`answer_tokens`, or
    the attention mask) and the mean.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, -torch.inf], [1.0, 2.0]]))
        tensor([0.6931, 0.0000])
    """
    check_rows(logits, reference_logits)
    return compare(logits, reference_logits)


@described(takes_labels=False, in_place=divergence_)
def uniform(logits: Tensor) -> Tensor:
    r"""Divergence of the model from the uniform distribution.

    $$\mathrm{KL}(U \,\|\, p) = \log\sum_i e^{z_i} - \overline{z} - \log V$$

    It pulls the model towards knowing nothing. ULD trains its assistant with it on the retain set.

    Args:
        logits: ``[N, V]``, any floating-point type.

    Returns:
        ``[N]`` nats, at least float32, one value per row; infinite where a logit is minus infinity (cut off the padding
        of a vocabulary).

    Raises:
        ValueError: If the logits are not ``[N, V]``.
        TypeError: If they are not of a floating-point type.

    Gradient row: $p - 1/V$. Cost: as `kl_divergence`; no reference is held.

    Source: ULD (2406.08607), equation 5, with the weight 6.5 in the paper and 5 in the code. Difference from the
    authors' code: its value is larger by log V, a constant; it averages over all positions, prompt and padding
    included; and it takes a logarithm of rounded probabilities, which is minus infinity in bfloat16 for rare tokens.

    Example:
        >>> uniform(torch.tensor([[3.0, 3.0, 3.0], [9.0, 0.0, 0.0]]))
        tensor([0.0000, 4.9016])
    """
    check_rows(logits)
    return compare(logits, None)


@described(takes_reference=True, in_place=functools.partial(cross_entropy_, beta=_BETA))
def undial(logits: Tensor, labels: Tensor, reference_logits: Tensor, beta: float = _BETA) -> Tensor:
    r"""UNDIAL: cross-entropy $-\sum_i q_i \log p_i$ against the reference with the label's logit lowered by beta.

    $$q = \mathrm{softmax}(z_\mathrm{ref} - \beta e_y)$$

    Args:
        logits: ``[N, V]``, the model's ($p$), any floating-point type.
        labels: ``[N]`` integers, -100 where a token does not count.
        reference_logits: ``[N, V]``, those of the model before unlearning; a constant, whatever graph it carries.
        beta: How much the label's logit is lowered, >= 0; open-unlearning's configuration uses 10 (its class 1), with
            learning rate 1e-4.

    Returns:
        ``[N]`` nats, float32 (float64 for float64 logits), one value per token; 0 with a zero gradient where the label
        is -100. The smallest possible value is the entropy of $q$ and not 0.

    Raises:
        ValueError: If the shapes are not ``[N, V]``, ``[N]`` and ``[N, V]``, V < 2, or beta is negative.
        TypeError: If the labels are not integers, or the logits not of a floating-point type.

    Gradient row: $p - q$. Cost: as `kl_divergence`.

    Source: UNDIAL (2402.10052). Difference from open-unlearning's code, which has no mask: it averages over all B (T -
    1) positions, and where the label is -100 it lowers vocabulary entry V - 100, so that prompt and padding take part.

    Example:
        >>> undial(torch.zeros(2, 4), torch.tensor([1, -100]), torch.zeros(2, 4))
        tensor([1.3863, 0.0000])
    """
    check_rows(logits, reference_logits)
    checked(logits, labels)
    check_known_tokens(labels, logits.shape[1])
    return compare(logits, reference_logits, labels, checked_beta(beta))


@described()
def logit_margin(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    r"""Squared margin of the largest logit over the mean one; PDU's forget loss, 0 for equal logits.

    $$(\max_k z_k - \overline{z})^2$$

    Args:
        logits: ``[N, V]``, any floating-point type.
        labels: ``[N]`` integers, or None. Only whether they are -100 matters: the loss is against any confidence, right
            or wrong.

    Returns:
        ``[N]``, float32 (float64 for float64 logits), one value per token; 0 with a zero gradient where the label is
        -100.

    Raises:
        ValueError: If the shapes are not ``[N, V]`` and ``[N]``.
        TypeError: If the labels are not integers, or the logits not of a floating-point type.

    Gradient row: $2 m (e_k - 1/V)$, with $m$ the margin and $k$ the place of the largest logit, the first of equals.
    Cost: one pass; two numbers per row are kept for the backward pass.

    Source: PDU (primal-dual unlearning, 2506.05314) in open-unlearning; `DualVariable` is its other half. Difference
    from the authors' code: their mask is not shifted, so that it selects the rows at the answer tokens instead of those
    that predict them (`answer_tokens`).

    Example:
        >>> logit_margin(torch.tensor([[4.0, 1.0, 1.0], [5.0, 5.0, 5.0]]))
        tensor([4., 0.])
    """
    check_rows(logits)
    valid = None
    if labels is not None:
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels: expected {list(logits.shape[:1])}, found {list(labels.shape)}")
        check_integers(labels)
        valid = labels != IGNORED
    # Autograd differentiates the square: its derivative 2 m is as exact as the margin.
    values = _Margin.apply(logits, valid).square()
    return values if valid is None else torch.where(valid, values, 0.0)


@described(takes_labels=False, takes_reference=True, in_place=jensen_shannon_)
def jensen_shannon(logits: Tensor, reference_logits: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence of the model and a reference; a retain loss between 0 (the same) and log 2.

    $$\mathrm{JSD}(p, q) = \tfrac12 \mathrm{KL}(p \,\|\, m) + \tfrac12 \mathrm{KL}(q \,\|\, m),
    \qquad m = \tfrac12 (p + q)$$

    Args:
        logits: ``[N, V]``, the model's ($p$), any floating-point type (half-precision ones are computed in float32).
        reference_logits: ``[N, V]``, those of the model before unlearning ($q$); a constant, whatever graph it carries.

    Returns:
        ``[N]`` nats, float32 (float64 for float64 logits), one value per row, with the absolute error of that type: of
        distributions that hardly differ it has fewer digits than `kl_divergence`.

    Raises:
        ValueError: If the shapes are not the same ``[N, V]``.
        TypeError: If the logits are not of a floating-point type.

    Gradient row: $\tfrac12\, p_i \left( \log(p_i / m_i) - \mathrm{KL}(p \,\|\, m) \right)$. Cost:
    temporaries for one block of rows; the backward pass computes them again. It has no second
    derivative.

    Source: JensUn (2509.02820), its retain loss, written from the formula.

    Example:
        >>> jensen_shannon(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, -torch.inf], [1.0, 2.0]]))
        tensor([0.2158, 0.0000])
    """
    check_rows(logits, reference_logits)
    return compare_jensen_shannon(logits, reference_logits)


class _Margin(torch.autograd.Function):
    """max z - mean z, ``[N]``; gradient e_k - 1/V with k the first of the largest, 0 in rows that do not count."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, valid: Tensor | None) -> Tensor:
        margins = logits.new_empty(len(logits), dtype=float_type(logits.dtype))
        largest = torch.empty(len(logits), 1, dtype=torch.int64, device=logits.device)
        for rows, room in blocks(logits):
            # The mean of the differences, none of which is positive: the mean of logits near 1e4 is exact to three
            # decimals only.
            below, _ = shifted(logits[rows], room[0])
            margins[rows] = below.mean(1).neg_()
            largest[rows] = below.argmax(1, keepdim=True)
        ctx.save_for_backward(largest, valid)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return margins

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_first_derivative()
        largest, valid = ctx.saved_tensors
        outer = gradients[0][:, None]
        if valid is not None:
            outer = outer.masked_fill(~valid[:, None], 0.0)
        share = outer / ctx.shape[1]
        row = (-share).to(ctx.dtype).repeat(1, ctx.shape[1])
        return row.scatter_(1, largest, (outer - share).to(ctx.dtype)), None
