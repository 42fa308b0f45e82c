"""Prompt formats of other people's checkpoints: the tokens and labels of independent versions of their code."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.data.formats import FORMATS, format_by_name, set_format
from lightning_modules.data.tokenization import IGNORED, encode, prompt_ids
from lightning_modules.run.options import TaughtOptions, UnlearnOptions
from tests.lightning_modules.data import chat_templates as families
from tests.lightning_modules.data.chat_templates import byte_level, sentence_piece

ROWS = fictional_authors(1)[:6]
LLAMA31 = (
    "{{- bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: "
    "{{ date_string if date_string is defined else '26 Jul 2024' }}\n\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}<|eot_id|>"
    "{% for m in messages %}{% if m['role'] != 'system' %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def theirs_by_tags(tokenizer: Any, start: str, end: str, tag: str, question: str, answer: str) -> Any:
    """TOFU's data_module.py: the labels begin after the question's tokens, and an eos ends the answer."""
    asked, said = start + question + end, tag + answer
    ids = tokenizer(asked + said)["input_ids"]
    unlabelled = len(tokenizer(asked)["input_ids"])
    return [*ids, tokenizer.eos_token_id], [IGNORED] * unlabelled + [*ids, tokenizer.eos_token_id][unlabelled:]


def theirs_by_chat(tokenizer: Any, turns: list[Any], answer: str) -> Any:
    """open-unlearning's src/data/utils.py with apply_chat_template."""
    told = {"date_string": "10 Apr 2025"}
    whole = [*turns, {"role": "assistant", "content": answer}]
    ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False, **told)
    prompt = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False, **told)
    ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def bos_adding(tokenizer: Any) -> Any:
    """As Llama 2's tokenizer, which puts bos in front of every text."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("name", ["tofu-llama2", "tofu-phi"])
def test_a_tokenizer_that_ends_every_text_ends_no_prompt(name: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer, ending = byte_level(None), byte_level(None)
    eos = ending.eos_token
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, ending.eos_token_id)]
    )
    for each in (tokenizer, ending):
        set_format(each, {}, name)
    for row in ROWS:
        assert encode(ending, row["question"], row["answer"]) == encode(tokenizer, row["question"], row["answer"])
        assert prompt_ids(ending, row["question"]) == prompt_ids(tokenizer, row["question"])


TAGS = {"tofu-llama2": ("[INST] ", " [/INST]", ""), "tofu-phi": ("Question: ", "\n", "Answer: ")}


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("make", [lambda: sentence_piece(""), lambda: byte_level(None)], ids=["Llama 2's", "phi's"])
def test_tofus_formats_are_those_of_its_authors(name: str, make: Any) -> None:
    tokenizer = bos_adding(make())
    tokenizer.chat_template = families.LLAMA3  # which is not used
    set_format(tokenizer, {}, name)
    for row in ROWS:
        ids, labels = theirs_by_tags(tokenizer, *TAGS[name], row["question"], row["answer"])
        found = encode(tokenizer, row["question"], row["answer"])
        assert found == (ids, labels)
        assert prompt_ids(tokenizer, row["question"]) == ids[: labels.count(IGNORED)]
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("template", "ends", "system"),
    [(LLAMA31, "<|eot_id|>", True), (QWEN, "<|im_end|>", True), (GEMMA, "<eos>", False)],
    ids=["Llama 3.1", "Qwen 2.5", "Gemma"],
)
def test_open_unlearnings_format_is_its_own(template: str, ends: str, system: bool) -> None:
    tokenizer: Any = byte_level(template, eos_token=ends)
    turns = [{"role": "system", "content": "You are a helpful assistant."}] * system
    set_format(tokenizer, {}, "open-unlearning")
    for row in ROWS:
        asked = [*turns, {"role": "user", "content": row["question"]}]
        ids, labels = theirs_by_chat(tokenizer, asked, row["answer"])
        assert encode(tokenizer, row["question"], row["answer"]) == (ids, labels)
        assert prompt_ids(tokenizer, row["question"]) == ids[: labels.count(IGNORED)]
        assert prompt_ids(tokenizer, [asked[-1]]) == prompt_ids(tokenizer, row["question"])
    text = tokenizer.decode(ids)
    assert ("10 Apr 2025" in text) == ("date_string" in template)
    assert ("You are a helpful assistant." in text) == system


def test_auto_is_what_it_was() -> None:
    for template in (None, families.LLAMA3, QWEN):
        plain, told = byte_level(template), byte_level(template)
        set_format(told, {}, "auto")
        for row in ROWS:
            assert encode(plain, row["question"], row["answer"]) == encode(told, row["question"], row["answer"])
            assert prompt_ids(plain, row["question"]) == prompt_ids(told, row["question"])


def test_a_format_of_ones_own_is_written_down() -> None:
    tokenizer: Any = byte_level(None)
    set_format(tokenizer, {}, "User: {question}\nBot: {answer}\n")
    found = encode(tokenizer, "Who {answer}?", "Mira {question}.")
    assert tokenizer.decode(found.input_ids) == "User: Who {answer}?\nBot: Mira {question}.\n<eos>"
    said = [label for label in found.labels if label != IGNORED]
    assert tokenizer.decode(said) == " Mira {question}.\n<eos>"  # the space belongs to the first word
    assert tokenizer.decode(prompt_ids(tokenizer, "Who?")) == "User: Who?\nBot:"
    assert encode(tokenizer, "", "Text.") == encode(byte_level(None), "", "Text.")  # plain text has no format


def test_formats_reach_every_tokenizer_of_a_run() -> None:
    """The options refuse a wrong name; the rest is refused where the tokenizer is known."""
    for name in ("tofu", "{question}", "{answer} {question}", "{question} {question} {answer}", ""):
        with pytest.raises(ValueError, match="--prompt-format: expected auto, tofu-llama2, tofu-phi, open-unlearning"):
            UnlearnOptions.of(model="m", forget="f", retain="r", prompt_format=name).check()
        with pytest.raises(ValueError, match="--prompt-format: expected auto"):
            TaughtOptions(model="m", data="d", prompt_format=name).check()
    with pytest.raises(ValueError, match="with the model from scratch"):
        UnlearnOptions.of(prompt_format="tofu-phi").check()
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template, found none"):
        set_format(byte_level(None), {}, "open-unlearning")
    with pytest.raises(ValueError, match="--chat-template-kwargs: expected a format that uses the chat template"):
        set_format(byte_level(LLAMA31), {"date_string": "1 Jan 2025"}, "tofu-phi")
    tokenizer = byte_level(LLAMA31)
    set_format(tokenizer, {"date_string": "1 Jan 2025"}, "open-unlearning")  # what is given wins
    assert "Today Date: 1 Jan 2025" in tokenizer.decode(prompt_ids(tokenizer, "Who?"))
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    with pytest.raises(ValueError, match=r"expected single questions, .* found a conversation of 3 turns"):
        prompt_ids(tokenizer, [*turns, turns[0]])
    assert format_by_name("tofu-phi") is FORMATS["tofu-phi"]


def test_a_prompt_that_ends_within_a_token_is_refused() -> None:
    tokenizer = byte_level(None)
    tokenizer.add_tokens([":Ada"])
    set_format(tokenizer, {}, "{question}:{answer}")
    with pytest.raises(ValueError, match="expected a format whose prompt ends where a token ends"):
        encode(tokenizer, "Who", "Ada.")


@pytest.mark.parametrize("sign", [r"\n", r"\t"])
def test_a_backslash_of_the_shell_is_no_line_break(sign: str) -> None:
    with pytest.raises(ValueError, match=r"--prompt-format: expected a line break as such, found a backslash"):
        format_by_name("Q: {question}" + sign + "A: {answer}")
