"""Answers do not depend on what shares a batch, nor samples on what a checkpoint wishes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lightning_modules.evaluation.generation import generate_samples, generate_tokens
from tests.lightning_modules.data.chat_templates import byte_level

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24], [30, 31, 32], [40, 41, 42, 43, 44]]
LONG = [*range(50, 90)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2}
HEADS: dict[str, Any] = SMALL | {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "rwkv": SMALL | {"attention_hidden_size": 32, "context_length": 64},
    "minimax": HEADS
    | {
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "block_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    vocabulary = len(byte_level(None))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=vocabulary, **KINDS[kind])).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3.0)  # so that a token depends on those before it
    return model


def greedy(model: nn.Module, prompt: list[int], steps: int) -> list[int]:
    """Plain forward passes over one text without padding."""
    said = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            said.append(int(model(input_ids=torch.tensor([said])).logits[0, -1].argmax()))
    return said[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_in_a_batch_are_those_of_each_prompt_alone(kind: str) -> None:
    model, tokenizer = model_of(kind), byte_level(None)
    model.generation_config.eos_token_id = None
    prompts = [*PROMPTS, LONG]
    expected = [greedy(model, prompt, 6) for prompt in prompts]
    stops = {tokenizer.eos_token_id}
    expected = [said[: next((at for at, token in enumerate(said) if token in stops), 6)] for said in expected]
    assert generate_tokens(model, tokenizer, prompts, max_new_tokens=6, batch_size=1) == expected
    for batch_size in (2, 6):
        assert generate_tokens(model, tokenizer, prompts, max_new_tokens=6, batch_size=batch_size) == expected


def widths(model: Any, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """The shapes of what is generated from, in order."""
    seen: list[tuple[int, ...]] = []
    generate = model.generate

    def watched(**given: Any) -> Any:
        seen.append(tuple(given["input_ids"].shape))
        return generate(**given)

    monkeypatch.setattr(model, "generate", watched)
    generate_tokens(model, byte_level(None), prompts, max_new_tokens=2, batch_size=2)
    return seen


def test_sharing_a_batch_is_tried_once_and_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # The trial takes the shortest prompt, alone and beside the longest.
    assert widths(model_of("llama"), monkeypatch, PROMPTS) == [(1, 3), (2, 8), (2, 8), (2, 5), (1, 3)]
    assert widths(model_of("llama"), monkeypatch, PROMPTS[:1]) == [(1, 3)]
    assert widths(model_of("minimax"), monkeypatch, [PROMPTS[0], LONG]) == [(1, 3), (2, 40), (1, 40), (1, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_one_length_are_answered_as_each_alone(kind: str) -> None:
    model, tokenizer = model_of(kind), byte_level(None)
    same = [prompt for prompt in PROMPTS if len(prompt) == 3]
    alone = generate_tokens(model, tokenizer, same, max_new_tokens=6, batch_size=1)
    assert generate_tokens(model, tokenizer, same, max_new_tokens=6, batch_size=2) == alone


@pytest.mark.parametrize(
    "wish",
    [
        {"min_p": 0.99},
        {"typical_p": 0.01},
        {"epsilon_cutoff": 0.5},
        {"eta_cutoff": 0.5},
        {"top_h": 0.01},
        {"top_k": 1},
        {"top_p": 0.01},
        {"sequence_bias": {(7,): 100.0}},
        {"suppress_tokens": list(range(3, 200))},
        {"min_new_tokens": 3},
        {"guidance_scale": 5.0},
        {"repetition_penalty": 2.0},
        {"return_dict_in_generate": True},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=lambda wish: next(iter(wish)),
)
def test_samples_are_drawn_from_the_whole_distribution_whatever_a_checkpoint_wishes(wish: dict[str, Any]) -> None:
    model, tokenizer = model_of("llama"), byte_level(None)
    how: dict[str, Any] = {"max_new_tokens": 4, "sampling": {"seed": 1}}
    model.generation_config = GenerationConfig()
    expected = generate_samples(model, tokenizer, PROMPTS, **how)
    assert len({*expected}) == len(PROMPTS)
    wishes = model.generation_config = GenerationConfig(**wish)
    assert generate_samples(model, tokenizer, PROMPTS, **how) == expected
    assert model.generation_config is wishes
