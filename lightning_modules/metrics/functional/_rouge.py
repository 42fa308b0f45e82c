"""How much of the right text a generation reproduces."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@overload
def rouge_recall(prediction: str, target: str, kind: str = ..., use_stemmer: bool = ...) -> float: ...
@overload
def rouge_recall(
    prediction: list[str] | tuple[str, ...],
    target: list[str] | tuple[str, ...],
    kind: str = ...,
    use_stemmer: bool = ...,
) -> Tensor: ...
def rouge_recall(
    prediction: str | Sequence[str], target: str | Sequence[str], kind: str = "rougeL", use_stemmer: bool = True
) -> float | Tensor:
    """The share of the target's words that the prediction has, in order (ROUGE-L) or in any order (ROUGE-1).

    Source: Lin 2004, as the `rouge-score` package computes it, recall only. TOFU uses stems (without them a forget set
    scores .4015 instead of .4082) and reports recall. The F1 that other packages print by default is another number
    (.287 where recall is .923), because it penalises full sentences. open-unlearning first strips the text and cuts it
    at stop words; here text is scored as it is.

    Words are those of `rouge-score`, runs of a-z and 0-9, to which it is blind in any other script: a text in one would
    score 0 even against itself. So runs of letters of every other script are words too, and of Chinese and Japanese
    each character is one. Latin letters with accents stay what they are in `rouge-score`, white space ("García" is
    "garc" and "a"), so that English text keeps its published scores; only where a target has no word but such letters,
    they are letters.

    Args:
        prediction: the model's text, or n of them.
        target: the right text, or n of them.
        kind: `"rouge1"`, `"rouge2"`, `"rougeL"` or `"rougeLsum"`.
        use_stemmer: compare Porter stems.

    Returns:
        A float in [0, 1] for two strings, a float64 tensor `[n]` for two lists. A target without a word, of which no
        share can be taken, gives 0 as in `rouge-score`; `has_words` tells it.

    Raises:
        ValueError: if the kind is unknown, or there are not as many predictions as targets and at least one.
        ImportError: without the `rouge-score` package.

    Example:
        >>> rouge_recall("He wrote the novel in Lima", "The novel")
        1.0
        >>> rouge_recall(["a b", "c"], ["a b c d", "d"])
        tensor([0.5000, 0.0000], dtype=torch.float64)
        >>> rouge_recall("Она живёт в Риге", "Живёт в Лиме")
        0.6666666666666666
    """
    return _rouge(prediction, target, _Kind(kind, use_stemmer, "recall"))


def rouge_f1(
    prediction: str | Sequence[str], target: str | Sequence[str], kind: str = "rougeL", use_stemmer: bool = False
) -> float | Tensor:
    r"""ROUGE's F1: the harmonic mean of its recall and its precision, the share of the predicted words in the target.

    Source: Lin 2004, as the `rouge-score` package computes it. MUSE (Shi et al. 2024) scores verbatim memorization and
    knowledge memorization by it, with ROUGE-L and without stems. Words are those of `rouge_recall`; but where the
    target is text that `rouge-score` sees all words of, only such words of the prediction count too, so that scores are
    the published ones where a model says letters of other scripts.

    Args:
        prediction: the model's text, or n of them.
        target: the right text, or n of them.
        kind: `"rouge1"`, `"rouge2"`, `"rougeL"` or `"rougeLsum"`.
        use_stemmer: compare Porter stems.

    Returns:
        A float in [0, 1] for two strings, a float64 tensor `[n]` for two lists.

    Raises:
        ValueError: if the kind is unknown, or there are not as many predictions as targets and at least one.
        ImportError: without the `rouge-score` package.

    Example:
        >>> rouge_f1("He wrote the novel in Lima", "The novel")
        0.5
    """
    return _rouge(prediction, target, _Kind(kind, use_stemmer, "fmeasure"))


def has_words(text: str) -> bool:
    """Whether a text has a word for `rouge_recall`, so that a share of its words can be taken.

    Example:
        >>> has_words("In Lima."), has_words("?!")
        (True, False)
    """
    return any(_scorer("rougeL", True, accents)[0].tokenize(text) for accents in (False, True))


class _Kind(NamedTuple):
    kind: str
    use_stemmer: bool
    part: str  # of rouge-score's Score: "recall" or "fmeasure"


def _rouge(prediction: str | Sequence[str], target: str | Sequence[str], how: _Kind) -> float | Tensor:
    if how.kind not in ROUGE_KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(ROUGE_KINDS)}, found {how.kind!r}")
    if isinstance(prediction, str) and isinstance(target, str):
        return _score(prediction, target, how)
    if isinstance(prediction, str) or isinstance(target, str):
        raise ValueError("expected two strings or two lists of strings, found one of each")
    if len(prediction) != len(target) or not prediction:
        raise ValueError(
            f"expected as many predictions as targets, and at least one, found {len(prediction)} and {len(target)}"
        )
    scores = [_score(text, right, how) for text, right in zip(prediction, target, strict=True)]
    return torch.tensor(scores, dtype=torch.float64)


def _score(prediction: str, target: str, how: _Kind) -> float:
    words, scorer = _scorer(how.kind, how.use_stemmer, False)
    if how.part == "fmeasure" and 0 < len(words.tokenize(target)) == len(words.stem(target)):
        scorer = _plain(how.kind, how.use_stemmer)
    elif not words.tokenize(target):
        _, scorer = _scorer(how.kind, how.use_stemmer, True)
    return float(getattr(scorer.score(target, prediction)[how.kind], how.part))


class _Words:
    """The words of a text: those of `rouge-score`, and between them those of other scripts.

    Args:
        stem: From one lower-case word of a-z and 0-9 to its stem, as `rouge-score` has it.
        accents: Whether Latin letters with accents make words too.
    """

    def __init__(self, stem: Callable[[str], Sequence[str]], accents: bool) -> None:
        import regex

        characters = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\uff70"  # the last two lengthen a vowel in any kana
        plain, left_out = ("", "") if accents else ("[a-z0-9]+|", r"a-z0-9\p{Latin}")
        letter = rf"[[[\p{{L}}--\p{{Common}}]\p{{Nd}}]--[{characters}{left_out}]]"
        self.stem = stem
        self.pattern = regex.compile(rf"(?V1){plain}[{characters}]\p{{M}}*|(?:{letter}\p{{M}}*)+")

    def tokenize(self, text: str) -> list[str]:
        """The words in their order; called by `rouge-score`."""
        words: list[str] = []
        for word in self.pattern.findall(text.lower()):
            words += self.stem(word) if word.isascii() else [unicodedata.normalize("NFC", word)]
        return words


@lru_cache(maxsize=16)
def _scorer(kind: str, use_stemmer: bool, accents: bool) -> tuple[_Words, RougeScorer]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise ImportError("ROUGE needs the rouge-score package: pip install rouge-score") from error
    words = _Words(DefaultTokenizer(use_stemmer).tokenize, accents)
    return words, RougeScorer([kind], tokenizer=words)  # pyright: ignore[reportArgumentType] (any object with tokenize)


@lru_cache(maxsize=16)
def _plain(kind: str, use_stemmer: bool) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=use_stemmer)
