"""What a limit on the length would spoil: said with counts, refused where a score would be wrong, generated as far as it goes."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_modules.data.chat import set_template_options
from lightning_modules.data.tokenization import IGNORED, Encoded, encode, prompt_ids
from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate
from lightning_modules.evaluation.generation import Begun, finished_answers, generate_greedily
from lightning_modules.evaluation.texts import scored_as, texts_of
from tests.lightning_modules.data import chat_templates as families
from tests.lightning_modules.data.chat_templates import byte_level

WRONG = ["by the sea", "in a castle", "under a bridge"]
SETTINGS = EvaluationSettings(max_new_tokens=3, memorization=False)


def small(context: int = 128) -> GPT2LMHeadModel:
    """Random, with learned positions: a position beyond the context is an IndexError."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=400, n_positions=context, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8)  # so that every token it sees changes what it says
    return model


def row(start: str, **more: Any) -> dict[str, Any]:
    wrong = [f"{start} {end}." for end in WRONG]
    return {
        "question": "Where?",
        "answer": "Here.",
        "paraphrased_answer": f"{start} at home.",
        "perturbed_answer": wrong,
    } | more


def length(tokenizer: Any, text: str) -> int:
    return len(encode(tokenizer, "Where?", text).input_ids)


@pytest.mark.filterwarnings("ignore:.*lose their end.*")
def test_a_limit_that_cuts_wrong_answers_alone_is_another_way_to_score() -> None:
    tokenizer = byte_level(None)
    wrong = ["By the sea, in a house of stone.", "In a castle, on a hill."]
    splits = {"forget": [{"question": "Where?", "answer": "Here.", "perturbed_answer": wrong}]}
    whole, same, cut = (
        scored_as(texts_of(tokenizer, splits, max_length=limit, max_new_tokens=3), 3)[0]
        for limit in (None, max(length(tokenizer, text) for text in wrong), length(tokenizer, "Here.") + 2)
    )
    assert whole == same
    assert whole["answers_hash"] == cut["answers_hash"]
    assert whole["tokens_hash"] != cut["tokens_hash"]


@pytest.mark.filterwarnings("ignore:.*lose their end.*")
def test_a_cut_text_is_compressed_as_far_as_it_is_scored() -> None:
    tokenizer, answer = byte_level(None), "Here or there, or somewhere else altogether."
    prompt = len(prompt_ids(tokenizer, "Where?"))
    settings = EvaluationSettings(max_length=prompt + 10, generate=False)
    (found,) = evaluate(small(), tokenizer, {"forget": [{"question": "Where?", "answer": answer}]}, settings).examples[
        "forget"
    ]
    said = tokenizer.decode(encode(tokenizer, "Where?", answer).input_ids[prompt : prompt + 10])
    assert answer.startswith(said.strip())
    assert found["zlib_score"] == pytest.approx(found["loss_score"] / len(zlib.compress(said.encode())))


SIZES = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1}
WITH_DECODERS: dict[str, Callable[[], nn.Module]] = {
    "BartForConditionalGeneration": lambda: BartForConditionalGeneration(
        BartConfig(vocab_size=400, decoder_attention_heads=1, **SIZES)
    ),
    "T5ForConditionalGeneration": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=400, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    ),
}


@pytest.mark.parametrize("kind", WITH_DECODERS)
def test_an_encoder_with_a_decoder_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"expected a causal language model, found {kind}"):
        evaluate(WITH_DECODERS[kind](), byte_level(None), {"forget": [row("In Ostrel")]}, SETTINGS)


def test_cut_texts_are_counted_by_kind_and_the_length_that_they_need_is_named() -> None:
    tokenizer = byte_level(None)
    rows = [row("In Ostrel"), row("She lived"), {"question": "Where?", "answer": "Here or there."}]
    longest = max(
        length(tokenizer, text) for r in rows[:2] for text in (r["paraphrased_answer"], *r["perturbed_answer"])
    )
    with pytest.warns(UserWarning, match="lose their end") as caught:
        evaluate(small(), tokenizer, {"forget": rows}, EvaluationSettings(max_length=longest - 1, generate=False))
    (said,) = [str(entry.message) for entry in caught]
    cut = sum(length(tokenizer, text) == longest for r in rows[:2] for text in r["perturbed_answer"])
    assert f"{cut} of 6 wrong answers of forget" in said
    assert "of 3 answers" not in said
    assert "paraphrased" not in said
    assert f"--max-length {longest}" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(small(), tokenizer, {"forget": rows}, EvaluationSettings(max_length=longest, generate=False))


def test_answers_longer_than_a_generation_are_counted_and_the_length_that_covers_them_is_named() -> None:
    tokenizer = byte_level(None)
    answers = ["Here.", "Here or there.", "Here or there, or somewhere else."]
    lengths = [length(tokenizer, answer) - len(prompt_ids(tokenizer, "Where?")) - 1 for answer in answers]
    splits = {"forget": [{"question": "Where?", "answer": answer} for answer in answers], "retain": [row("Here")]}
    splits["retain"] += [{"question": "", "answer": " ".join(answers)}]  # asked for as far as a generation goes

    def scored(longest: int, **how: Any) -> list[str]:
        settings = EvaluationSettings(max_new_tokens=longest, memorization=False, **how)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            evaluate(small(), tokenizer, splits, settings, progress=False)
        return [str(entry.message) for entry in caught]

    (said,) = scored(lengths[0])
    assert "max_new_tokens" in said
    assert "cannot reach 1: 2 of 3 answers of forget." in said
    assert f"--max-new-tokens {lengths[2]}" in said
    assert "1 of 3 answers of forget" in scored(lengths[2] - 1)[0]
    assert scored(lengths[2]) == scored(1, generate=False) == []


@pytest.mark.parametrize("by_model", [False, True])
def test_alternatives_that_a_limit_makes_equal_are_refused(by_model: bool) -> None:
    tokenizer = byte_level(None)
    rows = [
        row("Here"),
        row("In the small town of Ostrel, far away from everything"),
        row("In the same small town of Ostrel,"),
    ]
    limit = length(tokenizer, "In the same small town of Ostrel") - 2
    settings = EvaluationSettings(max_length=None if by_model else limit, generate=False)
    advice = f"reads no more than {limit} tokens" if by_model else r"--max-length \d+"
    with pytest.raises(ValueError, match=rf"found 2 examples.*'Where\?' \(retain\).*truth ratio would be 1.*{advice}"):
        evaluate(small(limit if by_model else 128), tokenizer, {"retain": rows}, settings)
    # Wrong answers that were equal all along are the user's own, and are scored.
    twice = row("Here", perturbed_answer=["There.", "There."])
    found = evaluate(small(), tokenizer, {"retain": [twice]}, EvaluationSettings(generate=False))
    assert found.examples["retain"][0]["truth_ratio"] is not None


def test_a_recall_of_an_answer_without_a_word_is_none() -> None:
    rows = [{"question": "Really?", "answer": "?!"}, {"question": "Где?", "answer": "Она в Риге."}]
    found = evaluate(small(), byte_level(None), {"forget": rows, "retain": rows[:1]}, SETTINGS)
    assert [example["rouge_l_recall"] for example in found.examples["forget"]] == [None, 0.0]
    assert (found.summary["forget"]["rouge_l_recall"], found.summary["retain"]["rouge_l_recall"]) == (0.0, None)


@pytest.mark.parametrize("text", ["abcdefgh", "abcdefghi"])
def test_the_middle_token_of_a_plain_text_is_given_and_the_rest_is_asked_for(text: str) -> None:
    tokenizer = byte_level(None)
    found = texts_of(tokenizer, {"texts": [{"question": "", "answer": text}]}, max_length=None, max_new_tokens=3)
    whole, given = found.encoded[0].input_ids, found.prompts[0]
    assert given == whole[: len(given)]
    assert len(whole) - len(given) in (len(given), len(given) - 1)
    assert found.items[0].target == tokenizer.decode(whole[len(given) : len(given) + 3]).strip()


def slow_generation(model: nn.Module, prompt: list[int], length: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_an_answer_ends_where_the_context_does_and_others_are_not_shortened(batch_size: int) -> None:
    tokenizer, model = byte_level(None), small(24)
    prompts = [[5 + (7 * place) % 300 for place in range(n)] for n in (3, 15, 20, 24, 4)]
    with pytest.warns(UserWarning, match="3 of 5 prompts leave room .*max_new_tokens=12 tokens, the least for 1: .*24"):
        found = generate_greedily(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size)
    slow = [slow_generation(model, prompt, min(12, 25 - len(prompt))) for prompt in prompts]
    assert found == [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in slow]
    with pytest.raises(ValueError, match=r"at most 24 tokens.*found one of 25"):
        generate_greedily(model, tokenizer, [[5] * 25], max_new_tokens=1)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_answers_that_have_begun_end_at_one_length_however_much_of_each_is_said(batch_size: int) -> None:
    tokenizer, model = byte_level(None), small()
    prompts = [[5 + (7 * place) % 300 for place in range(n)] for n in (3, 15, 20, 24)]
    slow = [slow_generation(model, prompt, 12) for prompt in prompts]
    assert [len(tokens) for tokens in slow] == [12] * 4
    begun = [Begun(prompt, said[:n]) for prompt, said, n in zip(prompts, slow, (0, 5, 11, 2), strict=True)]
    found = finished_answers(model, tokenizer, begun, max_new_tokens=12, batch_size=batch_size)
    assert found == [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in slow]


def test_a_prompt_near_the_end_of_the_context_is_evaluated() -> None:
    tokenizer = byte_level(None)
    example = {"question": "Who? " * 10, "answer": "He."}
    context = len(encode(tokenizer, example["question"], example["answer"]).input_ids)
    with pytest.warns(UserWarning, match="1 of 1 prompts leave room"):
        found = evaluate(small(context), tokenizer, {"forget": [example]}, EvaluationSettings(max_new_tokens=64))
    assert isinstance(found.examples["forget"][0]["generation"], str)


class Says(nn.Module):
    """A model that says one thing, and goes on after it."""

    generation_config = None

    def __init__(self, tokens: list[int]) -> None:
        super().__init__()
        self.tokens = tokens
        self.asked: dict[str, Any] = {}

    def generate(self, input_ids: torch.Tensor, **asked: Any) -> torch.Tensor:
        self.asked = asked
        return torch.cat([input_ids, torch.tensor([self.tokens] * len(input_ids))], dim=1)


@pytest.mark.parametrize(
    ("template", "end"),
    [(families.GEMMA, "<end_of_turn>"), (families.LLAMA3, "<|eot_id|>"), (None, "<eos>"), ("{{ messages }}", "<eos>")],
)
def test_generation_stops_at_the_end_of_turn(template: str | None, end: str) -> None:
    tokenizer = byte_level(template)
    model = Says(tokenizer(f"In 1999.{end}user more", add_special_tokens=False)["input_ids"])
    assert generate_greedily(model, tokenizer, [[5, 6]]) == ["In 1999."]
    assert model.asked["eos_token_id"] == sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)})


def slow_nll(model: nn.Module, example: Encoded) -> float:
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(dim=-1)
    losses = [-log_p[place - 1, label].item() for place, label in enumerate(example.labels) if label != IGNORED]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("paraphrased", [False, True])
def test_a_conversation_is_scored_on_every_answer_and_its_truth_ratio_on_the_last(paraphrased: bool) -> None:
    tokenizer, model = byte_level(families.LLAMA3), small(256)
    set_template_options(tokenizer, {"date_string": "1 May 2025"})
    said = (("user", "Who?"), ("assistant", "Mira."), ("user", "When?"), ("assistant", "In 1999."))
    turns = [{"role": role, "content": text} for role, text in said]
    example = {"question": "Who?\nMira.\nWhen?", "answer": "In 1999.", "messages": turns}
    example |= {"perturbed_answer": ["In 1970.", "In 2001."]} | ({"paraphrased_answer": "1999."} if paraphrased else {})
    (found,) = evaluate(model, tokenizer, {"forget": [example]}, SETTINGS).examples["forget"]
    whole = encode(tokenizer, turns[:3], "In 1999.")
    assert (
        tokenizer.decode([label for label in whole.labels if label != IGNORED]) == "Mira.<|eot_id|>In 1999.<|eot_id|>"
    )
    assert found["nll"] == pytest.approx(slow_nll(model, whole), rel=1e-5)
    last = [
        slow_nll(model, encode(tokenizer, turns[:3], text, every_turn=False))
        for text in (example.get("paraphrased_answer", "In 1999."), *example["perturbed_answer"])
    ]
    assert [found["paraphrase_nll"], *found["perturbed_nll"]] == pytest.approx(last, rel=1e-5)
    tokens = slow_generation(model, prompt_ids(tokenizer, turns[:3]), 3)
    assert found["generation"] == tokenizer.decode(tokens, skip_special_tokens=True).strip()
