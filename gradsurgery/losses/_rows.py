r"""Losses of whole rows of logits: divergences from a reference distribution, and the margin of the largest logit.

The divergence of q from p is computed as :math:`\sum_i q_i (e^{u_i} - 1 - u_i)` with the log ratios :math:`u = \log p - \log q`. No term is
negative, and an error in a normaliser counts only by its square, so that two models that hardly differ get a small divergence and not the
rounding noise of two large sums; the gradient :math:`q_i (e^{u_i} - 1)` is as exact. Rows are worked on in blocks, and nothing of the
logits' size is kept for the backward pass but the logits themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.losses._log_odds import IGNORED, check_integers, checked, float_type
from gradsurgery.losses._pairs import Pair, Room, Totals, blocks, shifted


def kl_divergence(logits: Tensor, reference_logits: Tensor) -> Tensor:
    r"""Divergence of the model from a reference, :math:`\mathrm{KL}(q\|p) = \sum_i q_i \log(q_i / p_i)`; a retain loss.

    Args:
        logits: ``[N, V]``, the model's (p), any floating-point type (half-precision ones are computed in float32).
        reference_logits: ``[N, V]``, those of the model before unlearning (q); a constant, whatever graph it carries. Tokens at minus
            infinity have no share.

    Returns:
        ``[N]`` nats, float32 (float64 for float64 logits), one value per row; infinite where the model excludes what
        the reference does not.

    Raises:
        ValueError: If the shapes are not one ``[N, V]``.
        TypeError: If the logits are not of a floating-point type.

    Gradient row: p - q. Cost: temporaries of a block of rows, nothing kept but the inputs and five numbers a row; the backward
    pass computes the row anew, and `linear` asks for it in the forward pass.

    Source: the "KL" retain loss of TOFU (2401.06121) and open-unlearning. Difference from the authors' code: it takes the mean over all
    B T positions, prompt and padding included; here the caller chooses the rows (``answer_tokens``, or the attention mask) and the mean.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, -torch.inf], [1.0, 2.0]]))
        tensor([0.6931, 0.0000])
    """
    _check(logits, reference_logits)
    return _Divergence.apply(logits, reference_logits.detach(), None, None)


def uniform(logits: Tensor) -> Tensor:
    r"""Divergence from the uniform distribution, :math:`\mathrm{KL}(U\|p) = \log\sum_i e^{z_i} - \overline{z} - \log V`.

    Pulls towards knowing nothing: what ULD's assistant shall say about the retain set.

    Args:
        logits: ``[N, V]``, any floating-point type.

    Returns:
        ``[N]`` nats, at least float32, one value per row; infinite where a logit is minus infinity (cut the padding of a vocabulary off).

    Raises:
        ValueError: If the logits are not ``[N, V]``.
        TypeError: If they are not of a floating-point type.

    Gradient row: p - 1/V. Cost: as `kl_divergence`, and no reference is formed.

    Source: ULD (2406.08607), equation 5, with the weight 6.5 in the paper and 5 in the code. Difference from the authors' code: its value
    is larger by log V, a constant; it averages over all positions, prompt and padding included, and takes a logarithm of rounded
    probabilities, which is minus infinity in bfloat16 for rare tokens.

    Example:
        >>> uniform(torch.tensor([[3.0, 3.0, 3.0], [9.0, 0.0, 0.0]]))
        tensor([0.0000, 4.9016])
    """
    _check(logits)
    return _Divergence.apply(logits, None, None, None)


def undial(logits: Tensor, labels: Tensor, reference_logits: Tensor, beta: float = 10.0) -> Tensor:
    r"""UNDIAL: cross-entropy :math:`-\sum_i q_i \log p_i` against q = softmax(z_ref - beta e_y), the reference less sure of the label.

    Args:
        logits: ``[N, V]``, the model's (p), any floating-point type.
        labels: ``[N]`` integers, -100 where a token does not count.
        reference_logits: ``[N, V]``, those of the model before unlearning; a constant, whatever graph it carries.
        beta: How much the label's logit is lowered, >= 0; open-unlearning's configuration uses 10 (its class 1), with learning rate 1e-4.

    Returns:
        ``[N]`` nats, float32 (float64 for float64 logits), one value per token; 0 with a zero gradient where the label is -100. The least
        possible value is q's entropy and not 0.

    Raises:
        ValueError: If the shapes are not ``[N, V]``, ``[N]`` and ``[N, V]``, V < 2, or beta is negative.
        TypeError: If the labels are not integers, or the logits not of a floating-point type.

    Gradient row: p - q. Cost: as `kl_divergence`.

    Source: UNDIAL (2402.10052). Difference from open-unlearning's code: that has no mask. It averages over all B (T - 1) positions, and
    where the label is -100 it lowers vocabulary entry V - 100, so prompt and padding take part.

    Example:
        >>> undial(torch.zeros(2, 4), torch.tensor([1, -100]), torch.zeros(2, 4))
        tensor([1.3863, 0.0000])
    """
    _check(logits, reference_logits)
    checked(logits, labels)
    return _Divergence.apply(logits, reference_logits.detach(), labels, _checked_beta(beta))


def logit_margin(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    r"""Squared margin of the largest logit over the mean one, :math:`(\max_k z_k - \overline{z})^2`: PDU's forget loss, 0 for flat logits.

    Args:
        logits: ``[N, V]``, any floating-point type.
        labels: ``[N]`` integers if given; only whether they are -100 matters. The loss asks for no confidence at all, right or wrong.

    Returns:
        ``[N]``, float32 (float64 for float64 logits), one value per token; 0 with a zero gradient where the label is -100.

    Raises:
        ValueError: If the shapes are not ``[N, V]`` and ``[N]``.
        TypeError: If the labels are not integers, or the logits not of a floating-point type.

    Gradient row: 2 m (e_k - 1/V), m the margin and k the largest logit's place, the first of equals. Cost: one pass; two numbers per row
    are kept for the backward pass.

    Source: PDU, primal-dual unlearning, in open-unlearning; `DualVariable` is its other half. Difference from the authors' code: their mask
    is not shifted, so it counts the rows at the answer tokens instead of those that predict them (``answer_tokens``).

    Example:
        >>> logit_margin(torch.tensor([[4.0, 1.0, 1.0], [5.0, 5.0, 5.0]]))
        tensor([4., 0.])
    """
    _check(logits)
    valid = None
    if labels is not None:
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels: expected {list(logits.shape[:1])}, found {list(labels.shape)}")
        check_integers(labels)
        valid = labels != IGNORED
    # The square is autograd's: its derivative 2 m has the margin's digits.
    values = _Margin.apply(logits, valid).square()
    return values if valid is None else torch.where(valid, values, 0.0)


def _check(logits: Tensor, reference_logits: Tensor | None = None) -> None:
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


OF_PAIR = "of_pair"
"""The attribute in which a loss carries what `of_pair` finds."""


class OfPair(NamedTuple):
    """What `linear` finds on the divergences, and calls in place of differentiating them.

    Attributes:
        beta: What is taken off the labels' reference logits if the loss is the cross-entropy; None for the divergence.
    """

    beta: float | None

    def __call__(self, logits: Tensor, labels: Tensor, reference: Tensor | None, outer: Tensor | None) -> Tensor:
        """Values ``[n]`` of float logits, which are overwritten by the gradient of their sum weighted by ``outer``, if that is given."""
        values, index = torch.empty_like(logits[:, 0]), labels.long()
        for rows, room in blocks(logits):
            pair = _pair(rows, room, logits, reference, index, self.beta)
            values[rows] = pair.divergence() if self.beta is None else pair.cross_entropy()
            if outer is not None:
                pair.difference(outer[rows], out=logits[rows])
        return values


def of_pair(loss: Callable[..., Tensor]) -> OfPair | None:
    """How to have the loss's values and gradient at once, a bound beta included; None for a loss of another kind."""
    bound: dict[str, Any] = {}
    while isinstance(loss, functools.partial) and not loss.args:
        bound = {**loss.keywords, **bound}
        loss = loss.func
    found: OfPair | None = getattr(loss, OF_PAIR, None)
    if found is None or not bound:
        return found
    if found.beta is None or set(bound) != {"beta"}:
        return None
    return OfPair(_checked_beta(bound["beta"]))


vars(undial)[OF_PAIR] = OfPair(10.0)


class _Divergence(torch.autograd.Function):
    """KL(q||p), or with a beta the cross-entropy, ``[N]``; gradient p - q. Without a reference q is uniform."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, reference: Tensor | None, labels: Tensor | None, beta: float | None
    ) -> Tensor:
        index = None if labels is None else torch.where(labels == IGNORED, 0, labels).long()
        values = logits.new_empty(len(logits), dtype=float_type(logits.dtype))
        totals = values.new_empty(len(values), len(Totals._fields))
        for rows, room in blocks(logits):
            pair = _pair(rows, room, logits, reference, index, beta)
            values[rows] = pair.divergence() if beta is None else pair.cross_entropy()
            torch.cat(pair.totals, 1, out=totals[rows])
        ctx.save_for_backward(logits, reference, labels, index, totals)
        ctx.beta = beta
        return values if labels is None else values.masked_fill_(labels == IGNORED, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, reference, labels, index, totals = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows, room in blocks(logits):
            known = Totals(*totals[rows].split(1, 1))
            pair = _pair(rows, room, logits, reference, index, ctx.beta, known)
            pair.difference(gradients[0][rows], out=result[rows])
        if labels is not None:
            ignored = (labels == IGNORED)[:, None]
            # A CPU can see that there are none: a mask takes it longer than all the rest.
            if result.device.type != "cpu" or bool(ignored.any()):
                result.masked_fill_(ignored, 0.0)
        return result, None, None, None


def _pair(
    rows: slice,
    room: Room,
    logits: Tensor,
    reference: Tensor | None,
    index: Tensor | None,
    beta: float | None,
    totals: Totals | None = None,
) -> Pair:
    lowered = None if index is None or beta is None else (index[rows], beta)
    return Pair(logits[rows], None if reference is None else reference[rows], room, lowered, totals)


def _checked_beta(beta: float) -> float:
    if not beta >= 0:
        raise ValueError(f"beta: expected a number >= 0, found {beta}")
    return float(beta)


class _Margin(torch.autograd.Function):
    """max z - mean z, ``[N]``; gradient e_k - 1/V with k the first of the largest, 0 in rows that do not count."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, valid: Tensor | None) -> Tensor:
        margins = logits.new_empty(len(logits), dtype=float_type(logits.dtype))
        for rows, room in blocks(logits):
            # The mean of differences, none of them positive: that of logits of 1e4 has three decimals.
            margins[rows] = shifted(logits[rows], room[0])[0].mean(1).neg_()
        ctx.save_for_backward(logits.argmax(1, keepdim=True), valid)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return margins

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        largest, valid = ctx.saved_tensors
        outer = gradients[0][:, None]
        if valid is not None:
            outer = outer.masked_fill(~valid[:, None], 0.0)
        share = outer / ctx.shape[1]
        row = (-share).to(ctx.dtype).repeat(1, ctx.shape[1])
        return row.scatter_(1, largest, (outer - share).to(ctx.dtype)), None
