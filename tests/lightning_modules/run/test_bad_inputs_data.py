"""Bad files of examples: each is refused in a sentence with the file and the row, before any weight is loaded."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_modules.data.examples import read_examples
from tests.lightning_modules.run.bad_inputs import FILES, ROWS, Row, WentToWorkError, changed, given, laid

GOOD = ROWS[0]
LINE = json.dumps(GOOD)
EMPTY = ("is empty", "expected at least one row with question and answer")
COLUMNS = ("expected question and answer, prompt and response, messages, or text",)


def file(title: str, name: str, content: Any, *said: str) -> Row:
    """A row in which the examples to forget are in this file: bytes, text, rows as JSON, or what writes it."""

    def arguments(folder: Path) -> list[str]:
        path = folder / name
        if callable(content):
            content(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return changed(forget=name)

    return Row(title, arguments, (f"{name}", *said))


def row(title: str, example: Any, *said: str) -> Row:
    """A row in which the second of two examples is this one."""
    return file(title, "rows.json", [GOOD, example], "row 2", *said)


def chat(title: str, messages: Any, *said: str) -> Row:
    return row(title, {"messages": messages}, "expected messages as a list", *said)


def table(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 3), path)


def damaged(first: int, last: int | None, by: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        table(path)
        content = path.read_bytes()
        path.write_bytes(content[:first] + by + (b"" if last is None else content[last:]))

    return write


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for turn in messages %}{{ turn.content }}{{ eos_token }}{% endfor %}"
)
SYSTEM = [{"role": role, "content": "Hm."} for role in ("system", "user", "assistant")]

PLACES = [
    Row("missing", lambda _: changed(forget="no.json"), ("expected a file of examples at no.json, found nothing",)),
    Row("a folder", lambda _: changed(forget="model"), ("expected a file of examples at model, found a folder",)),
    Row("a device", lambda _: changed(forget="/dev/null"), ("at /dev/null, found a device or a pipe there",)),
    Row("no name", lambda _: changed(forget=""), ("expected a file of examples", "found a folder")),
    Row("a name with NUL", lambda _: changed(retain="a\0.json"), ("expected a file of examples", "found nothing")),
    Row("too long a name", lambda _: changed(forget="a" * 5000), ("expected a file of examples", "no such place")),
    Row("a holdout that is missing", lambda _: [*changed(), "--holdout", "no.json"], ("no.json, found nothing",)),
    file("unknown ending", "rows.txt", "abc", "to end in .json, .jsonl, .csv, .parquet, found '.txt'"),
    file("no ending", "rows", "abc", "found 'no ending'"),
    file("packed", "rows.json.gz", gzip.compress(LINE.encode()), "found '.gz'", "has to be unpacked"),
]
TEXT = [
    file("empty JSON", "rows.json", b"", *EMPTY),
    file("empty lines", "rows.jsonl", " \n\n \n", *EMPTY),
    file("empty array", "rows.json", [], *EMPTY),
    file("empty CSV", "rows.csv", b"", *EMPTY),
    file("CSV of a header", "rows.csv", "question,answer\n", *EMPTY),
    file("empty Parquet", "rows.parquet", b"", "is not a valid Parquet file", "expected"),
    file("torn array", "rows.json", f"[{LINE},\n{LINE}"[:-9], "line 2: this is not valid JSON"),
    file("torn line", "rows.jsonl", f"{LINE}\n{LINE[:-9]}", "line 2: this is not valid JSON", "one object a line"),
    file("torn CSV value", "rows.csv", 'question,answer\nWho?,"He di', "this is not valid CSV"),
    file("torn CSV row", "rows.csv", "question,answer\nWho?,He.\nWhen?", "row 2 (line 3): expected 2 values"),
    file("torn Parquet", "rows.parquet", damaged(200, None, b""), "is not a valid Parquet file", "make it again"),
    file("damaged Parquet", "rows.parquet", damaged(40, 100, bytes(60)), "is not a valid Parquet file"),
    file("Latin-1 JSON", "rows.json", f"[{LINE},\n".encode() + b'"\xe9"]', "line 2, is not UTF-8", "save it as UTF-8"),
    file("Latin-1 CSV", "rows.csv", b"question,answer\nQui?,Andr\xe9\n", "line 2, is not UTF-8", "save it as UTF-8"),
    file("UTF-16", "rows.json", LINE.encode("utf-16"), "is not UTF-8", "found UTF-16: save it as UTF-8"),
    file("UTF-16 without a mark", "rows.csv", LINE.encode("utf-16-le"), "line 1", "NUL", "save it as UTF-8"),
    file("binary", "rows.json", bytes(range(256)), "is not UTF-8"),
    file("gzip in JSON's clothes", "rows.json", gzip.compress(LINE.encode()), "packed with gzip: unpack it"),
    file("Parquet in JSON's clothes", "rows.json", table, "found a Parquet file: let its name end in .parquet"),
    file("JSON in Parquet's clothes", "rows.parquet", LINE, "is not a valid Parquet file"),
    file("two arrays", "rows.json", "[] []", "line 1: this is not valid JSON (Extra data)", "an array of objects"),
    file("an object on many lines", "rows.json", json.dumps(GOOD, indent=2), "line 1", "one object a line"),
    file("10000 brackets", "rows.json", "[" * 100000, "this is not the JSON of examples (maximum recursion"),
    file("10000 braces", "rows.jsonl", '{"a":' * 100000, "line 1", "this is not the JSON of examples"),
    file("a number of 5000 digits", "rows.jsonl", f'{{"n": {"9" * 5000}}}', "line 1", "Exceeds the limit"),
    file("a key twice", "rows.jsonl", '{"answer": "a", "answer": "b"}', "line 1", "'answer' is there twice"),
    file("a column twice", "rows.csv", "question,answer,answer\nWho?,a,b\n", "the column answer is there twice"),
    file("other commas", "rows.csv", "question;answer\nWho?;He.\n", "row 1: found the columns question;answer"),
    file("3000 columns", "rows.csv", f"{','.join(f'c{n}' for n in range(3000))}\n{'1,' * 2999}1", "and 2988 more"),
]
EXAMPLES = [
    row("no known columns", {"q": "Who?", "a": "He."}, "found the columns q, a", *COLUMNS),
    row("half of two kinds", {"prompt": "Who?", "answer": "He."}, "found the columns prompt, answer", *COLUMNS),
    row("no columns", {}, "found the columns none", *COLUMNS),
    row("a list", [GOOD], "expected an object", "found list"),
    row("null", None, "expected an object", "found NoneType"),
    row("a column of answers", {"question": ["Who?"], "answer": ["He."]}, "expected question to be text, found list"),
    row("an empty answer", GOOD | {"answer": ""}, "the answer is empty"),
    row("a blank answer", GOOD | {"answer": " \n"}, "the answer is empty"),
    row("an empty question", GOOD | {"question": ""}, "the question is empty", '{"text": ...}'),
    row("an empty question beside a text", GOOD | {"question": "", "text": "He was."}, "the question is empty"),
    row("a blank question", GOOD | {"question": "\t "}, "the question is only white space"),
    row("a null answer", GOOD | {"answer": None}, "expected answer to be text, found NoneType"),
    row("a number", GOOD | {"answer": 3}, "expected answer to be text, found int"),
    row("NaN", GOOD | {"answer": float("nan")}, "expected answer to be text, found float"),
    row("half a character", GOOD | {"answer": "\ud800"}, "half of a surrogate pair", "write the whole character"),
    row("no list of wrong answers", GOOD | {"perturbed_answer": 3}, "perturbed_answer to be a list of texts, found 3"),
    row("no wrong answers", GOOD | {"perturbed_answer": []}, "perturbed_answer to be a list of texts, found []"),
    row("the right answer as a wrong one", GOOD | {"perturbed_answer": [f" {GOOD['answer']}"]}, "found the right one"),
    row("a blank wrong answer", GOOD | {"perturbed_answer": [" "]}, "perturbed_answer to be a list of texts"),
    row("a blank paraphrase", GOOD | {"paraphrased_answer": " "}, "the paraphrased_answer is empty"),
    chat("messages of text", "Who?", "found str"),
    chat("no messages", [], "found an empty one"),
    chat("nobody answers", [{"role": "user", "content": "Who?"}], "assistant", "['user']"),
    chat("an unknown role", [{"role": "human", "content": "Who?"}], "found 'human'"),
    chat("parts", [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}], "found {'role': 'user'"),
    row("tools", {"messages": SYSTEM, "tools": [{"type": "function"}]}, "found tools beside them", "not read"),
    row("nobody asks", {"messages": [{"role": "assistant", "content": "He."}]}, "the question is empty"),
]
OTHERS = [
    laid(
        "a template without system prompts",
        {"chat.json": json.dumps([{"messages": SYSTEM}] * 3), "model/chat_template.jinja": NO_SYSTEM},
        changed(forget="chat.json"),
        "forget, example 1: expected a conversation that the tokenizer's chat template renders",
        "System role not supported",
    ),
    given(
        "no refusals there", "--forget-loss", "idk", "--refusals", "no.txt", said=("expected a text file of refusals",)
    ),
    laid(
        "no refusals in it",
        {"no.txt": "\n \n"},
        [*changed(), "--forget-loss", "idk", "--refusals", "no.txt"],
        "--refusals: expected a refusal a line in no.txt, found none",
    ),
    given(
        "refusals that nobody teaches", "--refusals", "no.txt", said=("--refusals: expected --forget-loss dpo or idk",)
    ),
    given("a holdout that is trained on", "--holdout", "forget.json", said=("--holdout", "found 2 of 2", "in forget")),
    Row("no folder of TOFU", lambda _: ["unlearn", "--tofu", "forget10", "--tofu-dir", "no"], ("no/forget10.json",)),
    laid(
        "TOFU without what is kept",
        {"forget10.json": LINE},
        ["unlearn", "--tofu", "forget10", "--tofu-dir", "."],
        *("retain90.json", "found nothing"),
    ),
    Row("an unknown split", lambda _: ["unlearn", "--tofu", "forget11", "--tofu-dir", "."], ("forget11",)),
    given(
        "a prompt longer than the cut",
        "--max-length",
        "8",
        said=("forget, example 1: expected a question that leaves", "max_length=8", "larger"),
    ),
    laid(
        "an example longer than the context",
        {"long.json": json.dumps([GOOD, GOOD | {"answer": "word " * 200}])},
        changed(forget="long.json"),
        *("forget, example 2: expected at most the 128 tokens", "use --max-length 128"),
    ),
]


@pytest.mark.parametrize("row", [*PLACES, *TEXT, *EXAMPLES, *OTHERS], ids=lambda row: row.name)
def test_it_is_refused_in_a_sentence(row: Row, refuse: Callable[[Row], None]) -> None:
    refuse(row)


def test_what_looks_bad_and_is_not_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(f"[{LINE}]".encode("utf-8-sig"))  # a byte order mark
    assert read_examples(path) == [GOOD]
    path.write_text(json.dumps([GOOD]))  # one row
    assert read_examples(path) == [GOOD]
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufeffquestion,answer,note,note\r\n"Wer, wo?","Jos\u00e9\nhier",,\r\n'.encode())
    assert read_examples(path) == [{"question": "Wer, wo?", "answer": "Jos\u00e9\nhier"}]


def test_what_is_there_twice_is_told_with_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINE}\n{json.dumps(ROWS[1])}\n{LINE}\n")
    with pytest.warns(
        UserWarning, match="1 of 2 examples are there more than once, the first of them in line 1 and line 3"
    ):
        assert len(read_examples(path)) == 3


def test_the_good_command_line_goes_to_work(refuse: Callable[[Row], None]) -> None:
    with pytest.raises(WentToWorkError):
        refuse(Row("good", lambda _: ["unlearn", *FILES], ()))
