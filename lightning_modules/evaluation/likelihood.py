r"""The mean negative log-likelihood per answer token: the number that probability and truth ratio are made of."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_modules.data.tokenization import IGNORED, Encoded, collate
from lightning_modules.evaluation.heads import backbone_and_head, gives_logits

# Rows of logits held at once, in float32: 0.5 GB with a vocabulary of 128,000.
_HEAD_ROWS = 1024

# Logits `[rows, vocabulary]` in float32, labels `[rows]`, and for each row the place of its example in the list, int64
# `[rows]` on the CPU -> tensors `[rows]`, one number per token each.
Summary = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
# A batch -> the logits that predict its labelled tokens, with those labels, some rows at a time.
_LabelledLogits = Callable[[dict[str, Tensor]], Iterator[tuple[Tensor, Tensor]]]


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
        lambda logits, labels, _: (_loss(logits, labels),),
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
        summarize: from logits `[rows, vocabulary]` in float32, labels `[rows]` and the rows' examples, `[rows]` places
            in `encoded` on the CPU, to tensors `[rows]`. It is called with at most 1024 rows, of one batch.
        pad_token_id: fills up shorter rows; it is masked.
        batch_size: examples a forward pass. They are sorted by length, so that little is spent on padding.
        advance: called with the number of examples done, after every batch.

    Returns:
        For every example, in the order given, what `summarize` made of its T answer tokens: tensors `[T]` on the CPU.
    """
    result: list[tuple[Tensor, ...]] = [()] * len(encoded)
    longest_first = sorted(range(len(encoded)), key=lambda index: len(encoded[index].input_ids), reverse=True)
    with evaluation_mode(model):
        rows_of = _answer_rows(model, encoded, pad_token_id)
        for start in range(0, len(encoded), batch_size):
            indices = longest_first[start : start + batch_size]
            batch = _on_device(model, [encoded[index] for index in indices], pad_token_id)
            counts = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).cpu()
            places = torch.tensor(indices).repeat_interleave(counts).split(_HEAD_ROWS)
            found = (
                summarize(logits.float(), labels, place)
                for (logits, labels), place in zip(rows_of(batch), places, strict=True)
            )
            columns = (torch.cat(column).cpu() for column in zip(*found, strict=True))
            examples = zip(*(column.split(counts.tolist()) for column in columns), strict=True)
            for index, tokens in zip(indices, examples, strict=True):
                result[index] = tokens
            advance(len(indices))
    return result


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


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


def _on_device(model: nn.Module, encoded: list[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    return {name: tensor.to(device_of(model)) for name, tensor in collate(encoded, pad_token_id).items()}


def _answer_rows(model: nn.Module, encoded: Sequence[Encoded], pad_token_id: int) -> _LabelledLogits:
    """Returns a function from a batch to the logits at its answer positions.

    If backbone and head alone are the model, only the answer positions go through the head.
    """

    def plain(batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        labels = batch["labels"][:, 1:]
        keep = labels != IGNORED
        logits = model(**_inputs(batch)).logits[:, :-1][keep]
        yield from zip(logits.split(_HEAD_ROWS), labels[keep].split(_HEAD_ROWS), strict=True)

    parts = backbone_and_head(model)
    if parts is None or not encoded:
        return plain
    backbone, head = parts

    def gathered(batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        labels = batch["labels"][:, 1:]
        keep = labels != IGNORED
        hidden = backbone(**_inputs(batch)).last_hidden_state[:, :-1][keep]
        for rows, targets in zip(hidden.split(_HEAD_ROWS), labels[keep].split(_HEAD_ROWS), strict=True):
            yield head(rows), targets

    shortest = min(encoded, key=lambda example: len(example.input_ids))
    inputs = _on_device(model, [shortest], pad_token_id)
    del inputs["labels"]
    return gathered if gives_logits(model, backbone, head, inputs) else plain


def _inputs(batch: dict[str, Tensor]) -> dict[str, object]:
    inputs: dict[str, object] = {"input_ids": batch["input_ids"], "use_cache": False}
    if not batch["attention_mask"].all():  # without padding, attention takes its faster path
        inputs["attention_mask"] = batch["attention_mask"]
    return inputs
