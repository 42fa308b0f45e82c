"""Long texts in pieces that a model can be trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lightning_modules.data.tokenization import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENDS = 2  # bos and eos, which every piece gets


def pieces(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[str]:
    """Cuts a text between words into pieces of at most `max_length` tokens each, bos and eos counted.

    Put together again the pieces are the text, with nothing left out. Only a word that is longer than a piece is cut
    inside. MUSE's authors cut between tokens instead, and cut what is left over at the end off, or fill it up with the
    text's beginning.

    Args:
        tokenizer: of the model.
        text: the text.
        max_length: the longest piece, in tokens; at least 4, which leaves room for two.

    Raises:
        ValueError: if `max_length` is too small for a single character.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, "a"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> pieces(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>"), "one two three four", 4)
        ['one two', ' three four']
    """
    words = re.findall(r"\s*\S+(?:\s+\Z)?", text) or [text]
    sizes = _sizes(tokenizer, words)
    found: list[str] = []
    first, total = 0, 0
    for place, size in enumerate(sizes):
        if total and total + size > max_length - _ENDS:
            found += _fitting(tokenizer, words[first:place], max_length)
            first, total = place, 0
        total += size
    return [*found, *_fitting(tokenizer, words[first:], max_length)]


def _sizes(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """Tokens of each word by itself: mostly no fewer than it has within the text."""
    known = list(dict.fromkeys(words))
    sizes = {
        word: len(ids)
        for start in range(0, len(known), 10000)
        for word, ids in zip(
            known[start : start + 10000],
            tokenizer(known[start : start + 10000], add_special_tokens=False)["input_ids"],
            strict=True,
        )
    }
    return [sizes[word] for word in words]


def _fitting(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], max_length: int) -> Iterator[str]:
    """The words as one piece; as two where that is too long: tokens of neighbours can be more than those of each."""
    text = "".join(words)
    if len(encode(tokenizer, "", text).input_ids) <= max_length:
        yield text
        return
    parts = words if len(words) > 1 else list(text)
    if len(parts) < 2:
        raise ValueError(f"expected a max_length that has room for {text!r:.20}, found {max_length}: use a larger one")
    middle = len(parts) // 2
    yield from _fitting(tokenizer, parts[:middle], max_length)
    yield from _fitting(tokenizer, parts[middle:], max_length)
