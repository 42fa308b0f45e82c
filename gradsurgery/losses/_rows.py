r"""Losses of whole rows of logits: divergences from a reference distribution, and the margin of the largest logit.

The divergence of q from p is computed as :math:`\sum_i q_i (e^{u_i} - 1 - u_i)` with the log ratios :math:`u = \log p - \log q`. No term is
negative, and an error in a normaliser counts only by its square, so that two models that hardly differ get a small divergence and not the
rounding noise of two large sums; the gradient :math:`q_i (e^{u_i} - 1)` is as exact. Rows are worked on in blocks, and nothing of the
logits' size is kept for the backward pass but the logits themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradsurgery.losses._log_odds import IGNORED, check_integers, checked

_BLOCKS = {"cpu": 2**18, "other": 2**24}
"""Logits worked on at once, of which there are up to seven float32 temporaries: 1 MiB each fits a CPU's cache; elsewhere a block must
outlast the launch of its kernels."""


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

    Gradient row: p - q. Cost: temporaries of a block of rows, nothing kept but the inputs; the backward pass computes the row anew.

    Source: the "KL" retain loss of TOFU (2401.06121) and open-unlearning. Difference from the authors' code: it takes the mean over all
    B T positions, prompt and padding included; here the caller chooses the rows (``answer_tokens``, or the attention mask) and the mean.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, -torch.inf], [1.0, 2.0]]))
        tensor([0.6931, 0.0000])
    """
    _check(logits, reference_logits)
    return _Divergence.apply(logits, reference_logits.detach(), None, 0.0)


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
    return _Divergence.apply(logits, None, None, 0.0)


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
    if not beta >= 0:
        raise ValueError(f"beta: expected a number >= 0, found {beta}")
    return _Divergence.apply(logits, reference_logits.detach(), labels, float(beta))


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


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCKS.get(logits.device.type, _BLOCKS["other"]) // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


def _widened(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy to work in, with the largest logit at 0: a difference of logits is exact where a logsumexp of 1e4 has three decimals."""
    return logits.to(dtype, copy=True).sub_(logits.amax(1, keepdim=True))


class _Divergence(torch.autograd.Function):
    """KL(q||p), or the cross-entropy where there are labels to lower in q, ``[N]``; gradient p - q. Without a reference q is uniform."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor | None, labels: Tensor | None, beta: float) -> Tensor:
        ctx.save_for_backward(logits, reference, labels)
        ctx.beta = beta
        values = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows in _blocks(logits):
            pair = _Pair(rows, logits, reference, labels, beta)
            values[rows] = pair.divergence() if labels is None else pair.cross_entropy()
        return values if labels is None else values.masked_fill_(labels == IGNORED, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, reference, labels = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _blocks(logits):
            row = _Pair(rows, logits, reference, labels, ctx.beta).difference().mul_(gradients[0][rows, None])
            result[rows] = row if labels is None else row.masked_fill_((labels[rows] == IGNORED)[:, None], 0.0)
        return result, None, None, None


class _Pair:
    """A block of rows of p and q ``[n, V]``, with their logits less the largest, and those logits' logsumexps ``[n, 1]``.

    It answers one question: the answers consume what they need no more.
    """

    def __init__(
        self, rows: slice, logits: Tensor, reference: Tensor | None, labels: Tensor | None, beta: float
    ) -> None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        self.model = _widened(logits[rows], dtype)
        self.p, self.model_total = _softmax(self.model)
        if reference is None:
            size = logits.shape[1]
            self.reference = self.model.new_zeros(1, 1)
            self.q, self.reference_total = self.reference + 1.0 / size, self.reference + math.log(size)
            return
        self.reference = _widened(reference[rows], dtype)
        if labels is not None:
            index = torch.where(labels == IGNORED, 0, labels)[rows, None].long()
            self.reference.scatter_add_(1, index, self.reference.new_full((), -beta).expand_as(index))
            self.reference.sub_(self.reference.amax(1, keepdim=True))
        self.q, self.reference_total = _softmax(self.reference)

    def log_ratio(self) -> Tensor:
        # The logits' difference first: it is exact where they are close, which a difference of two log-probabilities is not.
        return self.model.sub_(self.reference).sub_(self.model_total - self.reference_total)

    def divergence(self) -> Tensor:
        """Sum of q (e^u - 1 - u), ``[n]``."""
        ratio = self.log_ratio()
        # What q excludes has no share even where u is infinite; a NaN in q does not equal 0, and stays.
        far = self.p.sub_(self.q).sub_((ratio * self.q).masked_fill_(self.q == 0.0, 0.0))
        near = _expm1_less(ratio).mul_(self.q)
        return torch.where(ratio.abs() < _NEAR, near, far).sum(1)

    def cross_entropy(self) -> Tensor:
        """Sum of q (-log p), ``[n]``."""
        surprise = self.model.sub_(self.model_total).neg_()
        return surprise.mul_(self.q).masked_fill_(self.q == 0.0, 0.0).sum(1)

    def difference(self) -> Tensor:
        """Row of the gradient, p - q, ``[n, V]``."""
        ratio = self.log_ratio()
        far = self.p.sub_(self.q)
        # Where p is the smaller or hardly larger one p - q cancels; e^u of a large u would overflow.
        row = torch.where(ratio < 1.0, ratio.expm1_().mul_(self.q), far)
        # An exact row sums to 0. What this one sums to is the rounding of the logsumexps, which would drown distributions 1e-4 apart.
        return row.addcmul_(self.q, row.sum(1, keepdim=True), value=-1.0)


def _softmax(shifted: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``[n, V]`` of logits whose largest is 0, and the logarithm of the sum of their exponentials, ``[n, 1]``.

    The largest is kept out of the sum, so that the logarithm does not round to 0 where one token is certain.
    """
    exponentials = shifted.exp()
    largest = shifted.max(1, keepdim=True).indices  # argmax takes three times as long on a CPU
    own = exponentials.gather(1, largest)
    rest = exponentials.scatter_(1, largest, 0.0).sum(1, keepdim=True)
    return exponentials.scatter_(1, largest, own).div_(own + rest), rest.log1p()


_NEAR = 0.25
"""Log ratios whose e^u - 1 - u comes from its series; for larger ones the difference loses at most three bits."""


def _expm1_less(ratio: Tensor) -> Tensor:
    """e^u - 1 - u for |u| < 1/4, as u^2/2 (1 + u/3 (1 + u/4 (...))) to the last digit of the type; nonsense elsewhere."""
    # The first term left out is 2 u^(n - 2) / n! of the sum: 1e-8 for n = 8, 8e-17 for n = 13.
    series = one = ratio.new_ones(())
    for n in range(12 if ratio.dtype == torch.float64 else 7, 2, -1):
        series = torch.addcmul(one, series, ratio, value=1.0 / n)
    return series * ratio.square().mul_(0.5)


class _Margin(torch.autograd.Function):
    """max z - mean z, ``[N]``; gradient e_k - 1/V with k the first of the largest, 0 in rows that do not count."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, valid: Tensor | None) -> Tensor:
        margins = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows in _blocks(logits):
            # The mean of differences, none of them positive: that of logits of 1e4 has three decimals.
            margins[rows] = _widened(logits[rows], margins.dtype).mean(1).neg_()
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
