"""Answers that go on from the cache that scoring left, and the beginning of all texts read once, against plain ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from lightning_modules.data.tokenization import IGNORED, Encoded
from lightning_modules.evaluation import shared as shared_texts
from lightning_modules.evaluation.continuing import continues
from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate
from lightning_modules.evaluation.generation import generate_greedily, generate_tokens
from lightning_modules.evaluation.memorization import answer_tokens, token_statistics
from lightning_modules.evaluation.shared import SharedTexts
from lightning_modules.evaluation.texts import texts_of
from tests.lightning_modules.data.chat_templates import byte_level
from tests.lightning_modules.evaluation.test_shared import (
    ALONE,
    ATTENTION,
    MAKERS,
    SIZES,
    SPLITS,
    encoded,
    model_of,
    slow_nll,
)

STEPS = 18


def said(model: nn.Module, **settings: int) -> list[str]:
    how = EvaluationSettings(max_new_tokens=STEPS, **settings)
    found = evaluate(model, byte_level(None), SPLITS, how, progress=False)
    return [row["generation"] for rows in found.examples.values() for row in rows]


def expected(model: nn.Module) -> list[str]:
    prompts = texts_of(byte_level(None), SPLITS, max_length=None, max_new_tokens=STEPS).prompts
    return [generate_greedily(model, byte_level(None), [prompt], max_new_tokens=STEPS)[0] for prompt in prompts]


def calls_of_generate(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    usual = type(model).generate
    monkeypatch.setattr(
        "transformers.GenerationMixin.generate", lambda *args, **named: calls.append(1) or usual(*args, **named)
    )
    return calls


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "bfloat16" not in kind])
def test_answers_are_those_of_one_prompt_at_a_time_with_or_without_a_cache(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_texts, "_PREFIX", 1)
    model = model_of(kind)
    wanted = expected(model)
    assert len(set(wanted)) > 1
    calls = calls_of_generate(model, monkeypatch)
    assert said(model, batch_size=3) == wanted
    assert (not calls) == (kind not in ALONE)


def test_answers_that_end_leave_the_others_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    prompts = texts_of(byte_level(None), SPLITS, max_length=None, max_new_tokens=STEPS).prompts
    third = [tokens[2] for tokens in generate_tokens(model, byte_level(None), prompts[:2], max_new_tokens=3)]
    model.generation_config.eos_token_id = [2, *third]  # two answers end at their third token, or before
    wanted = expected(model)
    assert len({len(text) for text in wanted}) > 1
    calls, read = calls_of_generate(model, monkeypatch), []
    model.lm_head.register_forward_hook(lambda *call: read.append(call[1][0].shape[0]))
    assert said(model) == wanted
    assert not calls
    assert read[-1] < len(wanted)  # the last step was of fewer answers


def test_a_window_that_the_answers_grow_out_of_hides_what_it_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = max(len(text.input_ids) for text in encoded()[0])
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, **ATTENTION, sliding_window=longest + 1)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)
    prompts = texts_of(byte_level(None), SPLITS, max_length=None, max_new_tokens=STEPS).prompts
    assert max(map(len, prompts)) + STEPS > longest + 1
    wanted = expected(model)
    calls = calls_of_generate(model, monkeypatch)
    assert said(model) == wanted
    assert not calls


def test_where_the_context_ends_before_an_answer_may_the_usual_generation_takes_over() -> None:
    model = model_of("llama")
    model.config.max_position_embeddings = 30
    assert continues(model, [[1] * (30 - STEPS)], STEPS)
    assert not continues(model, [[1] * (31 - STEPS), [1]], STEPS)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_common_beginning_is_read_once_and_every_nll_stays(kind: str) -> None:
    model = model_of(kind)
    texts, groups = encoded()
    head = [7, 300, 9, 11, 5, 301, 302, 13, 4, 6, 8]
    texts = [Encoded([*head, *text.input_ids], [*[IGNORED] * len(head), *text.labels]) for text in texts]
    shared = SharedTexts(model, texts, groups, pad_token_id=0)
    assert shared.prefix >= len(head)
    shared.over(shared.batches[:1], token_statistics(torch.ones(len(texts), dtype=torch.bool)), lambda _: None)
    read: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda *call: read.append(call[1][0]))
    rows = shared.over(shared.batches, token_statistics(torch.ones(len(texts), dtype=torch.bool)), lambda _: None)
    assert not any((tokens == 300).any() for tokens in read)  # read before, and kept
    found = {place: columns for row in rows for place, columns in row.items()}
    for place, text in enumerate(texts):
        assert answer_tokens(text, found[place], detailed=True).nll == pytest.approx(slow_nll(model, text), rel=1e-5)


def test_no_beginning_is_shared_that_predicts_a_label() -> None:
    head = list(range(20, 40))
    texts = [Encoded([*head, last], [*[IGNORED] * 12, *head[12:], last]) for last in (5, 6, 7)]
    shared = SharedTexts(model_of("llama"), texts, [range(3)], pad_token_id=0)
    assert shared.prefix == 11  # its next token, the twelfth, predicts the first label
    texts[1].labels[3] = texts[1].input_ids[3]
    assert SharedTexts(model_of("llama"), texts, [range(3)], pad_token_id=0).prefix == 0  # two are not worth a pass
