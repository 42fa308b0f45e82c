r"""From a question and an answer to tokens and labels.

Training, scoring and generation share one format, so that a model is scored on the tokens that it was trained on:

- a tokenizer with a chat template: the conversation as the template renders it, up to the end of its last turn; the
  labels are what the assistant says, the template's own end of turn included (`lightning_modules.data.chat`);
- any other tokenizer: `<bos>Q: {question}\nA:`, then ` {answer}` and eos (bos only where the tokenizer has one);
- a tokenizer that was told a format (`lightning_modules.data.formats`): as that says;
- an empty question marks plain text: `<bos>{text}<eos>`, where every token after the first is a label.

The boundary between prompt and answer is exact even where a tokenizer would merge across it: then the two are tokenized
separately, because generation starts from the prompt's tokens. Exactly one end follows an answer: without it a model
never learns where an answer ends, and a second one would lower its mean loss, because it is trivial to predict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.losses import IGNORED
from lightning_modules.data.chat import Message, has_template, prompt_text, spoken, without_ends
from lightning_modules.data.examples import asked
from lightning_modules.data.formats import PromptFormat, format_of, single_question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """One example as tokens.

    Attributes:
        input_ids: the tokens of prompt, answer and its end, `[length]`.
        labels: the same tokens with -100 on the prompt, `[length]`; not shifted, so label `t` is predicted at position
            `t - 1`.
    """

    input_ids: list[int]
    labels: list[int]


Question = str | Sequence[Message]
"""What an answer answers: a text, or the turns of the conversation before it (`examples.asked`)."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    """Returns the tokens in front of the answer to `question`, from which a generation starts.

    Args:
        tokenizer: any Hugging Face tokenizer.
        question: the question, or the turns before the answer; empty for plain text, whose prompt is bos alone (or
            empty, without a bos).

    Raises:
        ValueError: if the tokenizer's chat template refuses the conversation.
    """
    bos_id = special_id(tokenizer, "bos")
    bos = [] if bos_id is None else [bos_id]
    if not question:
        return bos
    form = format_of(tokenizer)
    if form is not None:
        prompt = form(tokenizer, single_question(question), None)
        return _begun(tokenizer, prompt.whole, special=prompt.special)
    if has_template(tokenizer):
        return _tokens(tokenizer, prompt_text(tokenizer, _turns(question)))
    ids = _tokens(tokenizer, f"Q: {_text(question)}\nA:")
    return ids if ids[:1] == bos else bos + ids


def encode(
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    answer: str,
    max_length: int | None = None,
    *,
    every_turn: bool = True,
) -> Encoded:
    r"""Tokenizes one example, with labels on what the assistant says, its end included, and on nothing else.

    Args:
        tokenizer: any Hugging Face tokenizer that has an eos token, or a chat template that ends its turns itself.
        question: the question, or the turns before the answer; empty for plain text.
        answer: the answer, or the plain text.
        max_length: longer examples lose their end; `None` keeps everything.
        every_turn: whether the assistant's earlier turns are answers too. It matters only for turns and a tokenizer
            with a chat template; without one, earlier turns are part of the prompt.

    Raises:
        ValueError: if the tokenizer has no eos token and needs one, if its chat template cannot be used (see
            `chat.spoken`), or if truncation leaves nothing of the answer.
    """
    form = format_of(tokenizer)
    if question and form is not None:
        example = _formatted(tokenizer, form, single_question(question), answer)
    elif question and has_template(tokenizer):
        example = _conversation(tokenizer, [*_turns(question), {"role": "assistant", "content": answer}], every_turn)
    else:
        example = _question_and_answer(tokenizer, question, answer)
    return shortened(example, max_length, _text(question) or answer)


def encode_example(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], max_length: int | None = None
) -> Encoded:
    """Tokenizes an example of `read_examples`: `encode` of what it asks and answers.

    Args:
        tokenizer: as in `encode`.
        row: with `question` and `answer`, and where it is a conversation `messages` and `last_turn_only`.
        max_length: as in `encode`.

    Raises:
        ValueError: as `encode`.
    """
    every_turn = not row.get("last_turn_only", False)
    return encode(tokenizer, asked(row), row["answer"], max_length, every_turn=every_turn)


def shortened(example: Encoded, max_length: int | None, shown: str = "") -> Encoded:
    """Returns the first `max_length` tokens of an example; all of them for `None`.

    Args:
        example: the whole example.
        max_length: how many tokens are kept.
        shown: what the message calls the example.

    Raises:
        ValueError: if no label is left.
    """
    kept = Encoded(*(column[: None if max_length is None else max(max_length, 0)] for column in example))
    if all(label == IGNORED for label in kept.labels):
        before = next((place for place, label in enumerate(example.labels) if label != IGNORED), len(example.labels))
        raise ValueError(
            f"no token of the answer is left after max_length={max_length}: the prompt of {shown[:80]!r} takes {before} tokens. Use a "
            "larger max_length or drop this example"
        )
    return kept


def marked(tokenizer: PreTrainedTokenizerBase, example: Encoded) -> str:
    r"""Returns an example as a line of text in which what the model learns to say stands between `[[` and `]]`.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"Who?": 0, "Ada": 1, "<eos>": 2}, "<eos>"))
        >>> marked(PreTrainedTokenizerFast(tokenizer_object=words), Encoded([0, 1, 2], [-100, 1, 2]))
        'Who?[[Ada <eos>]]'
    """
    pieces: list[tuple[bool, list[int]]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if not pieces or pieces[-1][0] != (label != IGNORED):
            pieces.append((label != IGNORED, []))
        pieces[-1][1].append(token)
    texts = ((said, str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))) for said, ids in pieces)
    # As in JSON, so that it stays one line, and no text of a file can command the terminal.
    return json.dumps("".join(f"[[{text}]]" if said else text for said, text in texts), ensure_ascii=False)[1:-1]


def special_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """Returns the id of a special token, `"bos"`, `"eos"` or `"pad"`; `None` where the tokenizer has none."""
    return getattr(tokenizer, f"{name}_token_id")


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that fills up shorter rows: pad, or eos where the tokenizer has no pad token.

    Either will do, because padding is recognised by the attention mask and by labels of -100, never by its token.

    Raises:
        ValueError: if the tokenizer has neither.
    """
    for token in (special_id(tokenizer, "pad"), special_id(tokenizer, "eos")):
        if token is not None:
            return token
    raise ValueError(f"expected a tokenizer with a pad or an eos token, found {type(tokenizer).__name__} without")


def collate(encoded: Sequence[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """Pads examples on the right into one batch.

    Args:
        encoded: B examples.
        pad_token_id: fills up shorter rows, see `padding_id`.

    Returns:
        `input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `labels` (-100 on prompt and padding), int64, `[B,
        longest]`.

    Raises:
        ValueError: if there is no example.

    Example:
        >>> collate([Encoded([1, 5, 2], [-100, 5, 2]), Encoded([1, 2], [-100, 2])], pad_token_id=0)["labels"].tolist()
        [[-100, 5, 2], [-100, 2, -100]]
    """
    if not encoded:
        raise ValueError("expected at least one example to make a batch of, found none")
    longest = max(len(example.input_ids) for example in encoded)
    shape = (len(encoded), longest)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(encoded):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        labels[row, :length] = torch.tensor(example.labels)
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _begun(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """A text that goes on, without the eos that some tokenizers put after every text."""
    ids = _tokens(tokenizer, text, special=special)
    if special and ids and ids[-1] == special_id(tokenizer, "eos") and ids != _tokens(tokenizer, text):
        ids.pop()
    return ids


def _turns(question: Question) -> Sequence[Message]:
    return [{"role": "user", "content": question}] if isinstance(question, str) else question


def _text(question: Question) -> str:
    """The question as text; turns are joined by line breaks."""
    return question if isinstance(question, str) else "\n".join(str(turn["content"]) for turn in question)


def _question_and_answer(tokenizer: PreTrainedTokenizerBase, question: Question, answer: str) -> Encoded:
    eos = _eos(tokenizer)
    prompt = prompt_ids(tokenizer, question)
    target = _answer_ids(tokenizer, without_ends(answer, [str(tokenizer.eos_token)]), plain=not question)
    while target and target[-1] == eos:
        target.pop()
    target.append(eos)
    # In a plain text without bos, no token precedes the first one, so nothing predicts it.
    unlabelled = max(len(prompt), 1)
    input_ids = prompt + target
    return Encoded(input_ids, [IGNORED] * unlabelled + input_ids[unlabelled:])


def _formatted(tokenizer: PreTrainedTokenizerBase, form: PromptFormat, question: str, answer: str) -> Encoded:
    prompt, whole, special = form(tokenizer, question, answer)
    head, ids = _begun(tokenizer, prompt, special=special), _tokens(tokenizer, whole, special=special)
    if ids[: len(head)] != head:
        raise ValueError(
            f"--prompt-format: expected a format whose prompt ends where a token ends, found one across its end in {whole!r:.200}: put "
            "a line break or a special token between question and answer, or use auto"
        )
    ids = ids if ids[-1] == special_id(tokenizer, "eos") else [*ids, _eos(tokenizer)]
    return Encoded(ids, [IGNORED] * len(head) + ids[len(head) :])


def _conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], every_turn: bool) -> Encoded:
    text, spans, unended = spoken(tokenizer, messages, every_turn=every_turn)
    places = [place for span in spans for place in span]
    # Tokenized in one piece, as whoever taught the model to chat did it, unless that merges across a boundary.
    whole, heads = _tokens(tokenizer, text), [_tokens(tokenizer, text[:place]) for place in places[:-1]]
    if all(whole[: len(head)] == head for head in heads):
        pieces = [whole[first:last] for first, last in pairwise([0, *map(len, heads), len(whole)])]
    else:
        pieces = [_tokens(tokenizer, text[first:last]) for first, last in pairwise([0, *places])]
    if unended:
        pieces[-1] = [*pieces[-1], _eos(tokenizer)]
    input_ids, labels = [], []
    for number, piece in enumerate(pieces):
        input_ids += piece
        labels += piece if number % 2 else [IGNORED] * len(piece)
    return Encoded(input_ids, labels)


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = special_id(tokenizer, "eos")
    if eos is None:
        raise ValueError(
            f"expected a tokenizer with an eos token, found {type(tokenizer).__name__} without one: "
            "set tokenizer.eos_token to the token that ends an answer"
        )
    return eos


def _answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str, plain: bool) -> list[int]:
    if not plain:
        answer = answer.removeprefix(" ")  # as OpenAI's prompts and completions are written
    ids = _tokens(tokenizer, answer)
    # SentencePiece tokenizers add a space before the first word themselves. With a second one the answer would begin
    # with a token that models have not seen in this place.
    spaced = bool(ids) and str(tokenizer.convert_ids_to_tokens(ids[:1])[0]).startswith("▁")
    return ids if plain or spaced or answer[:1].isspace() else _tokens(tokenizer, f" {answer}")
