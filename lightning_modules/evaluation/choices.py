"""How likely a model thinks each of the given answers to a question."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_modules.data.tasks import prefix_ids
from lightning_modules.data.tokenization import IGNORED, Encoded, padding_id
from lightning_modules.evaluation.likelihood import Predictions, over_answer_tokens
from lightning_modules.evaluation.texts import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def option_log_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[str, Sequence[str]]],
    *,
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda _: None,
) -> list[list[float]]:
    r"""Returns $\log p(\mathrm{option} \mid \mathrm{prompt})$ of every option of every question, in nats.

    As lm-evaluation-harness computes it: prompt and option are tokenized in one piece, the prompt's tokens are those of
    the prompt alone, and the rest are the option's, whose log-probabilities are summed. What is longer than the model's
    context loses its beginning, with a warning.

    Cost: a forward pass a question where all its options are single tokens, as letters are; otherwise one an option.

    Args:
        model: a causal language model, on any device and in any dtype.
        tokenizer: the model's tokenizer.
        asked: prompt and options of n questions.
        batch_size: texts in a forward pass.
        advance: called with the number of texts done, after every batch.

    Returns:
        n lists, one number for each option; NaN where the model gives NaN.

    Raises:
        ValueError: if an option adds no token to its prompt.
    """
    texts: list[Encoded] = []
    wanted: list[list[int]] = []  # of each text the tokens whose log-probabilities at its only place are asked for
    places: list[list[tuple[int, int]]] = []  # of each question and option: the text, and which of its wanted tokens
    cut, context = 0, context_length(model)
    for prompt, options in asked:
        before, parts = _tokens(tokenizer, prompt, options)
        if all(len(part) == 1 for part in parts):
            rows = [(before, parts[0], [part[0] for part in parts])]
            places.append([(len(texts), number) for number in range(len(parts))])
        else:
            rows = [(before, part, []) for part in parts]
            places.append([(len(texts) + number, 0) for number in range(len(parts))])
        for ahead, part, tokens in rows:
            kept = ahead if context is None else ahead[max(0, len(ahead) + len(part) - context) :]
            cut += len(kept) < len(ahead)
            texts.append(Encoded([*kept, *part], [IGNORED] * len(kept) + part))
            wanted.append(tokens)
    if cut:
        warnings.warn(
            f"{cut} of {len(texts)} questions are longer than the {context} tokens that the model reads, and lose their beginning",
            stacklevel=3,
        )
    most = max(map(len, wanted), default=0)
    table = torch.tensor([[*tokens, *[0] * (most - len(tokens))] for tokens in wanted]).reshape(len(wanted), most)

    def summarize(predictions: Predictions) -> tuple[Tensor, ...]:
        log_p = predictions.logits.log_softmax(dim=-1)[predictions.of]
        own = log_p.gather(-1, predictions.labels.unsqueeze(-1)).squeeze(-1)
        chosen = log_p.gather(-1, table[predictions.owners].to(log_p.device)) if most else log_p[:, :0]
        return own, *chosen.unbind(-1)

    found = over_answer_tokens(
        model, texts, summarize, pad_token_id=padding_id(tokenizer), batch_size=batch_size, advance=advance
    )

    def number(text: int, column: int) -> float:
        own, *chosen = found[text]
        return float(chosen[column][0]) if wanted[text] else float(own.double().sum())

    return [[number(*place) for place in options] for options in places]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """The tokens of a prompt, and those that each option adds to it."""
    before = prefix_ids(tokenizer, prompt)
    parts: list[list[int]] = []
    for option in options:
        whole: list[Any] = prefix_ids(tokenizer, f"{prompt}{option}")
        if len(whole) <= len(before):
            raise ValueError(f"expected options that add tokens to their prompt, found {option!r}, which adds none")
        parts.append(whole[len(before) :])
    return before, parts
