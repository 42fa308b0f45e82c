"""Generates answers greedily, in batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_modules.data.chat import end_of_turn
from lightning_modules.data.tokenization import padding_id, special_id
from lightning_modules.evaluation.likelihood import device_of, evaluation_mode
from lightning_modules.evaluation.processes import several
from lightning_modules.evaluation.texts import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A checkpoint's generation_config.json may ask for sampling or a repetition penalty (Qwen's does), which would make
# the scores of different models incomparable.
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def generate_greedily(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """Continues each prompt with the most likely tokens, as text; see `generate_tokens`, which takes the same.

    Returns:
        The answers, in the order given, without special tokens and surrounding white space.

    Raises:
        ValueError: as `generate_tokens`.
    """
    answers = generate_tokens(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, advance=advance
    )
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in answers]


def generate_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda _: None,
) -> list[list[int]]:
    """Continues each prompt with the most likely token at every step, until eos or the chat template's end of turn.

    Prompts are padded on the left under an attention mask and share a key-value cache; padding changes no answer. An
    answer also ends where the model's context does; a warning says how many prompts leave less than `max_new_tokens`.

    Args:
        model: a causal language model with Hugging Face's `generate`.
        tokenizer: decodes the answers; its eos and the end of turn of its chat template end them.
        prompts: the tokens of each prompt, at least one.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts in a batch. They are sorted by length.
        advance: called with the number of prompts done, after every batch.

    Returns:
        The tokens after each prompt, in the order given, without the one that ends them.

    Raises:
        ValueError: if the model has no `generate`, or a prompt fills its context.
    """
    generate: Any = getattr(model, "generate", None)
    if generate is None:
        raise ValueError(
            f"expected a model with a generate() method, found {type(model).__name__}: give a Hugging Face "
            "causal language model, or evaluate with generate=False"
        )
    pad, device = padding_id(tokenizer), device_of(model)
    room = _room(model, prompts, max_new_tokens)
    # Processes with shards of one model run every step together, also where rounding ends an answer earlier in one.
    sharded = several() and any(isinstance(parameter, DTensor) for parameter in model.parameters())
    stops = _stop_tokens(model, tokenizer)
    answers: list[list[int]] = [[] for _ in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    with evaluation_mode(model):
        for start in range(0, len(prompts), batch_size):
            batch = longest_first[start : start + batch_size]
            for new_tokens in sorted({room[index] for index in batch}):
                # All of them together, unless some would run out of the model's context.
                indices = [index for index in batch if room[index] == new_tokens]
                width = len(prompts[indices[0]])
                input_ids = torch.full((len(indices), width), pad)
                attention_mask = torch.zeros_like(input_ids)
                for row, index in enumerate(indices):
                    first = width - len(prompts[index])
                    input_ids[row, first:] = torch.tensor(prompts[index])
                    attention_mask[row, first:] = 1
                output = generate(
                    input_ids=input_ids.to(device),
                    attention_mask=attention_mask.to(device),
                    max_new_tokens=new_tokens,
                    pad_token_id=pad,
                    eos_token_id=sorted(stops),
                    use_cache=True,
                    synced_gpus=sharded,
                    **_GREEDY,
                )
                for index, tokens in zip(indices, output[:, width:].tolist(), strict=True):
                    answers[index] = _until(tokens, stops)
            advance(len(batch))
    return answers


def _room(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """How many tokens can be generated after each prompt: fewer than asked for where the model's context ends."""
    context = context_length(model)
    if context is None:
        return [max_new_tokens] * len(prompts)
    # One more than there are places, because the last token is said and not read.
    room = [min(max_new_tokens, context - len(prompt) + 1) for prompt in prompts]
    if min(room, default=1) < 1:
        raise ValueError(
            f"expected prompts of at most {context} tokens, which is all that the model reads, found one of "
            f"{max(map(len, prompts))}: give a shorter one, so that there is room for an answer"
        )
    short = sum(count < max_new_tokens for count in room)
    if short:
        warnings.warn(
            f"{short} of {len(prompts)} prompts leave room for fewer than max_new_tokens={max_new_tokens} tokens, the least for "
            f"{min(room)}: the model reads no more than {context}, so these answers are generated that far",
            stacklevel=3,
        )
    return room


def _stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    # Some chat models (Llama 3, Gemma) end a turn with tokens that only their generation config names.
    configured: int | list[int] | None = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    turn = None
    with suppress(ValueError):  # a template that does not take a question and an answer has made none of the prompts
        turn = end_of_turn(tokenizer)
    known = {special_id(tokenizer, "eos"), turn, *([configured] if isinstance(configured, int) else configured or ())}
    return {token for token in known if token is not None}


def _until(tokens: Iterable[int], stops: set[int]) -> list[int]:
    kept: list[int] = []
    for token in tokens:
        if token in stops:
            break
        kept.append(token)
    return kept
