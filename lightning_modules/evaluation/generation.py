"""Generates answers greedily, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_modules.data.tokenization import padding_id, special_id
from lightning_modules.evaluation.likelihood import device_of, evaluation_mode
from lightning_modules.evaluation.processes import several

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
    """Continues each prompt with the most likely token at every step, until eos.

    Prompts are padded on the left under an attention mask and share a key-value cache; padding changes no answer.

    Args:
        model: a causal language model with Hugging Face's `generate`.
        tokenizer: decodes the answers and has the eos.
        prompts: the tokens of each prompt, at least one.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts in a batch. They are sorted by length.
        advance: called with the number of prompts done, after every batch.

    Returns:
        The answers, in the order given, without special tokens and surrounding white space.

    Raises:
        ValueError: if the model has no `generate`.
    """
    generate: Any = getattr(model, "generate", None)
    if generate is None:
        raise ValueError(
            f"expected a model with a generate() method, found {type(model).__name__}: give a Hugging Face "
            "causal language model, or evaluate with generate=False"
        )
    pad, device = padding_id(tokenizer), device_of(model)
    # Processes with shards of one model run every step together, also where rounding ends an answer earlier in one.
    sharded = several() and any(isinstance(parameter, DTensor) for parameter in model.parameters())
    stops = _stop_tokens(model, tokenizer)
    answers = [""] * len(prompts)
    longest_first = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    with evaluation_mode(model):
        for start in range(0, len(prompts), batch_size):
            indices = longest_first[start : start + batch_size]
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
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=sorted(stops),
                use_cache=True,
                synced_gpus=sharded,
                **_GREEDY,
            )
            for index, tokens in zip(indices, output[:, width:].tolist(), strict=True):
                answers[index] = str(tokenizer.decode(_until(tokens, stops), skip_special_tokens=True)).strip()
            advance(len(indices))
    return answers


def _stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    # Some chat models (Llama 3, Gemma) end a turn with tokens that only their generation config names.
    configured: int | list[int] | None = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = {special_id(tokenizer, "eos"), *([configured] if isinstance(configured, int) else configured or ())}
    return {token for token in known if token is not None}


def _until(tokens: Iterable[int], stops: set[int]) -> list[int]:
    kept: list[int] = []
    for token in tokens:
        if token in stops:
            break
        kept.append(token)
    return kept
