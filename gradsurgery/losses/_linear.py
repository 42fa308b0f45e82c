"""A language-model head and a loss in one: chunk by chunk, so that ``[tokens, vocabulary]`` is never held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from gradsurgery.gram import dtensor_type
from gradsurgery.losses._checks import check_integers
from gradsurgery.losses._chunk import Task
from gradsurgery.losses._head import Head, Reference
from gradsurgery.losses._loss import Loss
from gradsurgery.losses._sweep import Linear
from gradsurgery.losses._table import as_row_loss


def linear(
    hidden: Tensor,
    weight: Tensor | Head,
    labels: Tensor,
    loss: str | Callable[..., Tensor] | Loss = "cross_entropy",
    bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""A loss of hidden states and a head: value and gradients of the plain loss, without ever holding all logits.

    $$\ell_n = L(W h_n + b,\, y_n)$$

    Tokens whose label is -100 are left out before the head; the others go through it chunk by chunk. The gradients with
    respect to hidden states, weight and bias are computed in the same pass: three matrix products, or two with a frozen
    head. They are computed for the mean of the values. A backward pass that weighs every token alike, as a mean or a
    sum does, at most scales them. With a weight per token the result is as right, but costs more: the gradients of the
    hidden states are scaled row by row, and the gradient of a trainable weight is computed again (two more products).
    ``Loss.of(loss, recompute=True)`` leaves all gradients to the backward pass, which is cheaper for losses computed
    from the values afterwards (`npo`, `simnpo`, `dpo`): four products, and nothing but the inputs is held until then.

    Args:
        hidden: ``[N, H]``, the states that predict the labels (`answer_tokens` shifts and gathers hidden states as it
            does logits).
        weight: ``[V, H]``, the head's weight, or a `Head` (with its bias, scale and cap). Gradients are computed only
            for what requires them.
        labels: ``[N]`` integers, -100 where a token does not count.
        loss: The name of a loss per token in `LOSSES` or of a row loss in `ROW_LOSSES`, one of these functions, a
            ``functools.partial`` of one, or any function of logits ``[n, V]`` and labels ``[n]`` (and of reference
            logits, if there are any) whose value i depends on row i only. `Loss.of` binds the `Reference` that `undial`
            and `kl_divergence` need.
        bias: ``[V]`` or None; None if ``weight`` is a `Head`.
        chunk_size: Tokens whose logits are held at once. None chooses: on a CPU 64 to 256 with a frozen head, else as
            many as fill 128 MiB with logits (512 MiB for a trainable half-precision head, whose gradient would lose
            digits and time with every chunk added to it); on a GPU 256 MiB, or 1 GiB.

    Returns:
        ``[N]`` float32 (float64 for float64), 0 where the label is -100.

    Raises:
        ValueError: If the loss is unknown, a shape does not fit, a label is no token, or a loss of ours needs a
            reference and has none (or the other way round).
        RuntimeError: If a second derivative is asked for.
        TypeError: If the types do not fit, or a tensor is sharded (a DTensor): call this where FSDP has gathered the
            head, or let the model compute its logits.

    Memory: ``chunk_size x V`` logits, a block of them in float32, and the gradients; nothing of size ``[N, V]``. Under
    autocast the products are in its type; under ``torch.compile`` it breaks the graph. With float16 the gradients are
    always computed in the backward pass, because they must be multiplied by the loss scale before they are rounded.
    The host waits for the device twice in the forward pass, to choose the tokens that count and to check their labels.
    With a trained head the backward pass waits once more, unless the values' sum or mean is differentiated.

    Difference from ``torch.nn.functional.linear_cross_entropy``: that one is cross-entropy alone, needs four products
    for a value per token, and sends the prompt through the head too. Liger and Cut Cross-Entropy need a GPU.

    Example:
        >>> hidden, weight = torch.eye(2).requires_grad_(), torch.zeros(5, 2, requires_grad=True)
        >>> linear(hidden, weight, torch.tensor([3, -100]), "ceu").sum().backward()
        >>> weight.grad[3]
        tensor([0.2000, 0.0000])
    """
    bound = as_row_loss(loss)
    if isinstance(weight, Head) and bias is not None:
        raise ValueError("bias: expected None beside a Head, which holds its own, found a tensor")
    head = weight if isinstance(weight, Head) else Head(weight, bias)
    _check(hidden, head, labels, chunk_size)
    reference = _checked_reference(bound, hidden, head)
    weight, bias = head.weight, head.bias
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
    # In the forward pass a gradient is not yet multiplied by a GradScaler's scale, and may be too small for float16.
    recompute = bound.recompute or hidden.dtype == torch.float16
    bound = dataclasses.replace(bound, reference=reference, recompute=recompute)
    with torch.autocast(hidden.device.type, enabled=False):
        return Linear.apply(hidden, weight, bias, labels, Task(bound, head.scale, head.softcap, chunk_size))


def _check(hidden: Tensor, head: Head, labels: Tensor, chunk_size: int | None) -> None:
    weight, bias = head.weight, head.bias
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
    _check_softcap(head)


def _check_softcap(head: Head) -> None:
    if head.softcap is not None and head.softcap <= 0.0:
        raise ValueError(f"softcap: expected a positive number or None, found {head.softcap}")


def _checked_reference(loss: Loss, hidden: Tensor, head: Head) -> Reference | None:
    """The loss's reference without a graph, in its head's type, with the model's head if it has none of its own."""
    if loss.reference is None:
        if loss.takes_reference:
            raise ValueError(
                "reference: expected the reference's hidden states, which this loss compares with, found none; bind them by "
                "Loss.of(loss, reference=Reference(hidden, head))"
            )
        return None
    if loss.takes_reference is False:
        raise ValueError("reference: expected None, for this loss has no reference, found one")
    other, own = loss.reference.hidden, loss.reference.head or head
    _check_whole(reference_hidden=other, reference_weight=own.weight, reference_bias=own.bias)
    _check_softcap(own)
    if other.shape != (len(hidden), own.weight.shape[1]) or len(own.weight) != len(head.weight):
        raise ValueError(
            f"reference: expected hidden states [{len(hidden)}, H'] and a weight [{len(head.weight)}, H'], found {list(other.shape)} and "
            f"{list(own.weight.shape)}"
        )
    weight = own.weight.detach()
    bias = None if own.bias is None else own.bias.detach().to(weight.dtype)
    return Reference(other.detach().to(weight.dtype), dataclasses.replace(own, weight=weight, bias=bias))


def _check_whole(**tensors: Tensor | None) -> None:
    sharded = dtensor_type()
    for name, tensor in tensors.items():
        if sharded is not None and isinstance(tensor, sharded):
            raise TypeError(
                f"{name}: expected a whole tensor, found a sharded one (DTensor); call linear where the head is gathered, or let the model "
                "compute its logits and apply the plain loss"
            )
