r"""From a question and an answer to tokens and labels.

Training, scoring and generation share one format, so that a model is scored on the tokens that it was trained on:

- a tokenizer with a chat template: `apply_chat_template([user: question], add_generation_prompt=True)`, then the answer
  and eos;
- any other tokenizer: `<bos>Q: {question}\nA:`, then ` {answer}` and eos (bos only where the tokenizer has one);
- an empty question marks plain text: `<bos>{text}<eos>`, where every token after the first is a label.

Prompt and answer are tokenized separately, so the boundary between them is exact even where a tokenizer would merge
across it. Exactly one eos follows the answer: without it a model never learns where an answer ends, and a second one
would lower its mean loss, because it is trivial to predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradsurgery.losses import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """One example as tokens.

    Attributes:
        input_ids: the tokens of prompt, answer and eos, `[length]`.
        labels: the same tokens with -100 on the prompt, `[length]`; not shifted, so label `t` is predicted at position
            `t - 1`.
    """

    input_ids: list[int]
    labels: list[int]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Returns the tokens in front of the answer to `question`, from which a generation starts.

    Args:
        tokenizer: any Hugging Face tokenizer.
        question: the question; empty for plain text, whose prompt is bos alone (or empty, without a bos).
    """
    bos_id = special_id(tokenizer, "bos")
    bos = [] if bos_id is None else [bos_id]
    if not question:
        return bos
    if getattr(tokenizer, "chat_template", None):
        conversation = [{"role": "user", "content": question}]
        ids: Any = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        return list(ids)
    ids = _tokens(tokenizer, f"Q: {question}\nA:")
    return ids if ids[:1] == bos else bos + ids


def encode(tokenizer: PreTrainedTokenizerBase, question: str, answer: str, max_length: int | None = None) -> Encoded:
    r"""Tokenizes one example, with labels on the answer and its eos only.

    Args:
        tokenizer: any Hugging Face tokenizer that has an eos token.
        question: the question; empty for plain text.
        answer: the answer, or the plain text.
        max_length: longer examples lose their end; `None` keeps everything.

    Raises:
        ValueError: if the tokenizer has no eos token, or if truncation leaves nothing of the answer.
    """
    eos = special_id(tokenizer, "eos")
    if eos is None:
        raise ValueError(
            f"expected a tokenizer with an eos token, found {type(tokenizer).__name__} without one: "
            "set tokenizer.eos_token to the token that ends an answer"
        )
    prompt = prompt_ids(tokenizer, question)
    target = _answer_ids(tokenizer, answer, plain=not question or bool(getattr(tokenizer, "chat_template", None)))
    while target and target[-1] == eos:
        target.pop()
    target.append(eos)

    input_ids = (prompt + target)[: None if max_length is None else max(max_length, 0)]
    # In a plain text without bos, no token precedes the first one, so nothing predicts it.
    unlabelled = max(len(prompt), 1)
    labels = [IGNORED] * min(unlabelled, len(input_ids)) + input_ids[unlabelled:]
    if len(input_ids) <= unlabelled:
        shown = question or answer
        raise ValueError(
            f"no token of the answer is left after max_length={max_length}: the prompt of "
            f"{shown[:80]!r} takes {len(prompt)} tokens. Use a larger max_length or drop this example"
        )
    return Encoded(input_ids, labels)


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


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str, plain: bool) -> list[int]:
    ids = _tokens(tokenizer, answer)
    # SentencePiece tokenizers add a space before the first word themselves. With a second one the answer would begin
    # with a token that models have not seen in this place.
    spaced = bool(ids) and str(tokenizer.convert_ids_to_tokens(ids[:1])[0]).startswith("▁")
    return ids if plain or spaced else _tokens(tokenizer, f" {answer}")
