"""Which words of an answer the question says itself: they are no secret, and need not be forgotten."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

from lightning_modules.data.tokenization import IGNORED, Encoded, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD = re.compile(r"\w+")


def without_asked_words(tokenizer: PreTrainedTokenizerBase, example: Encoded, question: Question) -> Encoded:
    """An example without labels on the words of its answer that its question says too; what is read stays the same.

    Who asks about a person names her. A loss that takes the whole answer away takes her name away too: the model then
    answers about somebody with another, misspelt name. What remains to be forgotten is what the question does not say.

    A word is a run of letters, digits and underscores; upper and lower case are the same. A token that touches such a
    word, or what stands between two of them, loses its label, also where it holds a space or a sign beside it. Special
    tokens are no words, whatever their names say: "</s>" keeps its label where the question has an "s".

    Args:
        tokenizer: that made the example.
        example: of one question and answer.
        question: the question, or the turns before the answer, of which the assistant's own are no question. Each
            answer of a conversation is compared with the turns before it.

    Returns:
        The example. An answer of which no word would be left, as of a question that says it, keeps all its labels.

    Cost: the answer is decoded once for each of its tokens.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> names = {"Who?": 0, "Ada": 1, "sings": 2, "<eos>": 3}
        >>> words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(names, "<eos>")))
        >>> without_asked_words(words, Encoded([1, 1, 2, 3], [-100, 1, 2, 3]), "What does ada do?").labels
        [-100, -100, 2, 3]
    """
    special = set(tokenizer.all_special_ids)
    labels = list(example.labels)
    answers = _runs([label not in (IGNORED, *special) for label in labels])
    for places, asked in zip(answers, _asked_before(question, len(answers)), strict=True):
        for place in _repeated(tokenizer, [example.input_ids[place] for place in places], asked):
            labels[places[place]] = IGNORED
    return example._replace(labels=labels)


def _asked_before(question: Question, answers: int) -> list[set[str]]:
    """The words that are asked before each of so many answers."""
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
    words: set[str] = set()
    before: list[set[str]] = []
    for turn in turns:
        if turn["role"] != "assistant":
            words = words | {word.casefold() for word in _WORD.findall(str(turn["content"]))}
        elif str(turn["content"]).strip():
            before.append(words)
    before.append(words)
    # Where earlier answers have no labels, or the end is cut off, it is not known which ones are left.
    return before if len(before) == answers else [words] * answers


def _runs(wanted: list[bool]) -> list[range]:
    """The places of neighbours that are wanted: an answer each, so that the words of two do not run into one."""
    found: list[range] = []
    for place, one in enumerate(wanted):
        if one and found and found[-1].stop == place:
            found[-1] = range(found[-1].start, place + 1)
        elif one:
            found.append(range(place, place + 1))
    return found


def _repeated(tokenizer: PreTrainedTokenizerBase, ids: list[int], asked: set[str]) -> list[int]:
    """The places of tokens that touch a word that was asked for, or what stands between two of them."""
    # A token alone may be a part of a letter, or lose its space: only the growing text says where each of them ends.
    texts = [_decoded(tokenizer, ids[: count + 1]) for count in range(len(ids))]
    # A letter that has begun stands there as U+FFFD: it is no whole one yet, and the tokens that follow belong to it.
    whole = [len(text.rstrip("\ufffd")) for text in texts]
    ends = [letters + (len(text) > letters) for letters, text in zip(whole, texts, strict=True)]
    words = list(_WORD.finditer(_decoded(tokenizer, ids)))
    repeated = [word.group().casefold() in asked for word in words]
    if all(repeated):
        return []
    known = {place for word, mine in zip(words, repeated, strict=True) if mine for place in range(*word.span())}
    for (word, next_word), both in zip(pairwise(words), pairwise(repeated), strict=True):
        if all(both):  # the hyphen of a name, the space in it
            known.update(range(word.end(), next_word.start()))
    spans = enumerate(zip([0, *whole], ends, strict=False))
    return [place for place, (start, end) in spans if known.intersection(range(start, end))]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
