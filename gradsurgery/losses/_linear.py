"""A language-model head and a loss in one: chunk by chunk, so that ``[tokens, vocabulary]`` is never held."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsurgery.gram import dtensor_type
from gradsurgery.losses._log_odds import check_integers
from gradsurgery.losses._sweep import Head, Linear, Reference
from gradsurgery.losses._table import RowLoss, as_row_loss, row_loss_by_name, takes_reference


def linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: str | RowLoss = "cross_entropy",
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    r"""A loss of the logits ``hidden @ weight.T + bias`` that never holds them all: the value and gradients of the plain loss.

    .. math:: \ell_n = L(c \tanh(s (W h_n + b)/c), y_n)

    Tokens whose label is -100 are left out before the head; the others go through it chunk by chunk. The gradients with respect to
    hidden states, weight and bias are made in the same pass (three matrix products; two with a frozen head), as if the values' mean were
    to be taken. A backward pass that brings the same number for every token, as a mean or a sum does, at most scales them. One with a
    weight per token is as right: hidden states' gradients are scaled row by row, and a trainable weight's is computed again (two products
    more). ``recompute=True``, for losses that are made of the values afterwards (`npo`, `simnpo`, `dpo`), leaves all of it to the
    backward pass: four products, and nothing held meanwhile but the inputs.

    Args:
        hidden: ``[N, H]``, the states that predict the labels (`answer_tokens` shifts and gathers hidden states as it does logits).
        weight: ``[V, H]``. Its gradient is computed only if it requires one.
        labels: ``[N]`` integers, -100 where a token does not count.
        loss: The name of a token loss in `LOSSES` or of a row loss in `ROW_LOSSES`, one of these functions, a ``functools.partial`` of one,
            or any function of logits ``[n, V]`` and labels ``[n]`` (and reference logits, if there are any) whose value i depends on row i
            only.
        bias: ``[V]`` or None.
        chunk_size: Tokens whose logits are held at once; None chooses: on a CPU 64 to 128 with a frozen head, else 64 MiB of logits
            (512 MiB for a trainable half-precision head, whose gradient would lose digits and time with every chunk added to it); on a GPU
            256 MiB, or 1 GiB.
        scale: s, by which a model family multiplies its logits (Cohere; 1/s in Granite).
        softcap: c, at which it caps them (Gemma 2); None for no cap.
        reference_hidden: ``[N, H']``, hidden states of the reference model, constants, for losses that need its logits (`undial`,
            `kl_divergence`).
        reference_weight: Its head ``[V, H']``; None: ``weight`` and ``bias``.
        reference_bias: That head's bias ``[V]``, or None.
        recompute: Make the gradients in the backward pass. Always so for float16, whose gradients must be scaled before they are rounded.

    Returns:
        ``[N]`` float32 (float64 for float64), 0 where the label is -100.

    Raises:
        ValueError: If the loss is unknown, a shape does not fit, a label is no token, or a loss of ours needs a reference and there is none
            (or the other way round).
        RuntimeError: If a second derivative is asked for.
        TypeError: If the types do not fit, or a tensor is sharded (a DTensor): call this where FSDP has gathered the head, or let the model
            compute its logits.

    Memory: ``chunk_size x V`` logits, a block of them in float32, and the gradients; nothing of size ``[N, V]``. Under autocast
    the products are in its type; under ``torch.compile`` it is a break in the graph.

    Difference from ``torch.nn.functional.linear_cross_entropy``: that one is cross-entropy alone, needs four products for a value per
    token, and sends the prompt through the head too. Liger and Cut Cross-Entropy need a GPU.

    Example:
        >>> hidden, weight = torch.eye(2).requires_grad_(), torch.zeros(5, 2, requires_grad=True)
        >>> linear(hidden, weight, torch.tensor([3, -100]), "ceu").sum().backward()
        >>> weight.grad[3]
        tensor([0.2000, 0.0000])
    """
    loss = row_loss_by_name(loss) if isinstance(loss, str) else as_row_loss(loss)
    _check(hidden, weight, labels, bias, chunk_size, softcap)
    reference = _reference(loss, hidden, weight, bias, reference_hidden, reference_weight, reference_bias)
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"expected hidden and weight of one type, found {hidden.dtype} and {weight.dtype}; convert one, or use autocast"
        )
    head = Head(loss, scale, softcap, chunk_size, reference)
    # What is differentiated in the forward pass is not yet multiplied by a GradScaler's scale: too small for float16.
    recompute = recompute or hidden.dtype == torch.float16
    with torch.autocast(hidden.device.type, enabled=False):
        return Linear.apply(hidden, weight, bias, labels, head, recompute)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk_size: int | None,
    softcap: float | None,
) -> None:
    _check_whole(hidden=hidden, weight=weight, bias=bias)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] < 2:
        raise ValueError(
            f"expected hidden [N, H] and weight [V, H] with V >= 2, found {list(hidden.shape)} and {list(weight.shape)}; "
            "answer_tokens makes [N, H] of a backbone's [B, T, H]"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels: expected one per hidden state, [{len(hidden)}], found {list(labels.shape)}")
    check_integers(labels)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [{len(weight)}], found {list(bias.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected a number of tokens >= 1, found {chunk_size}")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap: expected a positive number or None, found {softcap}")


def _reference(
    loss: RowLoss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other_hidden: Tensor | None,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
) -> Reference | None:
    wanted = takes_reference(loss)
    if other_hidden is None:
        if other_weight is not None or other_bias is not None:
            raise ValueError("reference_weight: expected reference_hidden with it, found none")
        if wanted:
            raise ValueError(
                "reference_hidden: expected the reference's hidden states, which this loss compares with, found none"
            )
        return None
    if wanted is False:
        raise ValueError("reference_hidden: expected None, for this loss has no reference, found a tensor")
    _check_whole(reference_hidden=other_hidden, reference_weight=other_weight, reference_bias=other_bias)
    if other_weight is None:
        other_weight, other_bias = weight, bias
    if other_hidden.shape != (len(hidden), other_weight.shape[1]) or len(other_weight) != len(weight):
        raise ValueError(
            f"reference: expected hidden states [{len(hidden)}, H'] and a weight [{len(weight)}, H'], found {list(other_hidden.shape)} and "
            f"{list(other_weight.shape)}"
        )
    if other_bias is not None:
        other_bias = other_bias.detach().to(other_weight.dtype)
    return Reference(other_hidden.detach().to(other_weight.dtype), other_weight.detach(), other_bias)


def _check_whole(**tensors: Tensor | None) -> None:
    sharded = dtensor_type()
    for name, tensor in tensors.items():
        if sharded is not None and isinstance(tensor, sharded):
            raise TypeError(
                f"{name}: expected a whole tensor, found a sharded one (DTensor); call linear where the head is gathered, or let the model "
                "compute its logits and apply the plain loss"
            )
