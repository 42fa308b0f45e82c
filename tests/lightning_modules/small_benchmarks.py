"""Benchmarks of our own words in the layouts in which MUSE, WMDP and MMLU are published, small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

PLACES = ("harbour", "mill", "chapel", "market", "tower", "bridge")


def article(number: int, what: str, sentences: int = 12) -> str:
    return " ".join(
        f"On day {day} of the {what} number {number} the {PLACES[(number + day) % 6]} stood open to everybody."
        for day in range(sentences)
    )


def questions(what: str, count: int) -> list[dict[str, str]]:
    return [
        {"question": f"What stood open on day {day} of the {what}?", "answer": f"The {PLACES[day % 6]}."}
        for day in range(count)
    ]


def write_json(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def write_shards(path: Path, rows: list[dict[str, Any]]) -> None:
    """As the hub keeps a split: `path` ends in the split's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    middle = len(rows) // 2
    for number, part in enumerate((rows[:middle], rows[middle:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), f"{path}-{number:05}-of-00002.parquet")


def write_muse(folder: Path) -> Path:
    """MUSE's configurations and splits; `raw/forget` in two shards, as a clone of the hub has it."""
    write_shards(folder / "raw/forget", [{"text": article(number, "feast")} for number in range(3)])
    write_json(folder / "raw/retain1.json", [{"text": article(number, "fair")} for number in range(4)])
    prompts = [article(number, "feast", 4) for number in range(3)]
    gold = [article(number, "feast", 18)[len(prompt) + 1 :] for number, prompt in enumerate(prompts)]
    write_json(folder / "verbmem/forget.json", [{"prompt": p, "gt": g} for p, g in zip(prompts, gold, strict=True)])
    for split, what in (("forget", "feast"), ("retain", "fair")):
        write_json(folder / f"knowmem/{split}_qa.json", questions(what, 4))
        write_json(folder / f"knowmem/{split}_qa_icl.json", questions(f"old {what}", 2))
    for split, what in (("forget", "feast"), ("retain", "fair"), ("holdout", "strike")):
        write_json(folder / f"privleak/{split}.json", [article(number, what, 6) for number in range(5)])
    return folder


def multiple_choice(subject: str, count: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f" Where does the {subject} of house {number} stand? ",
            "choices": [f"At the {PLACES[(number + place) % 6]}" for place in range(4)],
            "answer": number % 4,
            "subject": subject,
        }
        for number in range(count)
    ]


def write_wmdp(folder: Path, subject: str = "cyber") -> Path:
    """WMDP's and MMLU's questions, the forget corpus and wikitext."""
    rows = [{name: value for name, value in row.items() if name != "subject"} for row in multiple_choice("switch", 10)]
    write_shards(folder / f"wmdp-{subject}/test", rows)
    write_shards(folder / "mmlu/all/test", [*multiple_choice("high_school_bells", 6), *multiple_choice("virology", 6)])
    lines = [json.dumps({"text": article(number, "break-in", 40)}) for number in range(4)]
    (folder / f"{subject}-forget-corpus.jsonl").write_text("\n".join(lines))
    texts = ["", " = A town = \n", *(article(number, "fair", 30) for number in range(5))]
    write_shards(folder / "wikitext-2-raw-v1/test", [{"text": text} for text in texts])
    return folder
