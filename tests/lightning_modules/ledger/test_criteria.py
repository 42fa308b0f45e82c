"""Criteria: read strictly, judged as they say, and refused before the training where nothing would measure them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules import cli
from lightning_modules.evaluation.evaluate import Evaluation
from lightning_modules.folder import write_json
from lightning_modules.ledger.criteria import KINDS, read_criteria, verdicts
from lightning_modules.ledger.entry import contents, numbers_of
from lightning_modules.ledger.request import Request
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.run import Run
from lightning_modules.run.settling import settle_target
from tests.lightning_modules.ledger.requests import arguments

BAD = {
    "nothing": ("", "expected one or more of forget_probability, ", "found nothing"),
    "a list": ("- forget_probability", "expected one or more of", "found list"),
    "unknown": ("forget_probabilty: 0.1", "found 'forget_probabilty'; did you mean forget_probability"),
    "a word": ("retention: most", "retention: expected a number between 0 and 2, found 'most'"),
    "outside": ("forget_quality: 1.5", "forget_quality: expected a number between 0 and 1, found 1.5"),
    "nan": ("model_utility: .nan", "model_utility: expected a number between 0 and 1, found nan"),
    "yes": ("retention: true", "retention: expected a number between 0 and 2, found True"),
    "no YAML": ("retention: [", "expected YAML with criteria"),
}


@pytest.mark.parametrize(("text", "said"), [(text, said) for text, *said in BAD.values()], ids=BAD)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, said: list[str]) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match="criteria") as error:
        read_criteria(str(tmp_path / "c.yaml"))
    assert all(part in str(error.value) for part in said), str(error.value)


def test_a_verdict_is_the_comparison_that_the_criterion_names() -> None:
    for name, kind in KINDS.items():
        for found in (0.2, 0.5, 0.8, None, math.nan):
            (said,) = verdicts({name: 0.5}, {name: found})
            right = found is not None and not math.isnan(found) and (found <= 0.5 if kind.at_most else found >= 0.5)
            assert said["holds"] is right
            assert said["rule"] == ("at most" if kind.at_most else "at least")


def test_the_number_of_each_criterion_is_that_of_the_files_of_the_run(tmp_path: Path) -> None:
    ends = {
        "model": {"points": [{"rest": 0.1}, {"rest": 0.5}]},
        "control": {"points": [{"rest": 0.3}, {"rest": 0.375}]},
    }
    write_json(tmp_path / "probes.json", {"relearn": ends})
    metrics: dict[str, Any] = {
        "before": {"forget": {"probability": 0.9}, "retain": {"probability": 0.75}},
        "after": {"forget": {"probability": 0.0625}, "retain": {"probability": 0.375}},
        "forget_quality": {"pvalue": 0.03},
        "model_utility": {"before": 0.7, "after": 0.6},
    }
    assert numbers_of(tmp_path, metrics, None) == {
        "forget_probability": 0.0625,
        "forget_quality": 0.03,
        "relearning_gap": 0.125,
        "retention": 0.5,
        "model_utility": 0.6,
    }
    assert numbers_of(tmp_path, metrics, 0.9375)["retention"] == 0.4  # before the first request more was known
    assert numbers_of(tmp_path, metrics | {"before": None}, None)["retention"] == 1.0  # nothing was trained
    without = {"after": metrics["after"], "before": None, "forget_quality": None}
    write_json(tmp_path / "probes.json", {"relearn": ends | {"control": None}})
    found = numbers_of(tmp_path, without, None)
    assert [name for name, number in found.items() if number is None] == [*list(KINDS)[1:3], "model_utility"]


def test_retention_is_judged_by_what_was_known_before_the_first_request_of_all(tmp_path: Path) -> None:
    scores = {"forget": {"probability": 0.05}, "retain": {"probability": 0.375}}
    known = [{"metrics": {"before": {"retain": {"probability": start}}}} for start in (0.75, 0.5, 0.4)]
    metrics = {"before": scores, "after": scores, "forget_quality": None, "seed": 0, "versions": {}, "seconds": {}}
    write_json(tmp_path / "metrics.json", metrics)
    (tmp_path / "model").mkdir()
    save_file({"weight": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    request: dict[str, Any] = {
        "kind": "forgotten",
        "id": "d",
        "sha256": "0",
        "rows": [],
        "counts": {"level": 0.1},
        "asked": True,
        "model": "0",
        "begun": "",
        "protected": [],
        "criteria": {"sha256": None, "limits": {"retention": 0.9}},
    }
    (said,) = contents(tmp_path, tmp_path, request, known, {})["verdicts"]
    assert (said["found"], said["holds"]) == (0.5, False)


@pytest.mark.parametrize(
    ("name", "lacks"),
    [("forget_quality", "--reference"), ("relearning_gap", "--probes quick"), ("model_utility", "--tofu")],
)
def test_what_the_run_would_not_measure_is_refused_before_it(
    tmp_path: Path, name: str, lacks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(tmp_path, 1, "--criteria", str(tmp_path / "criteria.yaml"))
    (tmp_path / "criteria.yaml").write_text(f"{name}: 0.5")
    assert cli.main(command) == 1
    assert f"--criteria, {name}: expected {lacks}" in capsys.readouterr().err
    assert not (tmp_path / "run_1").exists()


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (["--save", "adapter", "--lora-rank", "2"], "found --save adapter, which leaves no whole model"),
        (["--method", "uld"], "found --method uld"),
        (["--devices", "2"], "found several devices"),
        (["--ledger-sketch", "2", "--ledger-keep-text"], "expected one of them, found both"),
        (["--ledger-rows", "0"], "expected --ledger-rows >= 1, found 0"),
        (["--evaluation-examples", "3"], "--evaluation-examples: expected 4 or more, every row to forget, found 3"),
        (["--request", "a\nb"], "--request: expected a name in one line"),
    ],
)
def test_options_that_do_not_go_with_a_ledger_are_refused(
    tmp_path: Path, further: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(tmp_path, 1, *further)) == 1
    assert said in capsys.readouterr().err


def test_options_of_a_ledger_without_one_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(tmp_path, 1, "--ledger-keep-text")
    place = command.index("--ledger")
    assert cli.main(command[:place] + command[place + 2 :]) == 1
    assert "expected --ledger FOLDER with --ledger-keep-text, found none" in capsys.readouterr().err


SRUN = {"JOB_ID": "17", "JOB_NAME": "forget", "NTASKS": "2", "NTASKS_PER_NODE": "2"}


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_ledger_is_refused_in_every_process_that_srun_starts(
    tmp_path: Path, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one too: it would train and enter its own model, and the others theirs."""
    command = arguments(tmp_path, 1)
    for name, value in {**SRUN, "PROCID": rank}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert cli.main(command) == 1
    assert "--ledger: expected one process, found several" in capsys.readouterr().err
    assert not (tmp_path / "ledger").exists()


def test_the_ledger_and_the_output_are_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(tmp_path, 1, "--output", str(tmp_path / "ledger"))) == 1
    assert "--ledger: expected another folder than --output" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_protected_and_enters_nothing(
    two_requests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(two_requests, 3, "--dry-run")) == 0
    assert "earlier requests are protected in 2 rows, 1 sketches among them" in capsys.readouterr().out
    assert len((two_requests / "ledger" / "ledger.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.parametrize(("given", "level"), [(None, 0.6 * 0.02), (0.3, 0.3)])
def test_a_run_ends_at_a_share_of_its_criterion_unless_an_option_says_where(
    tmp_path: Path, given: float | None, level: float
) -> None:
    request = Request({"criteria": {"limits": {"forget_probability": 0.02}}})
    options = UnlearnOptions.of(model="gpt2", stop_below=given)
    run = Run(options, tmp_path, {}, None, request=request)
    before = Evaluation({"forget": {"probability": 0.9}}, {})
    assert settle_target(run, before, None)[0].options.training.stop_below == level
