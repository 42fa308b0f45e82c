"""What a ledger keeps: rows that can be read again, the bytes of the criteria, and nothing that was changed since."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_modules import cli
from lightning_modules.data.examples import read_examples
from lightning_modules.folder import METRICS
from lightning_modules.ledger.chain import read_chain
from lightning_modules.ledger.hashes import file_hash
from lightning_modules.ledger.request import keep_rows
from lightning_modules.run import deletion
from lightning_modules.run import unlearn as unlearn_command
from tests.lightning_modules.ledger.requests import arguments, rows, run

RESUME = ("unlearn", "--resume", "--output")


def test_rows_that_were_kept_are_read_again_as_they_were_whatever_their_shape(tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": text}
        for role, text in (("system", "Be brief."), ("user", "Who?"), ("assistant", "Ada."))
    ]
    given = [
        {"text": "A plain text."},
        {"text": "Another one.", "paraphrased_answer": "One more.", "perturbed_answer": ["No.", "None."]},
        {"question": "Who?", "answer": "Ada.", "paraphrased_question": "Which?"},
        {"messages": turns},
    ]
    (tmp_path / "given.json").write_text(json.dumps(given))
    found = read_examples(tmp_path / "given.json")
    keep_rows(tmp_path / "kept.jsonl", found)
    assert read_examples(tmp_path / "kept.jsonl") == found


def test_criteria_are_kept_byte_by_byte(tmp_path: Path) -> None:
    criteria = b"\xef\xbb\xbfforget_probability: 1.0e-08\r\nretention: 0.0\r\n"
    command = arguments(tmp_path, 1, "--criteria", str(tmp_path / "criteria.yaml"))
    (tmp_path / "criteria.yaml").write_bytes(criteria)
    assert unlearned(command) == 0
    (kept,) = (tmp_path / "ledger" / "criteria").iterdir()
    assert kept.read_bytes() == criteria
    assert cli.main(["ledger", "verify", str(tmp_path / "ledger")]) == 0


@pytest.mark.parametrize("entry", [1, 2], ids=["text", "sketch"])
@pytest.mark.parametrize("gone", [False, True], ids=["changed", "gone"])
def test_what_was_kept_and_is_another_now_protects_nothing(
    ledger: Path, entry: int, gone: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (kept,) = read_chain(ledger / "ledger" / "ledger.jsonl")[entry - 1]["kept"].values()
    path = ledger / "ledger" / kept["file"]
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    if gone:
        path.unlink()
    assert run(ledger, 3) == 1
    said = capsys.readouterr().err
    assert "found nothing there" in said if gone else f"with the hash {kept['sha256'][:12]}" in said
    assert f"entry {entry}" in said
    assert not (ledger / "run_3").exists()


def unlearned(command: list[str]) -> int:
    """The exit status of a command line; nothing is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearn_command, "draw", lambda *_: None)
        return cli.main(command)


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("keeps", [["--ledger-keep-text"], ["--ledger-sketch", "2"]], ids=["text", "sketch"])
def test_rows_that_changed_while_the_run_went_on_are_not_kept_for_the_request(
    ledger: Path, keeps: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deletion, "append", killed)
    assert run(ledger, 3, *keeps) == 130
    monkeypatch.undo()
    there = {path: file_hash(path) for path in (ledger / "ledger").rglob("*") if path.is_file()}
    whole = (ledger / "forget_3.json").read_text()
    (ledger / "forget_3.json").write_text(json.dumps(rows(4)))
    assert unlearned([*RESUME, str(ledger / "run_3")]) == 1
    assert "expected the rows to forget that the run began with" in capsys.readouterr().err
    assert {path: file_hash(path) for path in there} == there
    (ledger / "forget_3.json").write_text(whole)
    assert unlearned([*RESUME, str(ledger / "run_3")]) == 0
    assert len(read_chain(ledger / "ledger" / "ledger.jsonl")) == 3


def test_rows_that_changed_before_a_run_is_resumed_are_not_trained_on(
    ledger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_modules.run import methods

    monkeypatch.setattr(methods, "fit", killed)
    assert run(ledger, 3) == 130
    monkeypatch.undo()
    (ledger / "forget_3.json").write_text(json.dumps(rows(4)))
    assert unlearned([*RESUME, str(ledger / "run_3")]) == 1
    assert "expected the rows to forget that the run began with" in capsys.readouterr().err
    assert not (ledger / "run_3" / METRICS).exists()
