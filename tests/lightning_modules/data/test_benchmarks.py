"""Benchmarks in the layouts in which they are published: from a folder and from the hub; long texts in pieces."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_modules as lm
from lightning_modules.data.muse import muse_examples
from lightning_modules.data.pieces import pieces
from lightning_modules.data.published import PublishedSplit, published_rows
from lightning_modules.data.tasks import CHOICE, CONTINUATION, MEMBERSHIP, TASK, apart
from lightning_modules.data.tokenization import encode
from lightning_modules.data.wmdp import wmdp_questions, wmdp_texts
from lightning_modules.training import scratch
from tests.lightning_modules.small_benchmarks import article, write_json, write_muse, write_wmdp

TOKENIZER = scratch._train_tokenizer([article(0, "feast"), "Le vif zéphyr. 北京"])


@pytest.fixture(scope="module")
def muse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_muse(tmp_path_factory.mktemp("muse"))


@pytest.fixture(scope="module")
def wmdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wmdp(tmp_path_factory.mktemp("wmdp"))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab zé北 \n\t.", max_size=300), st.integers(7, 40))
def test_the_pieces_are_the_text_and_none_is_too_long(text: str, longest: int) -> None:
    found = pieces(TOKENIZER, text, longest)
    assert "".join(found) == text
    assert all(len(encode(TOKENIZER, "", piece).input_ids) <= longest for piece in found)


def test_pieces_end_between_words_and_are_as_long_as_they_can_be() -> None:
    text = article(3, "feast", 30)
    found = pieces(TOKENIZER, text, 50)
    assert all(piece.startswith(" ") and not piece.endswith(" ") for piece in found[1:])
    longest_word = max(len(TOKENIZER(f" {word}")["input_ids"]) for word in text.split())
    assert all(len(encode(TOKENIZER, "", piece).input_ids) > 50 - longest_word for piece in found[:-1])
    with pytest.raises(ValueError, match="expected a max_length that has room"):
        pieces(TOKENIZER, "北", 3)


def test_muse_trains_on_forget_and_retain1_and_keeps_the_other_texts_for_scoring(muse: Path) -> None:
    data = lm.MUSEDataModule("news", TOKENIZER, folder=muse, max_length=64, batch_size=2)
    data.setup()
    for split, what, count in (("forget", "feast", 3), ("retain", "fair", 4)):
        text = "".join(row["answer"] for row in data.splits[split])
        assert text == "".join(article(number, what) for number in range(count))
        assert all(row["question"] == "" for row in data.splits[split])
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"forget", "retain"}
    assert batch["forget"]["input_ids"].shape[1] <= 64
    assert len(data.dataset.forget) == len(data.splits["forget"])
    kinds = {split: rows[0][TASK] for split, rows in apart(data.splits)[1].items()}
    assert kinds == {
        **dict.fromkeys(("verbmem_forget", "knowmem_forget", "knowmem_retain"), CONTINUATION),
        **dict.fromkeys(("privleak_forget", "privleak_holdout"), MEMBERSHIP),
    }
    row = data.splits["knowmem_retain"][1]
    assert row["prompt"] == (
        "Question: What stood open on day 0 of the old fair?\nAnswer: The harbour.\n\n"
        "Question: What stood open on day 1 of the old fair?\nAnswer: The mill.\n\n"
        "Question: What stood open on day 1 of the fair?\nAnswer: "
    )


def test_wmdp_trains_on_the_beginning_of_each_text_and_leaves_titles_out(wmdp: Path, tmp_path: Path) -> None:
    data = lm.WMDPDataModule("cyber", TOKENIZER, folder=wmdp, max_length=50)
    splits = data.read()
    assert {split: len(rows) for split, rows in splits.items()} == {
        "forget": 4,
        "retain": 5,
        "wmdp_cyber": 10,
        "mmlu": 12,
    }
    for number, row in enumerate(splits["retain"]):
        assert row["answer"] == pieces(TOKENIZER, article(number, "fair", 30), 50)[0]
    assert splits["mmlu"][0][TASK] == CHOICE
    prompts = {row["prompt"] for row in splits["mmlu"]}
    assert (
        "The following are multiple choice questions (with answers) about high school bells.\n\n"
        "Where does the high_school_bells of house 1 stand?\n"
        "A. At the mill\nB. At the chapel\nC. At the market\nD. At the tower\nAnswer:"
    ) in prompts
    texts = [{"text": article(9, "theft", 3)}]
    write_json(tmp_path / "forget.json", texts)
    write_json(tmp_path / "retain.json", [*texts, {"question": "Who?", "answer": "She."}])
    given_ones = {"forget": tmp_path / "forget.json", "retain": tmp_path / "retain.json"}
    found = lm.WMDPDataModule("cyber", TOKENIZER, folder=wmdp, max_length=500, **given_ones).read()
    assert found["forget"] == [{"question": "", "answer": texts[0]["text"]}]
    assert found["retain"] == [found["forget"][0], {"question": "Who?", "answer": "She."}]


def test_the_first_questions_are_a_sample_of_all_subjects_and_always_the_same(wmdp: Path) -> None:
    found = wmdp_questions("cyber", wmdp)["mmlu"]
    assert len({"virology" in row["prompt"] for row in found[:4]}) == 2
    assert found == wmdp_questions("cyber", wmdp)["mmlu"]


class Hub:
    """Stands in for `datasets`: serves a folder's splits, and remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str, str]] = []

    def load_dataset(self, repository: str, config: str, split: str) -> list[dict[str, Any]]:
        self.asked.append((repository, config, split))
        for within in ("", "mmlu"):
            wanted = PublishedSplit(repository, config, split, (config,), within)
            try:
                return [row for _, row in published_rows(wanted, self.folder)]
            except FileNotFoundError:
                continue
        raise ConnectionError("no network")


def test_the_hub_gives_what_the_folder_gives(muse: Path, wmdp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = muse_examples("books", TOKENIZER, muse, 64), wmdp_questions("cyber", wmdp)
    texts = wmdp_texts("cyber", "forget", wmdp)
    hub = Hub(muse)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=hub.load_dataset))
    assert muse_examples("books", TOKENIZER, max_length=64) == expected[0]
    assert {repository for repository, *_ in hub.asked} == {"muse-bench/MUSE-Books"}
    assert ("muse-bench/MUSE-Books", "knowmem", "retain_qa_icl") in hub.asked
    hub = Hub(wmdp)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=hub.load_dataset))
    assert wmdp_questions("cyber") == expected[1]
    assert wmdp_texts("cyber", "forget") == texts
    assert hub.asked == [
        ("cais/wmdp", "wmdp-cyber", "test"),
        ("cais/mmlu", "all", "test"),
        ("cais/wmdp-corpora", "cyber-forget-corpus", "train"),
    ]
    with pytest.raises(
        RuntimeError, match=r"wmdp-bio/test of cais/wmdp from the hub .ConnectionError: no network.: go online"
    ):
        wmdp_questions("bio")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        wmdp_questions("cyber")


def test_every_ending_and_the_authors_own_names_are_read(tmp_path: Path) -> None:
    wanted = PublishedSplit("a/b", "raw", "forget", ("own_name",))
    (tmp_path / "raw").mkdir()
    for name, content in (
        ("raw/forget.jsonl", '{"text": "One."}\n"Two."'),
        ("raw/forget.json", '["One.", {"text": "Two."}]'),
        ("raw/forget.csv", "text\nOne.\nTwo.\n"),
        ("own_name.json", '["One.", "Two."]'),
        ("raw/forget.txt", "One.\n\nTwo."),
    ):
        (tmp_path / name).write_text(content)
        texts = [row["text"] for _, row in published_rows(wanted, tmp_path)]
        assert texts == (["One.\n\nTwo."] if name.endswith(".txt") else ["One.", "Two."])
        (tmp_path / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected raw/forget.json or own_name.json in .* found none: give a folder"
    ):
        published_rows(wanted, tmp_path)


@pytest.mark.parametrize(
    ("file", "rows", "said"),
    [
        ("raw/retain1.json", [], "retain1.json is empty"),
        ("raw/retain1.json", [3], "row 1: expected an object or a text, found int"),
        ("raw/retain1.json", [{"texts": "a"}], "row 1: expected text with some text, found the columns texts"),
        ("verbmem/forget.json", [{"prompt": "a", "gt": " "}], "row 1: expected gt with some text, found ' '"),
        ("knowmem/forget_qa.json", [{"question": "Who?", "answer": 1}], "expected answer with some text, found 1"),
        ("privleak/holdout.json", [None], "expected an object or a text, found NoneType"),
    ],
)
def test_rows_of_another_kind_are_refused(tmp_path: Path, file: str, rows: list[Any], said: str) -> None:
    write_json(write_muse(tmp_path) / file, rows)
    with pytest.raises(ValueError, match=said):
        muse_examples("news", TOKENIZER, tmp_path, 64)


GOOD = {"question": "Who?", "choices": ["a", "b", "c", "d"], "answer": 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (GOOD | {"choices": ["a", "b"]}, "expected choices as a list of 4 answers"),
        (GOOD | {"choices": "abcd"}, "expected choices as a list of 4 answers"),
        (GOOD | {"answer": 4}, "the place of the right choice, 0 to 3, found 4"),
        (GOOD | {"answer": "B"}, "the place of the right choice, 0 to 3, found 'B'"),
        ({"choices": GOOD["choices"], "answer": 1}, "expected question with some text, found the columns"),
    ],
)
def test_questions_of_another_kind_are_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    (tmp_path / "cyber_questions.json").write_text(json.dumps([GOOD, row]))
    with pytest.raises(ValueError, match=f"cyber_questions.json, row 2: .*{said}"):
        wmdp_questions("cyber", tmp_path)


def test_cells_of_a_csv_file_are_read_as_lists_and_numbers(tmp_path: Path) -> None:
    row = GOOD | {"subject": "virology"}
    cells = row | {"choices": json.dumps(row["choices"])}
    for ending in ("json", "csv"):
        for name in ("cyber_questions", "mmlu/all/test"):
            path = tmp_path / ending / f"{name}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                if ending == "json":
                    json.dump([row], file)
                else:
                    csv.writer(file).writerows([list(cells), list(cells.values())])
    assert wmdp_questions("cyber", tmp_path / "csv") == wmdp_questions("cyber", tmp_path / "json")


def test_unknown_names_and_missing_texts_are_refused(wmdp: Path) -> None:
    with pytest.raises(ValueError, match="corpus to be one of news, books, found 'bbc'"):
        muse_examples("bbc", TOKENIZER)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="subject to be one of bio, cyber, found 'chem'"):
        wmdp_questions("chem")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="--wmdp bio: expected its forget corpus, which its authors give on request"):
        wmdp_texts("bio", "forget")
    with pytest.raises(FileNotFoundError, match=r"bio-forget-corpus.json in"):
        wmdp_texts("bio", "forget", wmdp)
