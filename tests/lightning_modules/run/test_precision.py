"""The precision that nobody named: bf16-mixed where the machine is made for it, one answer for all commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import cli
from lightning_modules.data.tokenization import encode
from lightning_modules.report.terminal import about_scores
from lightning_modules.run import unlearn as unlearn_command
from lightning_modules.run.options import EvaluateOptions, FinetuneOptions, UnlearnOptions
from tests.lightning_modules.evaluation.test_shared import slow_nll
from tests.lightning_modules.run.small_runs import small_run
from tests.tolerances import AUTOCAST, close


@pytest.mark.parametrize(
    ("cuda", "capabilities", "expected"),
    [
        (True, {}, "bf16-mixed"),
        (False, {"amx_bf16": True, "avx512_bf16": True}, "bf16-mixed"),
        (False, {"bf16": True}, "bf16-mixed"),
        (False, {"avx512_bf16": True}, "32-true"),
        (False, {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False, "bf16": False}, "32-true"),
        (False, {}, "32-true"),
    ],
)
def test_the_default_is_bfloat16_where_the_machine_is_made_for_it_but_not_from_scratch(
    cuda: bool, capabilities: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for options in (
        UnlearnOptions.of(model="some/model"),
        UnlearnOptions.of(model="some/model", method="uld"),
        FinetuneOptions.of(model="some/model"),
    ):
        assert options.resolved().training.precision == expected
        assert options.but(precision="16-mixed").resolved().training.precision == "16-mixed"
        if isinstance(options, UnlearnOptions):
            assert options.resolved().evaluation.evaluation_precision == "32-true"
    assert UnlearnOptions().resolved().training.precision == "32-true"
    assert EvaluateOptions.of(model="some/model").evaluation.evaluation_precision == "32-true"


def test_on_an_apple_gpu_it_stays_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning trains there, whatever its CPU can do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert UnlearnOptions.of(model="some/model").resolved().training.precision == "32-true"


def test_scores_of_a_ledger_and_of_float16_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", "m", "--forget", "f", "--retain", "r", "--evaluation-precision"]
    assert cli.main(["unlearn", *given, "bf16-mixed", "--ledger", "l"]) == 1
    assert "expected 32-true with --ledger, whose scores have to come out again" in capsys.readouterr().err
    for command in ("unlearn", "evaluate"):
        assert cli.main([command, *given, "16-mixed"]) == 1
        assert (
            "--evaluation-precision: expected 32-true or bf16-mixed, found '16-mixed'; float16"
            in capsys.readouterr().err
        )


def test_all_scores_of_a_run_are_those_of_plain_passes_under_autocast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the same models were scored exactly before, and their scores kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(unlearn_command, "draw", lambda _: None)
    command = small_run(tmp_path, "--precision", "32-true", "--reference", str(tmp_path / "reference"))
    found: dict[str, Any] = {}
    for name in ("32-true", "bf16-mixed"):
        arguments = [*command, "--evaluation-precision", name, "--output", str(tmp_path / name)]
        assert cli.main(arguments) == 0
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    assert "scores from" not in capsys.readouterr().err
    assert "evaluation_precision" not in found["32-true"]
    assert found["bf16-mixed"]["evaluation_precision"] == "bf16-mixed"
    assert yaml.safe_load((tmp_path / "bf16-mixed" / "config.yaml").read_text())["evaluation_precision"] == "bf16-mixed"
    sentence = "The scores were computed in bf16-mixed"
    assert [any(sentence in said for said in about_scores(found[name])) for name in found] == [False, True]
    rows = [json.loads(line) for line in (tmp_path / "bf16-mixed" / "evaluation.jsonl").read_text().splitlines()]
    for of, folder in ("before", "model"), ("after", "bf16-mixed/model"), ("reference", "reference"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        mine = [row for row in rows if row["model"] == of]
        with torch.autocast("cpu", torch.bfloat16):
            slow = [slow_nll(model, encode(tokenizer, row["question"], row["answer"])) for row in mine]
        close(torch.tensor([row["nll"] for row in mine]), torch.tensor(slow), AUTOCAST, scale=torch.tensor(slow))
        assert found["bf16-mixed"][of]["forget"]["nll"] != found["32-true"][of]["forget"]["nll"]
