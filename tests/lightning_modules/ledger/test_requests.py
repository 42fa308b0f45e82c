"""Requests one after another by the command: what an entry says, what is refused, and that nothing is entered twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lightning_modules import cli
from lightning_modules.data.files import read_json
from lightning_modules.folder import METRICS
from lightning_modules.ledger.chain import append, read_chain
from lightning_modules.ledger.hashes import request_hash, row_hash
from lightning_modules.run import deletion
from lightning_modules.run import unlearn as unlearn_command
from tests.lightning_modules.ledger.requests import arguments, rows, run
from tests.reference import ledger as slow


def entries(folder: Path) -> list[dict[str, Any]]:
    return read_chain(folder / "ledger" / "ledger.jsonl")


def test_an_entry_says_what_was_asked_done_and_left(two_requests: Path) -> None:
    one, two = entries(two_requests)
    assert one["request"]["rows"] == [row_hash(row) for row in rows(1)]
    assert one["request"]["sha256"] == request_hash(one["request"]["rows"])
    assert [entry["request"]["id"] for entry in (one, two)] == [one["request"]["sha256"][:12], "the second"]
    assert one["model"]["before"] == slow.tensors_hash(two_requests / "model")
    assert one["model"]["after"] == two["model"]["before"] == slow.tensors_hash(two_requests / "run_1" / "model")
    assert two["model"]["after"] == slow.tensors_hash(two_requests / "run_2" / "model") != two["model"]["before"]
    metrics = read_json(two_requests / "run_2" / METRICS, "scores")
    first = read_json(two_requests / "run_1" / METRICS, "scores")
    assert two["metrics"]["after"]["forget"]["probability"] == metrics["after"]["forget"]["probability"]
    assert two["counts"] | {"known": 0.0} == {"forget": 4, "retain": 6, "steps": 2, "known": 0.0, "level": 1e-8}
    assert two["begun"] <= two["time"]
    assert two["protected"] == {"texts": 1, "sketches": 0, "rows": 1}
    verdicts = {one["criterion"]: one for one in two["verdicts"]}
    assert not verdicts["forget_probability"]["holds"]
    # Of the start of the ledger, and not of this request: little by little is not allowed either.
    kept = metrics["after"]["retain"]["probability"] / first["before"]["retain"]["probability"]
    assert verdicts["retention"]["found"] == pytest.approx(kept)
    assert [one["number"] for one in two["earlier"]] == [1]


def test_an_entry_of_one_request_has_the_names_that_it_always_had(two_requests: Path) -> None:
    names = {"version", "kind", "request", "counts", "begun", "run", "evidence", "model", "protected", "seed"}
    names |= {"seconds", "metrics", "probes", "criteria", "verdicts", "time", "earlier", "kept", "number", "previous"}
    for entry in entries(two_requests):
        assert set(entry) == names | {"hash", "versions"}


def test_the_text_is_kept_only_if_it_was_asked(two_requests: Path) -> None:
    everything = b"".join(path.read_bytes() for path in (two_requests / "ledger").rglob("*") if path.is_file())
    assert rows(1)[0]["answer"].encode() in everything
    assert rows(2)[0]["answer"].encode() not in everything
    one, two = entries(two_requests)
    assert set(one["kept"]) == {"text"}
    assert set(two["kept"]) == {"sketch"}
    file = two_requests / "ledger" / two["kept"]["sketch"]["file"]
    assert two["kept"]["sketch"]["bytes"] == file.stat().st_size
    assert load_file(file)


def test_the_evidence_holds_no_text(two_requests: Path) -> None:
    for entry in entries(two_requests):
        for name in entry["evidence"]:
            text = (two_requests / "ledger" / entry["run"] / name).read_text()
            assert "by the canal" not in text, name


def test_a_later_run_protects_the_earlier_request(two_requests: Path) -> None:
    header = (two_requests / "run_2" / "surgery.csv").read_text().splitlines()[0]
    assert "loss_earlier_0" in header
    assert "loss_earlier_0" not in (two_requests / "run_1" / "surgery.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("request_rows", "retain", "said"),
    [
        (rows(1), [], "expected a new request, found that of entry 1"),
        ([*rows(3), *reversed(rows(1))], [], "found 4 of 8 that were forgotten before, row 5 (entry 1)"),
        (rows(3), rows(3)[1:2], "found 1 of 4 in the retain set too, row 2 (retain row 7)"),
        (
            rows(3),
            rows(1)[2:3],
            "expected rows to keep that no earlier request had forgotten, found 1, retain row 7 (entry 1)",
        ),
    ],
    ids=["done before", "partly done before", "overlaps retention", "would be taught again"],
)
def test_a_request_is_refused_before_a_model_is_loaded(
    ledger: Path,
    request_rows: list[Any],
    retain: list[Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deletion, "load_model", None)
    command = arguments(ledger, 3)
    (ledger / "forget_3.json").write_text(json.dumps(request_rows))
    kept = json.loads((ledger / "retain.json").read_text())
    (ledger / "retain.json").write_text(json.dumps([*kept, *retain]))
    assert cli.main(command) == 1
    assert said in capsys.readouterr().err
    assert len(entries(ledger)) == 2
    assert not (ledger / "run_3").exists()


@pytest.mark.parametrize("further", [[], ["--dry-run", "true"]], ids=["run", "plan"])
def test_no_rule_protects_no_earlier_request(
    further: list[str], ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ledger, 3, "--recipe", "paper", "--rule", "none", *further) == 1
    assert (
        "--rule: expected one that protects rows, such as gru, with a ledger that has earlier requests"
        in capsys.readouterr().err
    )
    assert not (ledger / "run_3").exists()


def test_a_model_that_is_not_the_last_one_and_a_name_twice_are_refused(
    ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ledger, 3, model=str(ledger / "run_1" / "model")) == 1
    assert "expected the model that entry 2, 'the second', left" in capsys.readouterr().err
    assert run(ledger, 3, "--request", "the second") == 1
    assert "expected a new name, found 'the second' of entry 2" in capsys.readouterr().err
    assert len(entries(ledger)) == 2


def test_what_is_not_memorised_is_recorded_with_its_scores_and_nothing_is_trained(
    ledger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unlearn_command, "_trained", None)
    assert run(ledger, 3, "--stop-below", "0.5") == 0
    assert "Nothing is trained" in capsys.readouterr().err
    *_, last = entries(ledger)
    assert last["kind"] == "not memorised"
    assert last["model"]["after"] == last["model"]["before"] == slow.tensors_hash(ledger / "run_2" / "model")
    assert 0 < last["metrics"]["before"]["forget"]["probability"] == pytest.approx(last["counts"]["known"], rel=1e-3)
    monkeypatch.undo()
    # The same request again is none that was done; and the next one begins with the model of entry 2.
    assert run(ledger, 3, "--output", str(ledger / "again"), "--request", "again", "--lr", "1e-4") == 0
    assert [entry["kind"] for entry in entries(ledger)] == ["forgotten", "forgotten", "not memorised", "forgotten"]
    assert entries(ledger)[-1]["protected"] == {"texts": 1, "sketches": 1, "rows": 2}


def test_a_run_that_is_killed_before_its_entry_is_entered_once_by_resume(
    ledger: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(deletion, "append", killed)
    assert run(ledger, 3) == 130
    assert len(entries(ledger)) == 2
    monkeypatch.setattr(deletion, "append", append)
    monkeypatch.setattr(unlearn_command.shutil, "rmtree", killed)  # just after the entry
    monkeypatch.setattr(unlearn_command, "draw", lambda *_: None)
    resume = ["unlearn", "--resume", "--output", str(ledger / "run_3")]
    assert cli.main(resume) == 130
    assert len(entries(ledger)) == 3
    monkeypatch.undo()
    monkeypatch.setattr(unlearn_command, "draw", lambda *_: None)
    assert cli.main(resume) == 0
    assert len(entries(ledger)) == 3
    capsys.readouterr()
    assert cli.main(resume) == 1
    assert "found a finished one" in capsys.readouterr().err


def test_a_run_that_is_resumed_ends_in_the_same_weights(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_modules.training.module import UnlearningModule

    assert (
        run(ledger, 3, "--output", str(ledger / "whole"), "--ledger", str(ledger / "elsewhere"), "--epochs", "2") == 0
    )
    assert run(ledger, 3, "--checkpoint-every", "1", "--epochs", "2", "--output", str(ledger / "of three")) == 0
    step, seen = UnlearningModule.training_step, []

    def dies(self: Any, batch: Any) -> Any:
        seen.append(batch)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return step(self, batch)

    # The same again in a copy, killed in its fourth step.
    other = ledger / "ledger" / "ledger.jsonl"
    other.write_bytes(b"".join(other.read_bytes().splitlines(keepends=True)[:2]))
    monkeypatch.setattr(UnlearningModule, "training_step", dies)
    assert run(ledger, 3, "--checkpoint-every", "1", "--epochs", "2") == 130
    monkeypatch.undo()
    monkeypatch.setattr(unlearn_command, "draw", lambda *_: None)
    assert cli.main(["unlearn", "--resume", "--output", str(ledger / "run_3")]) == 0
    assert entries(ledger)[-1]["model"]["after"] == slow.tensors_hash(ledger / "of three" / "model")
