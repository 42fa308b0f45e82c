r"""The mean negative log-likelihood per answer token: the number that probability and truth ratio are made of."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_modules.data.tokenization import IGNORED, Encoded, collate
from lightning_modules.evaluation.heads import EXACT, backbone_and_head, gives_logits

# Rows of logits held at once, in float32: 0.5 GB with a vocabulary of 128,000.
_HEAD_ROWS = 1024
# On a CPU as many as a matrix product needs for its full speed. More of them leave the cache, and their memory is given
# back to the system and asked for anew each time: a log-softmax of 1024 rows at once takes three times as long.
_HEAD_ROWS_CPU = 128


class Predictions(NamedTuple):
    """Some logits, and the labelled tokens that they predict.

    Texts that begin alike share the places where they part, so that a row of logits may predict several tokens.

    Attributes:
        logits: `[rows, vocabulary]`.
        of: the row of logits of each token, `[tokens]`.
        labels: the tokens, `[tokens]`.
        owners: for each token the place of its example in the list, int64 `[tokens]` on the CPU.
    """

    logits: Tensor
    of: Tensor
    labels: Tensor
    owners: Tensor


# Predictions with logits in float32 -> tensors `[tokens]`, one number per token each.
Summary = Callable[[Predictions], tuple[Tensor, ...]]
# Hidden states and the places among them that are asked for, `[rows]` -> logits `[rows, vocabulary]`.
LogitsAt = Callable[[Tensor], Tensor]
# A batch -> its logits at any of its places.
LabelledLogits = Callable[["Batch"], LogitsAt]


class Batch(NamedTuple):
    """What the model is called with, and where in it the labelled tokens of some examples are predicted.

    Attributes:
        inputs: of the model, `[B, T]`.
        labels: the labelled tokens of all examples, one example after the other, `[rows]`.
        places: where each is predicted, in the batch read row by row, `[rows]`.
        counts: how many of them each example has.
        cache: of keys and values, that the tokens see and that takes up theirs; `None` for no cache.
    """

    inputs: Mapping[str, Any]
    labels: Tensor
    places: Tensor
    counts: list[int]
    cache: Any = None


def answer_nll(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda _: None,
) -> Tensor:
    r"""Returns the mean token negative log-likelihood of each answer given its question, eos counted, in nats.

    $$\mathrm{nll}_i = -\frac{1}{T_i} \sum_t \log p(\mathrm{token}_{it} \mid \mathrm{tokens\ before})$$

    There is no dropout, and the log-softmax is taken in float32 whatever the model's dtype. If the model splits into a
    backbone and a head, the head sees the answer positions only, at most 1024 rows at a time.

    Args:
        model: a causal language model, on any device and in any dtype.
        encoded: n examples; the labelled tokens are the answer.
        pad_token_id: fills up shorter rows; it is masked.
        batch_size: examples a forward pass. They are sorted by length, so that little is spent on padding.
        advance: called with the number of examples done, after every batch.

    Returns:
        float64, on the CPU, `[n]`, in the order given. A model that diverged gives NaN.
    """
    losses = over_answer_tokens(
        model,
        encoded,
        lambda found: (-found.logits.log_softmax(dim=-1)[found.of, found.labels],),
        pad_token_id=pad_token_id,
        batch_size=batch_size,
        advance=advance,
    )
    return torch.tensor([float(tokens.double().mean()) for (tokens,) in losses], dtype=torch.float64)


def over_answer_tokens(
    model: nn.Module,
    encoded: Sequence[Encoded],
    summarize: Summary,
    *,
    pad_token_id: int,
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda _: None,
) -> list[tuple[Tensor, ...]]:
    """Runs the model once over every example and summarizes the logits of its answer's tokens, without dropout.

    Args:
        model: a causal language model, on any device and in any dtype.
        encoded: n examples; the labelled tokens are the answer.
        summarize: from `Predictions` with logits in float32, whose owners are places in `encoded`, to tensors
            `[tokens]`. It is called with at most 1024 rows of logits, of one batch.
        pad_token_id: fills up shorter rows; it is masked.
        batch_size: examples a forward pass. They are sorted by length, so that little is spent on padding.
        advance: called with the number of examples done, after every batch.

    Returns:
        For every example, in the order given, what `summarize` made of its T answer tokens: tensors `[T]` on the CPU.
    """
    result: list[tuple[Tensor, ...]] = [()] * len(encoded)
    longest_first = sorted(range(len(encoded)), key=lambda index: len(encoded[index].input_ids), reverse=True)
    with evaluation_mode(model):
        rows_of = labelled_logits(model, encoded, pad_token_id)
        for start in range(0, len(encoded), batch_size):
            indices = longest_first[start : start + batch_size]
            batch = padded(model, [encoded[index] for index in indices], pad_token_id)
            for index, tokens in zip(indices, summarized(rows_of, batch, indices, summarize), strict=True):
                result[index] = tokens
            advance(len(indices))
    return result


def summarized(
    rows_of: LabelledLogits, batch: Batch, indices: Sequence[int], summarize: Summary
) -> list[tuple[Tensor, ...]]:
    """Runs one batch: for each of its examples, whose places are `indices`, what `summarize` made of its tokens."""
    owners = torch.tensor(indices).repeat_interleave(torch.tensor(batch.counts))
    logits_at = rows_of(batch)
    once, of = batch.places.unique(return_inverse=True)
    order = of.argsort(stable=True)
    rows = min(_HEAD_ROWS, _HEAD_ROWS_CPU) if once.device.type == "cpu" else _HEAD_ROWS
    ends = torch.searchsorted(
        of[order], torch.arange(rows, max(1, len(once)) + rows, rows, device=once.device)
    ).tolist()
    found: list[tuple[Tensor, ...]] = []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        first, tokens = number * rows, order[start:end]
        logits = logits_at(once[first : first + rows]).float()
        found.append(summarize(Predictions(logits, of[tokens] - first, batch.labels[tokens], owners[tokens.cpu()])))
    back = order.argsort().cpu()
    columns = (torch.cat(column).cpu()[back] for column in zip(*found, strict=True))
    return list(zip(*(column.split(batch.counts) for column in columns), strict=True))


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Turns dropout and gradients off, and restores the mode of every submodule afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_causal(model: nn.Module) -> None:
    """Refuse a model whose tokens are not predicted from those before them alone.

    Raises:
        ValueError: if its configuration is that of an encoder, or of an encoder and a decoder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config: Any = getattr(model, "config", None)
    masked = getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if getattr(config, "is_encoder_decoder", False) or (masked and getattr(config, "is_decoder", True) is False):
        raise ValueError(
            f"expected a causal language model, found {type(model).__name__}, an encoder or one with a decoder, whose tokens see those "
            "after them: give a model that continues a text"
        )


def device_of(model: nn.Module) -> torch.device:
    """Returns where a model expects its tokens."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def on_gpu(model: nn.Module) -> Generator[None]:
    """Moves a model that is on the CPU to the GPU, if there is one, and back afterwards to give the memory back."""
    home = device_of(model)
    if home.type == "cpu" and torch.cuda.is_available():
        model.to("cuda")
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def autocasting(model: nn.Module, *, enabled: bool = True) -> Generator[None]:
    """Computes a model's matrix products in bfloat16, as a training with precision bf16-mixed does, without gradients.

    The weights stay as they are, and with them what is summed up over layers; logits are bfloat16. Autocast makes
    copies of the weights and keeps them until it is left, which costs half of their float32 memory: so enter it once
    around all the work, in which nothing may change a weight, and after the model was moved to its device.

    Args:
        model: in any dtype; of bfloat16 weights it needs no copies.
        enabled: `False` leaves everything as it is, an autocast around it too.
    """
    if not enabled:
        yield
        return
    weights = list(model.parameters())
    # Shards are gathered for every pass: kept copies of what was gathered would be the whole model on every device.
    sharded = any(isinstance(weight, DTensor) for weight in weights)
    frozen = [weight for weight in weights if weight.dtype == torch.float32 and not (weight.requires_grad or sharded)]
    try:
        for weight in frozen:  # autocast keeps no copies of weights that want no gradient: every pass would make them
            weight.requires_grad_(True)
        with torch.no_grad(), torch.autocast(device_of(model).type, torch.bfloat16, cache_enabled=not sharded):
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def exactly(model: nn.Module) -> AbstractContextManager[Any]:
    """Leaves autocast for a trial of float32 weights: rounding to bfloat16 would hide a difference that matters."""
    floating = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
    if all(dtype in EXACT for dtype in floating):
        return torch.autocast(device_of(model).type, enabled=False)
    return nullcontext()


def padded(model: nn.Module, encoded: Sequence[Encoded], pad_token_id: int) -> Batch:
    """Examples as a batch on the model's device, one row each."""
    batch = {name: tensor.to(device_of(model)) for name, tensor in collate(encoded, pad_token_id).items()}
    labels = batch.pop("labels")[:, 1:]
    keep = labels != IGNORED
    places = torch.arange(batch["input_ids"].numel(), device=labels.device).view(batch["input_ids"].shape)[:, :-1]
    if batch["attention_mask"].all():  # without padding, attention takes its faster path
        del batch["attention_mask"]
    return Batch(batch, labels[keep], places[keep], keep.sum(dim=1).tolist())


def labelled_logits(model: nn.Module, encoded: Sequence[Encoded], pad_token_id: int) -> LabelledLogits:
    """Returns a function from a batch to its logits at given places, read row by row.

    If backbone and head alone are the model, only these places go through the head.
    """

    def plain(batch: Batch) -> LogitsAt:
        logits = model(**batch.inputs, **_cached(batch)).logits.flatten(0, 1)
        return lambda places: logits[places]

    parts = backbone_and_head(model)
    if parts is None or not encoded:
        return plain
    backbone, head = parts

    def gathered(batch: Batch) -> LogitsAt:
        hidden = backbone(**batch.inputs, **_cached(batch)).last_hidden_state.flatten(0, 1)
        return lambda places: head(hidden[places])

    shortest = min(encoded, key=lambda example: len(example.input_ids))
    with exactly(model):
        same = gives_logits(model, backbone, head, padded(model, [shortest], pad_token_id).inputs)
    return gathered if same else plain


def _cached(batch: Batch) -> dict[str, Any]:
    return {"use_cache": False} if batch.cache is None else {"use_cache": True, "past_key_values": batch.cache}
