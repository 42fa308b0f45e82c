"""Tokens and labels: one bos, one eos, an exact boundary between prompt and answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lightning_modules.data.tokenization import IGNORED, Encoded, collate, encode, padding_id, prompt_ids

TEXTS = ["Q: Who wrote The Iron Lantern?\nA: Mira Aldabeth wrote it.", "user: Who? assistant: Nobody, in 1999."] * 3
QUESTION, ANSWER = "Who wrote The Iron Lantern?", "Mira Aldabeth wrote it."
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_level(adds_bos: bool = False, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos:  # as Llama's tokenizers do
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def sentence_piece() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space in front of every text it is given, as Llama 2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<pad>", "<bos>", "<eos>"]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


ALL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def labelled(encoded: Encoded) -> list[int]:
    return [label for label in encoded.labels if label != IGNORED]


def test_the_plain_format_is_bos_prompt_answer_eos() -> None:
    tokenizer = byte_level(**ALL)
    encoded = encode(tokenizer, QUESTION, ANSWER)
    assert tokenizer.decode(encoded.input_ids) == f"<bos>Q: {QUESTION}\nA: {ANSWER}<eos>"
    assert tokenizer.decode(labelled(encoded)) == f" {ANSWER}<eos>"


@pytest.mark.parametrize("answer", [ANSWER, "1999", ":", "?!", "\u00e9t\u00e9", "  two spaces", "line\nbreak"])
@pytest.mark.parametrize("chat", [False, True])
def test_the_boundary_is_exact(answer: str, chat: bool) -> None:
    tokenizer = byte_level(**ALL, chat_template=CHAT_TEMPLATE if chat else None)
    encoded = encode(tokenizer, QUESTION, answer)
    prompt = prompt_ids(tokenizer, QUESTION)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels == [IGNORED] * len(prompt) + encoded.input_ids[len(prompt) :]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_one_bos_and_one_eos_whatever_the_tokenizer_adds(chat: bool, adds_bos: bool) -> None:
    tokenizer = byte_level(adds_bos, **ALL, chat_template=CHAT_TEMPLATE if chat else None)
    for answer in (ANSWER, ANSWER + "<eos>", ANSWER + "<eos><eos>"):
        encoded = encode(tokenizer, QUESTION, answer)
        assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
        assert encoded.input_ids[0] == tokenizer.bos_token_id
        assert labelled(encoded).count(tokenizer.eos_token_id) == 1
        assert encoded.input_ids[-1] == tokenizer.eos_token_id


def test_no_bos_where_the_tokenizer_has_none() -> None:
    tokenizer = byte_level(eos_token="<eos>")
    assert tokenizer.decode(encode(tokenizer, QUESTION, ANSWER).input_ids) == f"Q: {QUESTION}\nA: {ANSWER}<eos>"


def test_a_chat_template_makes_the_prompt() -> None:
    tokenizer = byte_level(**ALL, chat_template=CHAT_TEMPLATE)
    encoded = encode(tokenizer, QUESTION, ANSWER)
    assert tokenizer.decode(encoded.input_ids) == f"<bos>user: {QUESTION}<eos>assistant: {ANSWER}<eos>"
    assert tokenizer.decode(labelled(encoded)) == f"{ANSWER}<eos>"


def test_a_sentence_piece_tokenizer_gets_one_space_before_the_answer() -> None:
    tokenizer = sentence_piece()
    encoded = encode(tokenizer, QUESTION, ANSWER)
    assert tokenizer.decode(encoded.input_ids[1:-1]) == f"Q: {QUESTION}\nA: {ANSWER}"
    assert tokenizer.decode(labelled(encoded)) == f"{ANSWER}<eos>"


@pytest.mark.parametrize("chat", [False, True])
def test_every_token_of_plain_text_after_the_first_is_a_label(chat: bool) -> None:
    tokenizer = byte_level(**ALL, chat_template=CHAT_TEMPLATE if chat else None)
    encoded = encode(tokenizer, "", ANSWER)
    assert tokenizer.decode(encoded.input_ids) == f"<bos>{ANSWER}<eos>"
    assert encoded.labels == [IGNORED, *encoded.input_ids[1:]]
    without_bos = encode(byte_level(eos_token="<eos>"), "", ANSWER)
    assert without_bos.input_ids == encoded.input_ids[1:]
    assert without_bos.labels == [IGNORED, *encoded.input_ids[2:]]


def test_truncation_keeps_the_beginning() -> None:
    tokenizer = byte_level(**ALL)
    whole = encode(tokenizer, QUESTION, ANSWER)
    length = len(prompt_ids(tokenizer, QUESTION)) + 1
    cut = encode(tokenizer, QUESTION, ANSWER, max_length=length)
    assert cut == Encoded(whole.input_ids[:length], whole.labels[:length])
    assert encode(tokenizer, QUESTION, ANSWER, max_length=len(whole.input_ids)) == whole


@pytest.mark.parametrize("max_length", [-3, 0, 1, 5])
def test_a_truncated_example_without_answer_is_refused_by_name(max_length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length={max_length}.*The Iron Lantern"):
        encode(byte_level(**ALL), QUESTION, ANSWER, max_length=max_length)


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(ValueError, match="eos token"):
        encode(byte_level(pad_token="<pad>"), QUESTION, ANSWER)


def test_padding_is_pad_or_else_eos() -> None:
    assert padding_id(byte_level(**ALL)) == 0
    assert padding_id(byte_level(eos_token="<eos>")) == 2


def test_collate_pads_on_the_right_and_masks_by_length_not_by_value() -> None:
    eos = 2
    batch = collate([Encoded([1, 5, eos], [IGNORED, 5, eos]), Encoded([1, eos], [IGNORED, eos])], pad_token_id=eos)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 5, 2], [IGNORED, 2, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        collate([], pad_token_id=0)


@pytest.mark.parametrize("made", [lambda: byte_level(**ALL), sentence_piece])
def test_a_completion_that_brings_its_space_is_the_same_answer(made: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = made()
    assert encode(tokenizer, QUESTION, f" {ANSWER}") == encode(tokenizer, QUESTION, ANSWER)
