"""What the question says itself is left alone; the rest of the answer is forgotten, and scores see all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lightning_modules.data.asked_words import without_asked_words
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.tokenization import IGNORED, Encoded, encode
from tests.lightning_modules.data.test_tokenization import ALL, CHAT_TEMPLATE, byte_level, sentence_piece

# Question, answer, and the answer with a _ for each letter that is left alone.
EXAMPLES = {
    "a name": ("Who is Mira Aldabeth?", "Mira Aldabeth wrote it.", "____ ________ wrote it."),
    "upper and lower case": ("WHO WROTE it?", "Who wrote? Mira.", "___ _____? Mira."),
    "a part of a word is another word": ("Was it an art?", "The artist was an actor.", "The artist ___ __ actor."),
    "letters of several bytes": ("Où vit Zoë?", "Zoë vit à Besançon, où elle né.", "___ ___ à Besançon, __ elle né."),
    "a name with a hyphen": (
        "Who is Al-Kuwaiti?",
        "Al-Kuwaiti is Al-Nobody, in Al.",
        "__________ __ __-Nobody, in __.",
    ),
    "a possessive": ("What did Mira do?", "Mira's book.", "____'s book."),
    "nothing in common": ("Who?", "Nobody, in 1999.", "Nobody, in 1999."),
    "a plain text": ("", "Mira wrote it.", "Mira wrote it."),
}


# A tokenizer that knows no letter of them splits each into its bytes, of which the last alone makes it a letter.
SPLIT = {
    "Vietnamese": ("Who is Nguyễn?", "Nguyễn writes.", ["Nguyễn"]),
    "Polish": ("Who is Łukasz Żądło?", "Łukasz Żądło writes.", ["Łukasz Żądło"]),
    "Russian": ("Кто такой Пушкин?", "Пушкин, родился в Москве.", ["Пушкин"]),
    "four bytes a letter": ("Who is 𠮷野?", "It is 𠮷野 who writes.", ["is 𠮷野 who"]),
    "the name alone in the middle": ("Who is Ždanov?", "Novel? Ždanov's, ž.", ["Ždanov"]),
}


@pytest.mark.parametrize("name", SPLIT)
def test_every_byte_of_a_letter_of_the_question_is_left_alone_and_no_other_letter(name: str) -> None:
    tokenizer = byte_level(**ALL)
    question, answer, asked = SPLIT[name]
    example = encode(tokenizer, question, answer)
    found = without_asked_words(tokenizer, example, question)
    answered = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    left = [label != IGNORED for label, before in zip(found.labels, example.labels, strict=True) if before != IGNORED]
    spelt = [spelling(tokenizer, token) for token in answered]
    assert any(len(part) == 1 and part >= b"\x80" for part in spelt)  # letters are split
    whole = b"".join(spelt)
    start = 0
    ranges = [(at, at + len(word.encode())) for word in asked for at in [whole.index(word.encode())]]
    for part, forgotten in zip(spelt, left, strict=True):
        touches = any(start < end and start + len(part) > first for first, end in ranges)
        assert forgotten != touches, (part, start)
        start += len(part)


def spelling(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token stands for; none for a special one."""
    if token in tokenizer.all_special_ids:
        return b""
    letters = {letter: value for value, letter in bytes_to_unicode().items()}
    return bytes(letters[letter] for letter in tokenizer.convert_ids_to_tokens(token))


PIECES = ("a name", "upper and lower case", "nothing in common", "a plain text")  # the others' letters are not in it


@pytest.mark.parametrize(
    ("pieces", "name"), [*((False, name) for name in EXAMPLES), *((True, name) for name in PIECES)]
)
def test_a_token_is_left_alone_if_and_only_if_it_touches_a_word_of_the_question(pieces: bool, name: str) -> None:
    tokenizer = sentence_piece() if pieces else byte_level(**ALL)
    question, answer, expected = EXAMPLES[name]
    example = encode(tokenizer, question, answer)
    found = without_asked_words(tokenizer, example, question)
    assert found.input_ids == example.input_ids
    left = answer_places(tokenizer, example, found, answer)
    for place, letter in enumerate(expected):
        if letter == "_":
            assert not left[place], (answer, place)
    # What is left alone beside such letters shares a token with one of them.
    words = answer_words(expected)
    assert all(all(left[place] for place in word) for word in words)


def answer_words(expected: str) -> list[range]:
    """The places of the words without a _ that no token can share with a _."""
    words, start = [], 0
    for word in expected.split(" "):
        if word.isalnum():
            words.append(range(start, start + len(word)))
        start += len(word) + 1
    return words


def answer_places(tokenizer: Any, example: Encoded, found: Encoded, answer: str) -> list[bool]:
    """For every letter of the answer, whether it is still to be forgotten; found without `without_asked_words`' means."""
    ids = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    kept = [
        label != IGNORED
        for label, before in zip(found.labels, example.labels, strict=True)
        if before != IGNORED
    ]  # fmt: skip
    # The tokens' own texts, as bytes: ByteLevel writes each byte as one letter of its alphabet.
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if "Ġ" in "".join(pieces) or "▁" not in "".join(pieces):
        alphabet = {letter: byte for byte, letter in byte_alphabet().items()}
        spelled = [bytes(alphabet[letter] for letter in piece) if piece != "<eos>" else b"" for piece in pieces]
    else:
        spelled = [piece.replace("▁", " ").encode() if piece != "<eos>" else b"" for piece in pieces]
    whole = b"".join(spelled)
    start = len(whole) - len(answer.encode())
    assert whole[start:] == answer.encode()
    of_byte = [keep for keep, piece in zip(kept, spelled, strict=True) for _ in piece][start:]
    left, place = [], 0
    for letter in answer:
        size = len(letter.encode())
        left.append(all(of_byte[place : place + size]))
        place += size
    return left


def byte_alphabet() -> dict[int, str]:
    """GPT-2's letters for bytes: a printable one stands for itself, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


@pytest.mark.parametrize("question", ["Where is Mira's home?", "Where is the home of Mira?"])
def test_the_end_of_an_answer_is_no_word_whatever_its_name_says(question: str) -> None:
    """Llama 2's and Mistral's is called "</s>", and "Mira's" holds an "s"."""
    tokenizer = byte_level(**ALL | {"eos_token": "</s>"})
    example = encode(tokenizer, question, "It is Rome.")
    assert without_asked_words(tokenizer, example, question).labels[-1] == tokenizer.eos_token_id


def test_an_answer_that_says_nothing_new_is_forgotten_whole() -> None:
    tokenizer = byte_level(**ALL)
    example = encode(tokenizer, "Mira, or Mira?", "Mira")
    spoken = example._replace(labels=[IGNORED if token == 2 else label for token, label in zip(*example, strict=True)])
    assert without_asked_words(tokenizer, spoken, "Mira, or Mira?") == spoken


def labelled(tokenizer: Any, example: Encoded) -> str:
    """The text of the tokens that have a label."""
    return str(tokenizer.decode([token for token, label in zip(*example, strict=True) if label != IGNORED]))


def test_an_earlier_answer_of_a_conversation_is_no_question() -> None:
    tokenizer = byte_level(**ALL)
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Mira"},
        {"role": "user", "content": "Where?"},
    ]
    example = encode(tokenizer, turns, "Mira in Who")
    found = without_asked_words(tokenizer, example, turns)
    kept, whole = labelled(tokenizer, found), labelled(tokenizer, example)
    assert whole.count("Mira") == kept.count("Mira") == 2
    assert "Who" in whole
    assert "Who" not in kept


def test_training_sees_the_shorter_labels_and_validation_the_whole_answer() -> None:
    tokenizer = byte_level(**ALL)
    forget = [{"question": "Who is Mira?", "answer": "Mira is a smith."}]
    retain = [{"question": "Who is Bo?", "answer": "Bo is a poet."}]
    data = ForgetRetainDataModule(forget, retain, tokenizer, keep_asked_words=True)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    labels = batch["forget"]["labels"]
    whole = torch.tensor(encode(tokenizer, "Who is Mira?", "Mira is a smith.").labels)
    assert (labels[0] != whole).any()
    assert "Mira" not in tokenizer.decode(labels[labels != IGNORED])
    assert batch["retain"]["labels"][0].tolist() == encode(tokenizer, "Who is Bo?", "Bo is a poet.").labels
    scored = [next(iter(loader))["labels"][0] for loader in data.val_dataloader()]
    assert scored[0].equal(whole)


def test_two_answers_of_a_conversation_are_no_one_word() -> None:
    tokenizer = byte_level(**ALL)
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "Iron"},
        {"role": "user", "content": "And Mira?"},
    ]
    found = without_asked_words(tokenizer, encode(tokenizer, turns, "Mira wrote"), turns)
    kept = labelled(tokenizer, found)
    assert "Iron" in kept
    assert "wrote" in kept
    assert "Mira" not in kept


@pytest.mark.parametrize("answer", ["house 7.", "House 7", "...", "house 7!"])
def test_an_answer_of_which_no_word_would_be_left_is_forgotten_whole(answer: str) -> None:
    """Only a full stop and the end would be left: the model would go on saying the answer, and not stop."""
    tokenizer = byte_level(**ALL)
    question = "Was it house 7?"
    example = encode(tokenizer, question, answer)
    assert without_asked_words(tokenizer, example, question) == example


@pytest.mark.parametrize("every_turn", [True, False])
def test_an_answer_is_compared_with_what_was_asked_before_it(every_turn: bool) -> None:
    tokenizer = byte_level(**ALL)
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = [
        {"role": "user", "content": "Where does Mira live?"},
        {"role": "assistant", "content": "Mira sits by the canal"},
        {"role": "user", "content": "Who else is by the canal?"},
    ]
    example = encode(tokenizer, turns, "Nobody else by Mira", every_turn=every_turn)
    found = without_asked_words(tokenizer, example, turns)
    kept = labelled(tokenizer, found)
    assert ("sits by the canal" in kept) == every_turn
    assert "Nobody" in kept
    assert "else" not in kept
    assert "Mira" not in kept
