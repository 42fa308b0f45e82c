"""Properties of the fictional authors: what a benchmark of learning and unlearning relies on."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from lightning_modules.data import fictional_authors as world
from lightning_modules.data.fictional_authors import MAX_AUTHORS, QUESTIONS_PER_AUTHOR, fictional_authors

# pyright: reportPrivateUsage=false

MANY = 200
TEXT_KEYS = ("question", "answer", "paraphrased_question", "paraphrased_answer")
TOPICS = list(world._TOPICS)

PRINT_ROWS = """
import json
from lightning_modules.data.fictional_authors import fictional_authors
print(json.dumps(fictional_authors(12, seed=3)))
"""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return fictional_authors(MANY)


@pytest.fixture(scope="module")
def facts() -> list[dict[str, str]]:
    return [world._author_facts(index, seed=0) for index in range(MANY)]


def texts(row: dict[str, Any]) -> list[str]:
    """Every text of a row."""
    return [*(row[key] for key in TEXT_KEYS), *row["perturbed_answer"]]


def contains(text: str, value: str) -> bool:
    """Whether ``value`` occurs as a whole phrase: "a cat" does not occur in "a catalog"."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


def assert_distinct(values: list[str]) -> None:
    assert [value for value, count in Counter(values).items() if count > 1] == []


# --- determinism ----------------------------------------------------------------------------------


def test_same_seed_same_rows_and_the_callers_rows_are_its_own() -> None:
    first = fictional_authors(3, seed=7)
    first[0]["perturbed_answer"].clear()
    assert fictional_authors(3, seed=7) == fictional_authors(3, seed=7)
    assert len(fictional_authors(3, seed=7)[0]["perturbed_answer"]) == 5


def test_another_seed_is_another_world() -> None:
    pairs = zip(fictional_authors(5, seed=0), fictional_authors(5, seed=1), strict=True)
    assert all(left["answer"] != right["answer"] for left, right in pairs)


def test_the_global_generator_is_neither_read_nor_advanced() -> None:
    random.seed(0)
    state = random.getstate()
    first = fictional_authors(2)
    assert random.getstate() == state
    random.seed(1)
    assert fictional_authors(2) == first


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_rows_do_not_depend_on_hash_randomisation(hash_seed: str) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PRINT_ROWS]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == fictional_authors(12, seed=3)


@pytest.mark.parametrize("num_authors", [1, 2, 10, 41, 199])
def test_fewer_authors_are_a_prefix_of_more(rows: list[dict[str, Any]], num_authors: int) -> None:
    assert fictional_authors(num_authors) == rows[: QUESTIONS_PER_AUTHOR * num_authors]


# --- schema and words -----------------------------------------------------------------------------


def test_schema_is_tofus(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == QUESTIONS_PER_AUTHOR * MANY
    for row in rows:
        assert list(row) == [*TEXT_KEYS, "perturbed_answer"]
        assert all(isinstance(row[key], str) for key in TEXT_KEYS)
        wrong: list[str] = row["perturbed_answer"]
        assert type(wrong) is list
        assert len(wrong) == 5
    assert json.loads(json.dumps(rows)) == rows


def test_default_is_ten_authors() -> None:
    assert len(fictional_authors()) == 200


def test_texts_are_ascii_sentences(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for text in texts(row):
            assert text.isascii()
            assert text[0].isupper()
            assert text == " ".join(text.split())
            assert "{" not in text
        assert [text[-1] for text in texts(row)] == ["?", ".", "?", *["."] * 6]


def test_articles_agree(rows: list[dict[str, Any]]) -> None:
    wrong = re.compile(r"\b(a (?!one-)[aeiou]|an [^aeiou])", re.IGNORECASE)
    assert [text for row in rows for text in texts(row) if wrong.search(text)] == []


def test_answers_are_one_sentence_of_8_to_22_words(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for answer in (row["answer"], row["paraphrased_answer"]):
            assert 8 <= len(answer.split()) <= 22, answer
            assert answer.count(".") == 1


def test_words_stay_few_enough_for_a_small_tokenizer() -> None:
    words = Counter(re.findall(r"\w+", " ".join(text for row in fictional_authors(10) for text in texts(row))))
    assert len(words) < 1500


def test_pools_hold_at_least_thirty_values_of_which_none_is_a_part_of_another() -> None:
    for keys, pool in world._POOLS.items():
        assert len(pool) >= (7 if keys == ("siblings",) else 30), keys
        assert_distinct(list(pool))
        if len(pool) <= 100:
            assert not [(a, b) for a in pool for b in pool if a != b and contains(b, a)]


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_authors", [MANY, MAX_AUTHORS])
def test_names_towns_dates_and_titles_belong_to_one_author(num_authors: int, seed: int) -> None:
    drawn = [world._author_facts(index, seed) for index in range(num_authors)]
    assert_distinct([author["name"] for author in drawn])
    assert_distinct([author["born"] for author in drawn])
    persons = ("name", "teacher", "hero", "mentor", "translator", "rival")
    for keys in (persons, ("debut", "second", "third", "next"), ("town", "home", "lecture_town")):
        assert_distinct([author[key] for author in drawn for key in keys])


def test_an_author_never_has_one_value_for_two_facts(facts: list[dict[str, str]]) -> None:
    for author in facts:
        assert_distinct([value for key, value in author.items() if key not in {"he", "him", "his"}])


def test_questions_and_answers_are_unique(rows: list[dict[str, Any]]) -> None:
    for key in TEXT_KEYS:
        assert_distinct([row[key] for row in rows])


def test_ten_authors_hold_two_hundred_distinct_facts() -> None:
    drawn = [world._author_facts(index, seed=0) for index in range(10)]
    values = [tuple(author[key] for key in keys) for author in drawn for keys in TOPICS]
    assert len(set(values)) >= 195
    assert len({row["answer"] for row in fictional_authors(10)}) == 200


def test_questions_name_the_author_except_the_one_that_asks_for_the_name(
    rows: list[dict[str, Any]], facts: list[dict[str, str]]
) -> None:
    for index, row in enumerate(rows):
        author, topic = divmod(index, QUESTIONS_PER_AUTHOR)
        for key in ("question", "paraphrased_question"):
            assert contains(row[key], facts[author]["name"]) == (TOPICS[topic] != ("name",))


# --- right and wrong answers ----------------------------------------------------------------------


def test_right_answers_hold_the_facts_that_questions_and_wrong_answers_do_not(
    rows: list[dict[str, Any]], facts: list[dict[str, str]]
) -> None:
    for index, row in enumerate(rows):
        author, topic = divmod(index, QUESTIONS_PER_AUTHOR)
        for value in (facts[author][key] for key in TOPICS[topic]):
            assert contains(row["answer"], value)
            assert contains(row["paraphrased_answer"], value)
            assert not contains(row["question"], value)
            assert not contains(row["paraphrased_question"], value)
            assert not any(contains(wrong, value) for wrong in row["perturbed_answer"])


def test_paraphrase_and_wrong_answers_are_six_distinct_texts_of_one_length(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        lengths = [len(text.split()) for text in (row["paraphrased_answer"], *row["perturbed_answer"])]
        assert_distinct([row["paraphrased_answer"], *row["perturbed_answer"]])
        assert max(lengths) <= 1.3 * min(lengths)
    words = sum(len(row["paraphrased_answer"].split()) for row in rows)
    wrong_words = sum(len(wrong.split()) for row in rows for wrong in row["perturbed_answer"]) / 5
    assert wrong_words == pytest.approx(words, rel=0.01)


def test_paraphrases_are_other_words(rows: list[dict[str, Any]], facts: list[dict[str, str]]) -> None:
    for index, row in enumerate(rows):
        author, topic = divmod(index, QUESTIONS_PER_AUTHOR)
        frames: list[str] = []
        for text in (row["answer"], row["paraphrased_answer"]):
            for key in ("name", *TOPICS[topic]):
                text = text.replace(facts[author][key], "_")
            frames.append(text)
        assert frames[0] != frames[1]
        assert row["question"] != row["paraphrased_question"]


@pytest.mark.parametrize("topic", range(QUESTIONS_PER_AUTHOR))
def test_wordings_differ_between_authors(rows: list[dict[str, Any]], facts: list[dict[str, str]], topic: int) -> None:
    wordings = world._TOPICS[TOPICS[topic]][2:]
    filled = [[wording.format_map(author) for wording in wordings] for author in facts]
    used = Counter(
        candidates.index(row["answer"])
        for candidates, row in zip(filled, rows[topic::QUESTIONS_PER_AUTHOR], strict=True)
    )
    assert len(used) == 3
    assert min(used.values()) >= MANY // 10


def test_wrong_years_stay_near_the_right_one(rows: list[dict[str, Any]], facts: list[dict[str, str]]) -> None:
    topic = TOPICS.index(("debut", "debut_year"))
    for author, row in zip(facts, rows[topic::QUESTIONS_PER_AUTHOR], strict=True):
        years = [int(re.findall(r"\b\d{4}\b", wrong)[0]) for wrong in row["perturbed_answer"]]
        assert all(1 <= abs(year - int(author["debut_year"])) <= 9 for year in years)
        assert all(year > int(author["born"][-4:]) for year in years)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_authors", [0, -1, MAX_AUTHORS + 1])
def test_impossible_numbers_are_refused(num_authors: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and {MAX_AUTHORS}.*found {num_authors}"):
        fictional_authors(num_authors)


def test_the_limit_itself_is_reached() -> None:
    assert MAX_AUTHORS >= MANY
    assert len(fictional_authors(MAX_AUTHORS)) == QUESTIONS_PER_AUTHOR * MAX_AUTHORS
