"""How probable answers are to a model while it trains: one way of scoring for validation, the curve and the probes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.data.tokenization import Encoded
from lightning_modules.evaluation.likelihood import answer_nll
from lightning_modules.metrics import AnswerProbability
from lightning_modules.progress import Stage


def add_answers(
    metric: AnswerProbability,
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Score answers, and add them to the metric.

    Args:
        metric: Its state is on any device.
        model: Maps `input_ids` and `attention_mask` to an output with `logits [B, T, V]`. Its mode is left as it was.
        encoded: At least one example.
        pad_token_id: Of the tokenizer; it is masked.
        batch_size: Examples a forward pass.
        advance: Called with the number of examples done, after every batch.
    """
    nll = answer_nll(
        _as_hugging_face(model), encoded, pad_token_id=pad_token_id, batch_size=batch_size, advance=advance
    )
    metric.update(nll)


def mean_probabilities(
    model: nn.Module, splits: Mapping[str, Sequence[Encoded]], *, pad_token_id: int, batch_size: int = 32
) -> dict[str, float]:
    r"""The mean over each split's answers of $\exp(-\mathrm{nll})$, with nll the mean over an answer's tokens.

    It is the mean over the examples given to this process, whatever other processes score. It is NaN where the model
    gives NaN for any answer, and for a split without examples.
    """
    means: dict[str, float] = {}
    stage = Stage("Scoring answers", sum(map(len, splits.values())))
    for split, encoded in splits.items():
        metric = AnswerProbability(sync_on_compute=False)
        if encoded:
            add_answers(metric, model, encoded, pad_token_id=pad_token_id, batch_size=batch_size, advance=stage.advance)
        means[split] = float(metric.compute()) if encoded else float("nan")
    return means


def answer_probabilities(
    model: nn.Module, encoded: Sequence[Encoded], *, pad_token_id: int, batch_size: int = 32
) -> list[float]:
    r"""$\exp(-\mathrm{nll})$ of every answer, of which `mean_probabilities` gives the mean."""
    return mean_and_each(model, encoded, pad_token_id=pad_token_id, batch_size=batch_size)[1]


def mean_and_each(
    model: nn.Module, encoded: Sequence[Encoded], *, pad_token_id: int, batch_size: int = 32
) -> tuple[float, list[float]]:
    """What `mean_probabilities` gives for a split with examples, and what `answer_probabilities` gives, of one pass."""
    nll = answer_nll(_as_hugging_face(model), encoded, pad_token_id=pad_token_id, batch_size=batch_size)
    metric = AnswerProbability(sync_on_compute=False)
    metric.update(nll)
    return float(metric.compute()), nll.neg().exp().tolist()


def uncollated(batch: Mapping[str, Tensor]) -> list[Encoded]:
    """The examples of a batch without their padding: undoes `lightning_modules.data.tokenization.collate`.

    Example:
        >>> from lightning_modules.data.tokenization import collate
        >>> examples = [Encoded([1, 5, 2], [-100, 5, 2]), Encoded([1, 2], [-100, 2])]
        >>> uncollated(collate(examples, pad_token_id=0)) == examples
        True
    """
    rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True)
    return [Encoded(tokens[kept].tolist(), labels[kept].tolist()) for tokens, labels, kept in rows]


class _TwoInputs(nn.Module):
    """A model that takes `input_ids` and `attention_mask` only, called as Hugging Face's models are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.model(input_ids=input_ids, attention_mask=mask)


def _as_hugging_face(model: nn.Module) -> nn.Module:
    parameters = inspect.signature(model.forward).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return model if takes_more or "use_cache" in parameters else _TwoInputs(model)
