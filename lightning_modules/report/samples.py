"""Questions with what the models say to them: which are shown, and what counts as a degenerate text."""

from __future__ import annotations

from typing import NamedTuple

from lightning_modules.report.run import MODELS, Run

# Fewer words than this repeat themselves by chance.
_FEW_WORDS = 6
_GOLDEN = (5.0**0.5 - 1.0) / 2.0


class Sample(NamedTuple):
    """A question, its right answer, and what each model says to it."""

    question: str
    answer: str
    said: dict[str, str]


def samples(run: Run, split: str, count: int = 4) -> list[Sample]:
    """Questions spread over those of the split, whatever is said to them; fewer if there are fewer.

    Of n questions in their order, the first different ones of floor(n frac(i g)), i = 1, 2, ..., g the golden ratio. That sequence
    spreads evenly, and is not in step with a file that repeats its kinds of question, as equal distances would be.
    """
    rows = run.rows("after", split)
    spread = dict.fromkeys(int(len(rows) * (step * _GOLDEN % 1.0)) for step in range(1, 20 * count)) if rows else {}
    others = {
        model: {(row["question"], row["answer"]): row["generation"] for row in reversed(run.rows(model, split))}
        for model in MODELS
    }
    found: list[Sample] = []
    for index in sorted(list(spread)[:count]):
        key = rows[index]["question"], rows[index]["answer"]
        said = {**{model: others[model].get(key) for model in MODELS}, "after": rows[index]["generation"]}
        texts = {model: text for model, text in said.items() if text is not None}
        if "after" in texts:
            found.append(Sample(*key, texts))
    return found


def is_degenerate(text: str) -> bool:
    """Whether a text is empty, or has six words or more and says over half of its sequences of three words again.

    Example:
        >>> is_degenerate(""), is_degenerate("Hana Hana Hana Hana Hana Hana"), is_degenerate("She was born in a small town.")
        (True, True, False)
    """
    words = text.split()
    if len(words) < _FEW_WORDS:
        return not words
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) < len(triples) / 2


def degenerate(run: Run, model: str, split: str) -> tuple[int, int] | None:
    """How many of how many generations are degenerate; None where there are none."""
    texts = [row["generation"] for row in run.rows(model, split) if row["generation"] is not None]
    return (sum(map(is_degenerate, texts)), len(texts)) if texts else None
