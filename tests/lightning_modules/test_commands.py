"""The command from end to end, on a small number of invented authors: what it leaves behind, repeats, resumes and refuses."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradsurgery as gs
from lightning_modules import callbacks, cli, commands
from lightning_modules.evaluation import evaluate
from lightning_modules.fictional_authors import fictional_authors
from lightning_modules.options import UnlearnOptions

# Five authors, the last of them forgotten: half a minute of training in the first test, then cached.
SMALL = ["--authors", "5", "--max-new-tokens", "24"]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, _cache: None) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert cli.main(["unlearn", *SMALL, "--output", str(folder), "--guard", "measure"]) == 0
    return folder


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_forgets_what_it_should_and_keeps_what_it_should(run: Path) -> None:
    metrics = metrics_of(run)
    assert metrics["before"]["forget"]["probability"] > 0.9
    assert metrics["after"]["forget"]["probability"] < 0.1
    assert (
        metrics["after"]["retain"]["probability"] > 0.7
    )  # 0.8 is the promise for ten authors; five share more of the model
    assert metrics["reference"]["forget"]["probability"] < 0.1


def test_metrics_json_has_the_documented_form(run: Path) -> None:
    metrics = metrics_of(run)
    assert list(metrics) == ["before", "after", "reference", "forget_quality", "seconds", "seed", "versions"]
    for model in ("before", "after", "reference"):
        assert set(metrics[model]) == {"forget", "retain"}
        for scores in metrics[model].values():
            assert set(scores) == {"probability", "rouge_l_recall", "truth_ratio", "nll", "n"}
    assert set(metrics["forget_quality"]) == {"statistic", "pvalue", "log10_pvalue", "n"}
    assert metrics["forget_quality"]["n"] == metrics["after"]["forget"]["n"] == 20
    assert set(metrics["seconds"]) == {"train", "evaluate"}
    assert metrics["versions"]["torch"] == torch.__version__


def test_surgery_csv_has_a_row_for_every_step_that_agrees_with_itself(run: Path) -> None:
    rows = rows_of(run / "surgery.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        value = {name: float(entry) for name, entry in row.items()}
        forget, retain = value["coefficient_forget"], value["coefficient_retain"]
        product = value["cosine"] * value["norm_forget"] * value["norm_retain"]
        assert value["conflict"] == (product < 0)
        along = forget * product + retain * value["norm_retain"] ** 2
        assert math.isclose(value["predicted_change_retain"], -along, rel_tol=1e-9, abs_tol=1e-9)
        assert value["predicted_change_retain"] <= 1e-9  # what GRU promises of the gradient
        assert value["update_norm"] <= 1.0 + 1e-6  # --max-norm
    assert any(float(row["actual_change_retain"]) > 0 for row in rows)  # and what AdamW makes of it


def test_the_saved_model_is_the_one_that_was_scored(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    rows = fictional_authors(5)
    again = evaluate(model, tokenizer, {"forget": rows[80:], "retain": rows[:80]}, max_new_tokens=24, progress=False)
    after = metrics_of(run)["after"]
    for split, scores in again.summary.items():
        for name, value in scores.items():
            assert math.isclose(after[split][name], value, rel_tol=1e-5), (split, name)


def test_report_holds_the_numbers_and_a_picture_and_can_be_drawn_again(run: Path) -> None:
    text = (run / "report.md").read_text()
    assert f"{metrics_of(run)['after']['retain']['probability']:.3f}" in text
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    (run / "report.md").unlink()
    (run / "curves.png").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.md").read_text() == text
    assert (run / "curves.png").exists()


def test_config_yaml_repeats_the_run_to_the_last_digit(run: Path, tmp_path: Path) -> None:
    assert cli.main(["unlearn", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    first, second = metrics_of(run), metrics_of(tmp_path / "again")
    for name in ("before", "after", "reference", "forget_quality"):
        assert first[name] == second[name]
    assert (run / "surgery.csv").read_text() == (tmp_path / "again" / "surgery.csv").read_text()


def test_an_interrupted_run_goes_on_to_the_same_end(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, score = tmp_path / "interrupted", callbacks.TradeoffCurve._score
    stop = len(rows_of(run / "surgery.csv")) // 2

    def interrupted(self: callbacks.TradeoffCurve, trainer: Any, module: Any) -> None:
        if trainer.global_step >= stop:
            raise KeyboardInterrupt
        score(self, trainer, module)

    config = ["--config", str(run / "config.yaml"), "--output", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.TradeoffCurve, "_score", interrupted)
        assert cli.main(["unlearn", *config]) == 130
    assert not (folder / "metrics.json").exists()
    started: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            callbacks.TradeoffCurve,
            "on_train_start",
            lambda self, trainer, module: started.append(trainer.global_step),
        )
        assert cli.main(["unlearn", "--resume", "--output", str(folder)]) == 0
    assert 0 < started[0] <= stop  # from the last finished epoch, and not from the start
    assert metrics_of(folder)["after"] == metrics_of(run)["after"]
    assert (folder / "surgery.csv").read_text() == (run / "surgery.csv").read_text()
    assert (folder / "curve.csv").read_text() == (run / "curve.csv").read_text()


def test_resume_refuses_other_options_than_the_run_was_started_with(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    assert cli.main(["unlearn", "--resume", "--lr", "1e-3", "--output", str(tmp_path)]) == 1
    assert "--lr" in capsys.readouterr().err


def test_a_failed_start_leaves_the_folder_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (
        ["--ema-decay", "1.5"],
        ["--rule-options", "{alpha: 5}"],
        ["--rule", "hamu"],
        ["--lr", "-1"],
        ["--devices", "x"],
    ):
        assert cli.main(["unlearn", *SMALL, *wrong, "--output", str(tmp_path / "run")]) == 1
        assert "Traceback" not in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_reference_about_other_questions_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = fictional_authors(6)
    for name, part in (("forget", rows[100:]), ("retain", rows[:80])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    arguments = [
        "--forget",
        str(tmp_path / "forget.json"),
        "--retain",
        str(tmp_path / "retain.json"),
        "--max-new-tokens",
        "1",
    ]
    arguments += ["--model", str(run / "model"), "--reference", str(run / "evaluation.jsonl")]
    assert cli.main(["evaluate", *arguments, "--output", str(tmp_path / "run")]) == 1
    assert "20 of 20 missing" in capsys.readouterr().err


def test_evaluate_scores_a_saved_model_and_writes_metrics_only(run: Path, tmp_path: Path) -> None:
    rows = fictional_authors(5)
    for name, part in (("forget", rows[80:]), ("retain", rows[:80])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    data = [
        "--forget",
        str(tmp_path / "forget.json"),
        "--retain",
        str(tmp_path / "retain.json"),
        "--max-new-tokens",
        "24",
    ]
    folder = tmp_path / "evaluated"
    arguments = [
        "--model",
        str(run / "model"),
        *data,
        "--reference",
        str(run / "evaluation.jsonl"),
        "--output",
        str(folder),
    ]
    assert cli.main(["evaluate", *arguments]) == 0
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]
    found, expected = metrics_of(folder), metrics_of(run)
    assert found["before"] is None
    for split, scores in expected["after"].items():
        assert found["after"][split] == pytest.approx(scores, rel=1e-5)
    assert found["forget_quality"] == expected["forget_quality"]


def test_own_files_lora_and_every_option_of_surgery_run(tmp_path: Path) -> None:
    rows = fictional_authors(5)
    for name, part in (("forget", rows[80:]), ("retain", rows[:80])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    folder = tmp_path / "lora"
    arguments = [
        "--forget",
        str(tmp_path / "forget.json"),
        "--retain",
        str(tmp_path / "retain.json"),
        "--lora-rank",
        "2",
    ]
    arguments += ["--forget-loss", "inverted_hinge", "--rule", "pcgrad", "--scope", "tensor", "--metric", "optimizer"]
    arguments += [
        "--guard",
        "update",
        "--ema-decay",
        "null",
        "--retain-weight",
        "0.5",
        "--accumulate",
        "2",
        "--epochs",
        "1",
    ]
    assert (
        cli.main(["unlearn", *arguments, "--output", str(folder), "--max-new-tokens", "2", "--precision", "bf16-mixed"])
        == 0
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["ema_decay"] is None
    assert config["accumulate"] == 2
    assert len(rows_of(folder / "surgery.csv")) == 2  # 20 examples, 8 a batch, 2 batches a step, and the rest
    model = AutoModelForCausalLM.from_pretrained(folder / "model")  # the adapters are merged
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--forget", "missing.json", "--retain", "missing.json"], "missing.json"),
        (["--forget", "missing.json"], "--forget and --retain together"),
        (["--model", "gpt2"], "which answers"),
        (["--tofu-dir", "somewhere"], "--tofu with --tofu-dir"),
        (["--tofu", "forget10", "--tofu-dir", "/nonexistent"], "nonexistent"),
        (["--authors", "3"], "at least 5 authors"),
        (["--batch-size", "0"], "--batch-size"),
        (["--rule", "grue"], "gru"),
        (["--optimizer", "AdamZ"], "torch.optim"),
        (["--optimizer", "LBFGS"], "weight_decay"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_leaves_no_run(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "wrong"
    assert cli.main(["unlearn", *([] if "--authors" in arguments else SMALL), *arguments, "--output", str(folder)]) == 1
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert not (folder / "metrics.json").exists()


def test_a_run_is_never_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert cli.main(["unlearn", *SMALL, "--output", str(run)]) == 1
    assert "earlier run" in capsys.readouterr().err
    assert cli.main(["unlearn", "--resume", "--output", str(run)]) == 1
    assert "finished" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert cli.main(["unlearn", *SMALL, "--output", str(tmp_path / "file" / "run")]) == 1
    assert "can be written" in capsys.readouterr().err


def test_an_empty_forget_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "retain.json").write_text(json.dumps(fictional_authors(1)))
    arguments = ["--forget", str(tmp_path / "empty.json"), "--retain", str(tmp_path / "retain.json")]
    assert cli.main(["unlearn", *arguments, "--output", str(tmp_path / "run")]) == 1
    assert "empty.json" in capsys.readouterr().err


def test_a_nan_loss_stops_the_run_and_names_the_objective(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        gs.losses.LOSSES, "ceu", lambda logits, labels: gs.losses.cross_entropy(logits, labels) * torch.nan
    )
    assert cli.main(["unlearn", *SMALL, "--output", str(tmp_path / "run")]) == 1
    assert "'forget'" in capsys.readouterr().err


def test_options_resolve_to_values_that_depend_on_nothing() -> None:
    small, real = UnlearnOptions().resolved(), UnlearnOptions(model="some/model", tofu="forget10").resolved()
    assert (real.lr, real.epochs, real.batch_size, real.accumulate, real.stop_below) == (1e-5, 5, 8, 4, None)
    assert (small.accumulate, small.stop_below) == (1, 0.05)
    assert real.resolved() == real


def test_every_option_has_a_flag_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["unlearn", "--help"])
    shown = capsys.readouterr().out
    for flag in [
        "model",
        "forget",
        "retain",
        "tofu",
        "tofu-dir",
        "forget-loss",
        "rule",
        "ema-decay",
        "retain-weight",
        "guard",
        "scope",
        "optimizer",
        "lr",
        "epochs",
    ]:
        assert f"--{flag}" in shown
    assert commands.unlearn.__doc__
