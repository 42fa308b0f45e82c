"""What a ledger says of odd names, of numbers that are none, and of which entry it speaks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_modules.folder import write_json
from lightning_modules.ledger.entry import numbers_of, probes_of
from lightning_modules.ledger.page import write_page
from lightning_modules.ledger.picture import figure
from lightning_modules.ledger.place import PAGE
from lightning_modules.ledger.refusals import check_model
from lightning_modules.ledger.table import table


def entry(number: int, kind: str = "forgotten", name: str = "a [b]name[/b] [/x]") -> dict[str, Any]:
    scores = {"forget": {"probability": 0.5}, "retain": {"probability": 0.5}}
    return {
        "number": number,
        "kind": kind,
        "run": f"../run_{number}",
        "time": "2026-01-01T00:00:00",
        "hash": "0" * 64,
        "request": {"id": name},
        "counts": {"forget": 1, "known": 0.5, "level": 0.1},
        "criteria": {"limits": {}},
        "metrics": {"before": scores, "after": scores},
        "model": {"after": "1" * 64},
        "verdicts": [],
        "earlier": [],
    }


def test_names_are_shown_as_they_are() -> None:
    console = Console(width=200, record=True, quiet=False)
    with console.capture() as said:
        console.print(table([entry(1)], "a/[b]folder[/c]"))
    assert "a [b]name[/b] [/x]" in said.get()
    assert "a/[b]folder[/c]" in said.get()


def test_the_picture_shows_names_as_they_are_and_the_numbers_of_the_entries(tmp_path: Path) -> None:
    drawn = figure(["$a^b$", "$\\nothing$"], [[0.1, 0.2], [None, 0.3]], [0.1, 0.1], "title", numbers=[2, 5])
    drawn.savefig(tmp_path / "drawn.png")  # mathtext would not parse
    (axes,) = drawn.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2 $a^b$", "5 $\\nothing$"]
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["after 2", "after 5"]


def test_the_refusal_of_another_model_names_the_folder_that_has_one() -> None:
    entries = [entry(1), entry(2, "not memorised")]
    with pytest.raises(ValueError, match=r"give --model \.\./run_1/model"):
        check_model(entries, "2" * 64, "other")
    with pytest.raises(ValueError, match="give the model that entry 1 began with"):
        check_model([entry(1, "not memorised")], "2" * 64, "other")


def test_a_probability_that_is_nan_is_entered_as_none(tmp_path: Path) -> None:
    points = [{"rest": math.nan}, {"rest": math.nan}]
    probe = {"model": {"points": points, "interval": [math.nan, 0.1]}, "control": {"points": points}}
    write_json(tmp_path / "probes.json", {"relearn": probe})
    scores = {"forget": {"probability": 0.5}, "retain": {"probability": 0.5}}
    found = numbers_of(tmp_path, {"after": scores, "before": None, "forget_quality": None}, None)
    assert found["relearning_gap"] is None
    said = probes_of(tmp_path)
    assert said["relearn"]["model"] == {"steps": None, "lr": None, "before": None, "after": None, "interval": None}
    json.dumps(said, allow_nan=False)


def test_the_report_of_a_request_that_was_not_memorised_says_that_the_model_was_left(tmp_path: Path) -> None:
    known = entry(1, "not memorised") | {"metrics": {"before": None, "after": None}, "probes": {}}
    known["counts"] |= {"retain": 3}
    write_page(tmp_path, [known], [])
    said = (tmp_path / PAGE).read_text()
    assert "it had not memorised them, and was left as it was" in said
    assert "a mean probability of 0.500 before anything was done" in said
