"""Several requests in one run: one entry that says of each whether it is forgotten, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_modules import cli
from lightning_modules.ledger.batch import check_apart, largest, mean, scored
from lightning_modules.ledger.chain import read_chain
from lightning_modules.ledger.hashes import request_hash, row_hash
from lightning_modules.ledger.request import kept_texts
from lightning_modules.ledger.rescore import rescore
from lightning_modules.run import deletion, methods
from lightning_modules.run import unlearn as unlearn_command
from lightning_modules.run.loading import read_splits
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.training.callbacks import tradeoff_curve
from tests.lightning_modules.ledger.requests import arguments, rows

REQUESTS = {"ada": rows(1), "017": [*rows(2, 2), {"text": "A plain text by the canal."}], "2025-03-01": rows(3, 1)}


def batch(folder: Path, *further: str, requests: dict[str, Any] = REQUESTS) -> list[str]:
    """The command line of a batch, whose files are written."""
    command = arguments(folder, 1, *further)
    for number, found in enumerate(requests.values()):
        (folder / f"rows_{number}.json").write_text(json.dumps(found))
    lines = [f"{name}: {folder}/rows_{number}.json\n" for number, name in enumerate(requests)]
    (folder / "requests.yaml").write_text("".join(lines))
    place = command.index("--forget")
    return [*command[:place], "--requests", str(folder / "requests.yaml"), *command[place + 2 :]]


def done(command: list[str]) -> int:
    """The exit status; nothing is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearn_command, "draw", lambda *_: None)
        return cli.main(command)


def entries(folder: Path) -> list[dict[str, Any]]:
    return read_chain(folder / "ledger" / "ledger.jsonl")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    arguments(folder, 1)
    assert done(batch(folder, "--ledger-keep-text", "--criteria", str(folder / "criteria.yaml"))) == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def test_one_entry_says_of_every_request_what_was_asked_and_left(made: Path) -> None:
    (entry,) = entries(made)
    texts = {name: [row.get("answer") or row["text"] for row in found] for name, found in REQUESTS.items()}
    lines = [json.loads(line) for line in (made / "run_1" / "evaluation.jsonl").read_text().splitlines()]
    for part, (name, found) in zip(entry["requests"], REQUESTS.items(), strict=True):
        plain = [{"question": row.get("question", ""), "answer": row.get("answer") or row["text"]} for row in found]
        assert (part["id"], part["rows"]) == (name, len(found))
        assert part["sha256"] == request_hash([row_hash(row) for row in plain])
        for model in ("before", "after"):
            own = [line["probability"] for line in lines if line["model"] == model and line["answer"] in texts[name]]
            assert len(own) == len(found)
            assert part[model] == pytest.approx(fmean(own))
        assert part["limit"] == 1e-8
        assert part["holds"] is False
    assert entry["request"]["id"] == "ada, 017, 2025-03-01"
    assert entry["counts"]["forget"] == len(entry["request"]["rows"]) == 8
    verdict = entry["verdicts"][0]
    assert verdict["criterion"] == "forget_probability"
    assert verdict["found"] == max(part["after"] for part in entry["requests"])
    assert verdict["found"] > entry["metrics"]["after"]["forget"]["probability"]


def test_later_runs_hold_every_request_of_a_batch_by_itself(made: Path) -> None:
    ((requests, limit),) = kept_texts(made / "ledger", entries(made)).values()
    texts = [[row.get("answer") or row["text"] for row in found] for found in REQUESTS.values()]
    assert [[row["answer"] for row in found] for found in requests] == texts
    assert limit == 1e-8


def test_a_batch_is_shown_reported_and_its_scores_computed_again(
    folder: Path, made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    place = str(made / "ledger")
    assert cli.main(["ledger", "show", place]) == 0
    said = capsys.readouterr().out
    assert all(f"- {name}" in said for name in REQUESTS)
    assert said.count("does not hold") == 3
    assert cli.main(["ledger", "report", str(folder / "ledger")]) == 0
    page = (folder / "ledger" / "report.html").read_text()
    assert "3 requests were done together" in page
    assert '<th scope="row">2025-03-01</th>' in page
    (entry,) = entries(made)
    assert list(rescore(made / "ledger", entry)) == []
    wrong = json.loads(json.dumps(entry))
    wrong["requests"][1]["after"] += 0.01
    (found,) = rescore(made / "ledger", wrong)
    assert found.said.startswith("request '017': expected a probability of")


def test_names_and_rows_of_every_request_are_refused_afterwards(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = entries(folder)
    model = str(folder / "run_1" / "model")
    for name in ("017", "ada, 017, 2025-03-01"):
        assert cli.main(arguments(folder, 6, "--request", name, model=model)) == 1
        assert f"expected a new name, found {name!r} of entry 1" in capsys.readouterr().err
    command = arguments(folder, 2)
    (folder / "forget_2.json").write_text(json.dumps(REQUESTS["017"]))
    assert cli.main(command) == 1
    assert "expected a new request, found that of entry 1" in capsys.readouterr().err
    again = ("--output", str(folder / "again"), "--model", model)
    assert cli.main(batch(folder, *again, requests={"new": rows(7), "old": [*rows(8), *rows(1, 1)]})) == 1
    said = capsys.readouterr().err
    assert "--requests, 'old': expected rows to forget that are new, found 1 of 5 that were forgotten before" in said
    assert entries(folder) == before


def test_a_row_of_two_requests_and_one_that_is_kept_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="found row 2 of 'two' in 'one' too, row 1"):
        check_apart({"one": rows(1), "two": [rows(2)[0], rows(1)[0]]})
    check_apart({"one": [*rows(1), *rows(1)], "two": rows(2)})  # twice in one request counts twice
    arguments(tmp_path, 1)
    kept = json.loads((tmp_path / "retain.json").read_text())
    assert cli.main(batch(tmp_path, requests={"one": rows(1), "two": [*rows(2), kept[3]]})) == 1
    said = capsys.readouterr().err
    assert "--requests, 'two': expected rows to forget that are not to be kept, found 1 of 5" in said
    assert "row 5 (retain row 4)" in said
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--forget", "f.json", "--ledger", "l"], "expected either --requests or --forget"),
        (["--tofu", "forget01", "--ledger", "l"], "expected either --requests or --tofu"),
        (["--ledger", "l", "--request", "a"], "expected either --requests, whose file has the names, or --request"),
        ([], "--requests: expected --ledger FOLDER with it"),
    ],
)
def test_options_that_do_not_go_with_several_requests_are_refused(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["unlearn", "--model", "m", "--requests", "r.yaml", "--retain", "k.json", *given]) == 1
    assert said in capsys.readouterr().err


def test_every_request_has_to_be_forgotten_and_not_only_their_mean(tmp_path: Path) -> None:
    parts = [{"id": "a", "sha256": "0", "rows": 4, "known": 0.9}, {"id": "b", "sha256": "1", "rows": 1, "known": 0.9}]
    found = {"before": [0.9] * 5, "after": [0.01] * 4 + [0.09]}
    lines = [{"model": of, "split": "forget", "probability": value} for of, values in found.items() for value in values]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert fmean(found["after"]) < 0.05
    said = scored(tmp_path, parts, 0.05)
    assert [part["holds"] for part in said] == [True, False]
    assert largest(said) == 0.09
    lines[-1]["probability"] = "NaN"  # as JSON has it
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = scored(tmp_path, parts, 0.05)
    assert [part["after"] for part in said] == [pytest.approx(0.01), None]
    assert [part["holds"] for part in said] == [True, False]
    assert largest(said) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.25, 0.75], 0.5), ([0.01, "NaN", 0.02], None), ([math.nan, 0.01], None), ([0.01, None], None), ([], None)],
)
def test_a_request_with_an_answer_that_has_no_probability_has_no_mean(
    values: list[Any], expected: float | None
) -> None:
    assert mean(values) == expected


@pytest.mark.parametrize(("known", "kind"), [([0.01, 0.02, 0.2], "forgotten"), ([0.01, 0.02, 0.1], "not memorised")])
def test_a_batch_is_not_memorised_only_if_no_request_is(
    tmp_path: Path, known: list[float], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = batch(tmp_path)
    given = dict(zip([name.removeprefix("--") for name in command[1::2]], command[2::2], strict=True))
    values = {name: given[name] for name in ("model", "requests", "retain", "output", "ledger")}
    options = UnlearnOptions.of(**values, stop_below=0.1)
    monkeypatch.setattr(deletion, "_probabilities", lambda *_: dict(zip(REQUESTS, known, strict=True)))
    found = deletion.requested(options, read_splits(options))
    assert found is not None
    assert found.said["kind"] == kind
    assert found.said["counts"]["known"] == pytest.approx((4 * known[0] + 3 * known[1] + known[2]) / 8)


def test_training_stops_only_once_every_request_is_below_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    script = [{"forget": 0.06}, {"forget": 0.04}, {"0": 0.01, "1": 0.07}, {"forget": 0.03}, {"0": 0.01, "1": 0.04}]
    monkeypatch.setattr(tradeoff_curve, "mean_probabilities", lambda *_, **__: script.pop(0))
    both: Any = {"0": ([], None), "1": ([], None)}
    curve = tradeoff_curve.TradeoffCurve({"forget": []}, pad_token_id=0, stop_below=0.05, at_most=both)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(broadcast=lambda value: value), loggers=[], should_stop=False, global_step=0
    )
    module: Any = SimpleNamespace(get_submodule=lambda _: None)
    stopped = []
    for step in range(3):
        trainer.global_step = step
        curve.on_train_end(trainer, module)
        stopped.append(trainer.should_stop)
    assert stopped == [False, False, True]
    assert script == []


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_batch_is_gone_on_with_unless_a_row_changed_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = batch(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(methods, "fit", killed)
        assert done(command) == 130
    resume = ["unlearn", "--resume", "--output", str(tmp_path / "run_1")]
    batch(tmp_path, requests=REQUESTS | {"ada": rows(1)[1:], "2025-03-01": [*rows(3, 1), rows(1)[0]]})
    assert done(resume) == 1
    assert "--requests: expected the requests that the run began with, ada, 017, 2025-03-01" in capsys.readouterr().err
    batch(tmp_path)
    assert done(resume) == 0
    (entry,) = entries(tmp_path)
    assert [part["id"] for part in entry["requests"]] == list(REQUESTS)
