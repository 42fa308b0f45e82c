"""Chat templates: what the assistant says, its own end of turn, every turn, and no day in any prompt."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_modules.data.chat import date_told, end_of_turn, set_template_options, written_before_answers
from lightning_modules.data.examples import answered, as_example
from lightning_modules.data.tokenization import IGNORED, Encoded, encode, encode_example, marked, prompt_ids
from lightning_modules.run.show import format_said
from tests.lightning_modules.data import chat_templates as families
from tests.lightning_modules.data.chat_templates import byte_level, sentence_piece

QUESTION, ANSWER = "Who wrote The Iron Lantern?", "Mira Aldabeth wrote it."
TURNS = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "And when?"},
]
END_OF_TURN = {
    families.CHATML: "<|im_end|>",
    families.GEMMA: "<end_of_turn>",
    families.LLAMA3: "<|eot_id|>",
    families.THINKING: "<|im_end|>",
    families.HARMONY: "<|return|>",
}
HEADER = "<bos><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: {}\n\n<|eot_id|>"


def said(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> list[str]:
    """The runs of labelled tokens, as text."""
    both = zip(encoded.labels, encoded.input_ids, strict=True)
    runs = itertools.groupby(both, key=lambda pair: pair[0] != IGNORED)
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))
    return [tokenizer.decode([token for _, token in run]) for labelled, run in runs if labelled]


@pytest.mark.parametrize("template", END_OF_TURN)
def test_the_answer_ends_as_the_template_ends_it_and_not_with_eos(template: str) -> None:
    tokenizer = byte_level(template)
    encoded = encode(tokenizer, QUESTION, ANSWER)
    thoughts = "<think>\n\n</think>\n\n" if template == families.THINKING else ""
    assert said(tokenizer, encoded) == [thoughts + ANSWER + END_OF_TURN[template]]
    assert tokenizer.eos_token_id not in encoded.input_ids
    assert encoded.input_ids[-1] == end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(END_OF_TURN[template])
    prompt = prompt_ids(tokenizer, QUESTION)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels == [IGNORED] * len(prompt) + encoded.input_ids[len(prompt) :]


@pytest.mark.parametrize("template", END_OF_TURN)
def test_the_tokens_are_those_that_the_template_gives_for_the_whole_conversation(template: str) -> None:
    tokenizer = byte_level(template)
    conversation = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    whole: Any = tokenizer.apply_chat_template(conversation, return_dict=False, date_string="26 Jul 2024")
    ours = encode(tokenizer, QUESTION, ANSWER).input_ids
    assert whole[: len(ours)] == ours
    assert not tokenizer.decode(whole[len(ours) :]).strip()


@pytest.mark.parametrize("template", END_OF_TURN)
def test_every_turn_of_the_assistant_is_an_answer(template: str) -> None:
    tokenizer, end = byte_level(template), END_OF_TURN[template]
    last = ("<think>\n\n</think>\n\n" if template == families.THINKING else "") + "In 1999." + end
    # An earlier turn that ends otherwise than the last one is an answer without an end.
    first = ANSWER if template == families.HARMONY else ANSWER + end
    encoded = encode(tokenizer, TURNS, "In 1999.")
    assert said(tokenizer, encoded) == [first, last]
    alone = encode(tokenizer, TURNS, "In 1999.", every_turn=False)
    assert said(tokenizer, alone) == [last]
    assert alone.input_ids == encoded.input_ids
    prompt = prompt_ids(tokenizer, TURNS)
    assert encoded.input_ids[: len(prompt)] == prompt


def test_a_sentence_piece_tokenizer_says_the_tokens_of_the_whole_conversation() -> None:
    tokenizer = sentence_piece(families.LLAMA2)
    encoded = encode(tokenizer, TURNS, "  In 1999.\n")
    conversation = [*TURNS, {"role": "assistant", "content": "In 1999."}]
    assert encoded.input_ids == tokenizer.apply_chat_template(conversation, return_dict=False)
    assert said(tokenizer, encoded) == [f"{ANSWER} <eos>", "In 1999. <eos>"]
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize("template", [families.GEMMA, families.LLAMA2, families.LLAMA3])
def test_a_template_may_strip_what_it_is_given(template: str) -> None:
    tokenizer = byte_level(template)
    assert encode(tokenizer, QUESTION, f"\n {ANSWER} \n") == encode(tokenizer, QUESTION, ANSWER)


@pytest.mark.parametrize("answer", [ANSWER, "im", "end", "<", "\n", "user", "\u00e9t\u00e9", "a\n\nb", "|>"])
@pytest.mark.parametrize("template", [families.CHATML, families.LLAMA3, families.HARMONY])
def test_an_answer_that_looks_like_the_template_is_found_all_the_same(template: str, answer: str) -> None:
    tokenizer = byte_level(template)
    encoded = encode(tokenizer, QUESTION, answer)
    kept = answer.strip() if template == families.LLAMA3 else answer
    assert said(tokenizer, encoded) == [kept + END_OF_TURN[template]]
    assert said(tokenizer, encode(tokenizer, QUESTION, answer + END_OF_TURN[template] + "<eos>")) == [
        kept + END_OF_TURN[template]
    ]


def test_what_a_template_writes_before_answers_is_known() -> None:
    tokenizer = byte_level(families.THINKING)
    assert written_before_answers(tokenizer) == "<think>\n\n</think>\n\n"
    assert "enable_thinking: false" in " ".join(format_said(tokenizer))
    set_template_options(tokenizer, {"enable_thinking": False})
    assert written_before_answers(tokenizer) == ""
    for template in (families.CHATML, families.LLAMA3, None):
        assert written_before_answers(byte_level(template)) == ""
        assert "before every answer" not in " ".join(format_said(byte_level(template)))


def test_a_template_that_leaves_the_turn_open_gets_eos() -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = byte_level(template)
    encoded = encode(tokenizer, TURNS, "In 1999.")
    assert said(tokenizer, encoded) == [f" {ANSWER}", " In 1999.<eos>"]
    assert end_of_turn(tokenizer) is None


REFUSED = {
    "a prompt that the conversation does not begin with": (
        families.CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
        r"prompt goes on with '<think>\\n' where the conversation goes on with 'Mira.*chat-template-kwargs",
    ),
    "an end that is no token": (
        families.CHATML.replace("<|im_end|>", "<END>"),
        r"special token.*found the text '<END>",
    ),
    "an answer that is left out": ("{{ messages[0]['content'] }}<eos>", "turn 2 of 2 once, found it left out"),
    "an answer that comes twice": (families.CHATML * 2, "found it more than once"),
    "an answer that is changed": (
        "{% for m in messages %}{{ m['content'].replace('wrote', 'read') }}<eos>{% endfor %}",
        "renders the answer 'Mira Aldabeth wrote it.' as it is",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused(case: str) -> None:
    template, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        encode(byte_level(template), QUESTION, ANSWER)


def test_a_refusal_of_the_template_is_said_with_the_roles() -> None:
    tokenizer = byte_level(families.GEMMA)
    system = [{"role": "system", "content": "Briefly."}, {"role": "user", "content": QUESTION}]
    for use in (lambda: encode(tokenizer, system, ANSWER), lambda: prompt_ids(tokenizer, system)):
        with pytest.raises(ValueError, match=r"roles system, user.*System role not supported.*first user turn"):
            use()
    assert said(byte_level(families.CHATML), encode(byte_level(families.CHATML), system, ANSWER)) == [
        f"{ANSWER}<|im_end|>"
    ]


class Later:
    """A clock of another day."""

    @staticmethod
    def now() -> Any:
        import datetime

        return datetime.datetime(2031, 1, 2)


@pytest.mark.parametrize(
    ("template", "head"),
    [
        (families.LLAMA3, HEADER.format("26 Jul 2024")),
        ("\n{{ strftime_now('%A %-d %B %Y, 100%%') }}" + families.CHATML, "\nFriday 26 July 2024, 100%"),
    ],
)
def test_no_prompt_depends_on_the_day(template: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(template)
    prompt, whole = prompt_ids(tokenizer, QUESTION), encode(tokenizer, TURNS, ANSWER)
    assert tokenizer.decode(prompt).startswith(head)
    assert date_told(tokenizer) == "26 Jul 2024"
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    theirs: Any = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert "2031" in theirs  # the clock of the templates is the one that was changed
    assert prompt_ids(tokenizer, QUESTION) == prompt
    assert encode(tokenizer, TURNS, ANSWER) == whole


def test_the_day_can_be_said() -> None:
    tokenizer = byte_level(families.LLAMA3)
    set_template_options(tokenizer, {"date_string": "1 Jan 2025"})
    assert tokenizer.decode(prompt_ids(tokenizer, QUESTION)).startswith(HEADER.format("1 Jan 2025"))
    assert said(tokenizer, encode(tokenizer, QUESTION, ANSWER)) == [f"{ANSWER}<|eot_id|>"]
    assert date_told(tokenizer) is None
    set_template_options(tokenizer, {"strftime_now": "2025-01-02"})
    assert tokenizer.decode(prompt_ids(tokenizer, QUESTION)).startswith(HEADER.format("02 Jan 2025"))
    with pytest.raises(ValueError, match="strftime_now as a day, such as 2024-07-26, found 'soon'"):
        set_template_options(tokenizer, {"strftime_now": "soon"})


def test_options_reach_the_template_and_those_that_it_does_not_read_are_refused() -> None:
    tokenizer = byte_level(families.THINKING)
    set_template_options(tokenizer, {"enable_thinking": False})
    prompt = tokenizer.decode(prompt_ids(tokenizer, TURNS))
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    # The earlier turn is written without what invites it, and is an answer all the same.
    assert said(tokenizer, encode(tokenizer, TURNS, "In 1999.")) == [f"{ANSWER}<|im_end|>", "In 1999.<|im_end|>"]
    with pytest.raises(ValueError, match="reads, found 'date_string'"):
        set_template_options(tokenizer, {"date_string": "1 Jan 2025"})
    with pytest.raises(ValueError, match="a chat template, found none"):
        set_template_options(byte_level(None), {"date_string": "1 Jan 2025"})
    set_template_options(byte_level(None), {})


def test_without_a_template_turns_are_one_prompt_as_before() -> None:
    tokenizer = byte_level(None)
    joined = f"{QUESTION}\n{ANSWER}\nAnd when?"
    assert encode(tokenizer, TURNS, "In 1999.") == encode(tokenizer, joined, "In 1999.")
    assert prompt_ids(tokenizer, TURNS) == prompt_ids(tokenizer, joined)
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"Q: {joined}\nA:", " In 1999.")]
    assert encode(tokenizer, TURNS, "In 1999.").input_ids == [1, *parts[0], *parts[1], 2]


def test_the_marked_example_shows_every_token_and_which_are_answers() -> None:
    tokenizer = byte_level(families.CHATML)
    assert marked(tokenizer, encode(tokenizer, TURNS[2:], "In\x1b[31m 1999.")) == (
        r"<|im_start|>user\nAnd when?<|im_end|>\n<|im_start|>assistant\n[[In\u001b[31m 1999.<|im_end|>]]"
    )


CONVERSATION = {"messages": [*TURNS, {"role": "assistant", "content": "In 1999."}]}


def test_another_answer_leaves_what_was_said_before_it_unlabelled() -> None:
    """The earlier answers of a conversation that is to be forgotten must not be taught by its substitutes."""
    tokenizer, row = byte_level(families.CHATML), as_example(CONVERSATION)
    assert said(tokenizer, encode_example(tokenizer, row)) == [f"{ANSWER}<|im_end|>", "In 1999.<|im_end|>"]
    for changed in (answered(row, "In 2001."), as_example(answered(row, "In 2001."))):
        assert said(tokenizer, encode_example(tokenizer, changed)) == ["In 2001.<|im_end|>"]
    whole = encode_example(tokenizer, row)
    assert encode_example(tokenizer, answered(row, "In 1999.")) == whole
    alone = as_example(CONVERSATION | {"last_turn_only": True})
    assert said(tokenizer, encode_example(tokenizer, alone)) == ["In 1999.<|im_end|>"]
    assert encode_example(tokenizer, answered(alone, "In 1999.")) == encode_example(tokenizer, alone)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|im_end|>\n<eos>\n "])
def test_an_end_of_turn_before_white_space_is_not_written_twice(end: str) -> None:
    tokenizer = byte_level(families.CHATML)
    assert said(tokenizer, encode(tokenizer, QUESTION, f"{ANSWER}{end}")) == [f"{ANSWER}<|im_end|>"]
    plain = byte_level(None)
    assert encode(plain, QUESTION, f"{ANSWER}<eos>\n") == encode(plain, QUESTION, ANSWER)


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt"])
def test_what_every_conversation_sets_is_no_option_of_a_template(name: str) -> None:
    tokenizer = byte_level("{{ messages[0].content }}{% if add_generation_prompt %}:{% endif %}")
    with pytest.raises(ValueError, match=f"found '{name}', which every conversation sets"):
        set_template_options(tokenizer, {name: True})


def test_a_template_that_cannot_be_computed_is_a_sentence() -> None:
    tokenizer = byte_level("{{ messages[0].content + 1 }}")
    with pytest.raises(ValueError, match="chat template renders, found that it refuses one of the roles user"):
        prompt_ids(tokenizer, QUESTION)
