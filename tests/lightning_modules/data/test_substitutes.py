"""Substitute answers: those of the questions that share most words, against a slow count."""

from __future__ import annotations

from itertools import chain

import pytest

from lightning_modules.data.examples import Example
from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.data.substitutes import check_substitutes, other_answers, substituted


def slow(question: str, others: list[str]) -> list[float]:
    """The Jaccard similarity, word by word."""

    def words(text: str) -> list[str]:
        kept = "".join(sign if sign.isalnum() else " " for sign in text.lower())
        return list(dict.fromkeys(kept.split()))

    mine, found = words(question), list[float]()
    for other in map(words, others):
        common = [word for word in mine if word in other]
        found.append(len(common) / (len(mine) + len(other) - len(common)))
    return found


def test_they_answer_the_questions_that_share_most_words() -> None:
    rows = fictional_authors(6)
    forget, retain = rows[100:], rows[:100]
    found = substituted(forget, retain, 5)
    assert len(found) == len(forget)
    questions = [row["question"] for row in retain]
    for number, row in enumerate(forget):
        alike = slow(row["question"], questions)
        chosen = found[number]
        assert len(chosen) == 5
        assert {each["question"] for each in chosen} == {row["question"]}
        best = sorted(alike, reverse=True)[:5]
        of_answer: dict[str, float] = {}
        for other, similarity in zip(retain, alike, strict=True):
            of_answer[other["answer"]] = max(similarity, of_answer.get(other["answer"], 0.0))
        assert sorted((of_answer[each["answer"]] for each in chosen), reverse=True) == pytest.approx(best)
    assert [len(rows) for rows in substituted(forget, retain[:3], 5)] == [3] * len(forget)
    check_substitutes([*chain(*found)], forget)


def test_what_is_no_substitute_is_refused() -> None:
    row = {"question": "Where was Ada born?", "answer": "In Ros."}
    other = {"question": "Where was Bo born?", "answer": "In Pel."}
    with pytest.raises(ValueError, match="expected retain examples and a count >= 1, found 0 and 5"):
        substituted([row], [])
    with pytest.raises(ValueError, match=r"expected examples with a question, found 'In Ros\.' without one"):
        substituted([row | {"question": ""}], [other])
    for wrong, said in (
        ([other], "to a question that is not in the forget set"),
        ([], "none to a question of the forget set"),
        ([row], "the answer that is to be forgotten"),
    ):
        with pytest.raises(ValueError, match=said):
            check_substitutes(wrong, [row])
    check_substitutes([row | {"answer": "In Pel."}], [row])


def test_the_answer_to_forget_is_no_substitute() -> None:
    forget = [
        {"question": "Was Ada Pel convicted?", "answer": "Yes."},
        {"question": "Where is Ada Pel?", "answer": "Ros"},
    ]
    retain = [{"question": "Was Bo Ros convicted?", "answer": " yes. "}, {"question": "Was he?", "answer": "No."}]
    found = substituted(forget, retain)
    assert [[row["answer"] for row in rows] for rows in found] == [["No."], [" yes. ", "No."]]
    check_substitutes([*chain(*found)], forget)
    with pytest.raises(
        ValueError, match="expected retain answers other than the one to forget, found none to 'Was Ada"
    ):
        substituted(forget, retain[:1])
    with pytest.raises(ValueError, match="the answer that is to be forgotten"):
        check_substitutes([*chain(*found), forget[0] | {"answer": "YES. "}], forget)


def test_answers_given_stand_beside_the_example_that_they_answer() -> None:
    turns = [{"role": "user", "content": "Where was Ada born?"}, {"role": "assistant", "content": "In Ros."}]
    first: Example = {"question": "Where was Ada born?", "answer": "In Ros.", "messages": turns}
    again: Example = {**first, "answer": "In Ros, in May."}
    other: Example = {"question": "Where was Bo born?", "answer": "In Pel."}
    given: list[Example] = [
        {"question": other["question"], "answer": "In Ulm."},
        {"question": first["question"], "answer": "In Bonn."},
        {"question": first["question"], "answer": "In Kiel."},
    ]
    found = other_answers([first, other, again], [], given)
    assert [[row["answer"] for row in rows] for rows in found] == [
        ["In Bonn.", "In Kiel."],
        ["In Ulm."],
        ["In Bonn.", "In Kiel."],
    ]
    assert [len(row.get("messages", ())) for row in chain(*found)] == [2, 2, 0, 2, 2]
    assert other_answers([first], [other]) == substituted([first], [other])
