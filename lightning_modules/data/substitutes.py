"""Substitute answers: what a model that never knew might say to the forget questions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_modules.data.examples import Example, answered


def substituted(forget: Sequence[Example], retain: Sequence[Example], count: int = 5) -> list[list[Example]]:
    """Every forget question with the answers to the retain questions that are most like it.

    Alike are questions that share words: the number of common words over that of all words of both (Jaccard). Such an
    answer has the form that the question asks for, and tells of somebody else. It is on the retain set, so that nothing
    is learned from it but to say it here. An answer that is the one to forget, but for upper case and white space at
    its ends, is left out.

    Args:
        forget: n examples.
        retain: m examples; where there are fewer than `count`, all of them.
        count: Answers for each question.

    Returns:
        For every forget example up to `count`, the most similar first and of equals the first; fewer where there are no
        more.

    Raises:
        ValueError: If there is no retain example, the count is below 1, or an example to forget has no question or no
            other answer.

    Cost: n times m comparisons of sets of words; a second for a million of them.

    Example:
        >>> forget = [{"question": "Where was Ada born?", "answer": "In Ros."}]
        >>> retain = [{"question": "What does Bo write?", "answer": "Odes."}]
        >>> retain += [{"question": "Where was Cy born?", "answer": "In Pel."}]
        >>> [[row["answer"] for row in rows] for rows in substituted(forget, retain, 1)]
        [['In Pel.']]
    """
    if count < 1 or not retain:
        raise ValueError(
            f"substitutes: expected retain examples and a count >= 1, found {len(retain)} and {count}; whose answers are to be said?"
        )
    words = [_words(row) for row in retain]
    secret: dict[str, set[str]] = {}
    for row in forget:
        secret.setdefault(row["question"], set()).add(_bare(row["answer"]))
    found: list[list[Example]] = []
    for row in forget:
        mine = _words(row)
        if not mine:
            raise ValueError(
                f"substitutes: expected examples with a question, found {row['answer']!r:.80} without one; --finish-steps 0 and "
                "--substitute-weight 0 go without"
            )
        alike = [len(mine & other) / len(mine | other) for other in words]
        other = [place for place, kept in enumerate(retain) if _bare(kept["answer"]) not in secret[row["question"]]]
        if not other:
            raise ValueError(
                f"substitutes: expected retain answers other than the one to forget, found none to {row['question']!r:.80}; give others "
                "by --substitutes, or go without (--finish-steps 0, --substitute-weight 0)"
            )
        nearest = sorted(other, key=lambda place: -alike[place])[:count]
        found.append([answered(row, retain[place]["answer"]) for place in nearest])
    return found


def other_answers(
    forget: Sequence[Example], retain: Sequence[Example], given: Sequence[Example] | None = None
) -> list[list[Example]]:
    """For every forget example its question, with the turns before it, and other answers.

    Args:
        forget: n examples.
        retain: Where the answers come from if none are given, see `substituted`.
        given: The forget questions with other answers, one or more for each, in any order.

    Returns:
        n lists.

    Raises:
        ValueError: If the answers given are not those of the forget questions, or none are given and `substituted`
            finds none.

    Example:
        >>> forget = [{"question": "Where was Ada born?", "answer": "In Ros."}]
        >>> given = [{"question": "Where was Ada born?", "answer": "In Pel."}]
        >>> [[row["answer"] for row in rows] for rows in other_answers(forget, [], given)]
        [['In Pel.']]
    """
    if given is None:
        return substituted(forget, retain)
    check_substitutes(given, forget)
    answers: dict[str, list[str]] = {}
    for row in given:
        answers.setdefault(row["question"], []).append(row["answer"])
    return [[answered(row, answer) for answer in answers[row["question"]]] for row in forget]


def check_substitutes(substitutes: Sequence[Example], forget: Sequence[Example]) -> None:
    """Refuse substitute answers that are not those of the forget questions.

    Raises:
        ValueError: If one is to another question, is the answer that is to be forgotten, or a question has none.
    """
    questions = {row["question"] for row in forget}
    answers = {(row["question"], _bare(row["answer"])) for row in forget}
    given = {row["question"] for row in substitutes}
    for problem, rows in (
        ("to a question that is not in the forget set", sorted(given - questions)),
        ("none to a question of the forget set", sorted(questions - given)),
        (
            "the answer that is to be forgotten",
            [row["question"] for row in substitutes if (row["question"], _bare(row["answer"])) in answers],
        ),
    ):
        if rows:
            raise ValueError(
                f"substitutes: expected other answers to every forget question and to no other, found {problem}, {rows[0]!r:.80}, "
                f"and {len(rows) - 1} more such"
            )


def _words(row: Example) -> set[str]:
    return set(re.findall(r"\w+", row["question"].lower()))


def _bare(answer: str) -> str:
    return answer.strip().casefold()
