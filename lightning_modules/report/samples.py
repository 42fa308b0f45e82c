"""Which questions the report shows with the models' answers, and which texts count as degenerate."""

from __future__ import annotations

import re
from typing import NamedTuple

from lightning_modules.report.finished import MODELS, FinishedRun

# Texts with fewer words than this repeat themselves by chance.
_FEW_WORDS = 6
# A piece that follows itself at least three times, as what a model without spaces between its tokens repeats.
_REPEATED = re.compile(r"(.{1,40}?)\1{3,}", re.DOTALL)
_FEW_SIGNS = 20
_GOLDEN = (5.0**0.5 - 1.0) / 2.0


class Sample(NamedTuple):
    """A question, its right answer, and what each model says to it."""

    question: str
    answer: str
    said: dict[str, str]


def samples(run: FinishedRun, split: str, count: int = 4) -> list[Sample]:
    """Returns up to `count` questions with their answers, chosen by their place in the split alone.

    From n questions it takes the first different places floor(n frac(i g)) for i = 1, 2, ..., with g the golden ratio.
    They cover the split evenly. Equal distances would do so too, but in a file that repeats its kinds of question they
    could hit the same kind each time.
    """
    rows = run.rows("after", split)
    places = dict.fromkeys(int(len(rows) * (step * _GOLDEN % 1.0)) for step in range(1, 20 * count)) if rows else {}
    others = {
        model: {(row["question"], row["answer"]): row["generation"] for row in reversed(run.rows(model, split))}
        for model in MODELS
    }
    found: list[Sample] = []
    for index in sorted(list(places)[:count]):
        key = rows[index]["question"], rows[index]["answer"]
        said = {**{model: others[model].get(key) for model in MODELS}, "after": rows[index]["generation"]}
        texts = {model: text for model, text in said.items() if text is not None}
        if "after" in texts:
            found.append(Sample(*key, texts))
    return found


def is_degenerate(text: str) -> bool:
    """Whether a text is empty or repeats itself.

    It does where it has at least six words, and over half of its sequences of three words are repetitions; and where
    over half of its signs, at least 20, are one piece of up to 40 signs that follows itself three times or more.

    Example:
        >>> [is_degenerate(text) for text in ("", "Hana Hana Hana Hana Hana Hana", "She was born in a small town.")]
        [True, True, False]
        >>> is_degenerate("AnnaCarlCarlCarlCarlCarlCarl"), is_degenerate("In Ros ...")
        (True, False)
    """
    longest = max((len(found.group()) for found in _REPEATED.finditer(text)), default=0)
    if longest >= _FEW_SIGNS and 2 * longest > len(text):
        return True
    words = text.split()
    if len(words) < _FEW_WORDS:
        return not words
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) < len(triples) / 2


def degenerate(run: FinishedRun, model: str, split: str) -> tuple[int, int] | None:
    """Returns the number of degenerate generations and the number of all; None where there is no generation."""
    texts = [row["generation"] for row in run.rows(model, split) if row["generation"] is not None]
    return (sum(map(is_degenerate, texts)), len(texts)) if texts else None
