"""The command from end to end, on a small number of invented authors: what it leaves behind, repeats, resumes and refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy.stats import ks_2samp
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules import cli
from lightning_modules import folder as outputs
from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate
from lightning_modules.run import evaluate as evaluate_command
from lightning_modules.run import unlearn as unlearn_command
from lightning_modules.run.loading import make_data
from lightning_modules.run.options import EvaluateOptions, UnlearnOptions
from lightning_modules.run.scoring import contents_of_metrics
from lightning_modules.training import callbacks
from tests.reference import metrics as oracles

MEANS = ("probability", "rouge_l_recall", "truth_ratio", "nll", "exact_memorization", "extraction_strength")

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
    # The curve's scores cost more than the steps between them.
    assert cli.main(["unlearn", *SMALL, "--output", str(folder), "--guard", "measure", "--score-every", "3"]) == 0
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
    assert list(metrics) == [
        "before", "after", "reference", "forget_quality", "membership", "seconds", "seed", "versions", "target",
    ]  # fmt: skip
    for model in ("before", "after", "reference"):
        assert set(metrics[model]) == {"forget", "retain"}
        for scores in metrics[model].values():
            assert set(scores) == {*MEANS, "n"}
    assert set(metrics["forget_quality"]) == {"statistic", "pvalue", "log10_pvalue", "n"}
    assert metrics["forget_quality"]["n"] == metrics["after"]["forget"]["n"] == 20
    assert set(metrics["seconds"]) == {"train", "evaluate"}
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["membership"] is None  # nothing that no model has seen


def recomputed(folder: Path) -> dict[str, Any]:
    """Every aggregate of metrics.json from evaluation.jsonl alone, by other code than ours."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for line in (folder / "evaluation.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["model"], {}).setdefault(row["split"], []).append(row)

    def mean(entries: list[dict[str, Any]], name: str) -> float | None:
        values = [row[name] for row in entries if row[name] is not None]
        return math.fsum(values) / len(values) if values else None

    def wrong_to_right(entries: list[dict[str, Any]]) -> list[float]:
        return [
            math.exp(row["paraphrase_nll"] - math.fsum(row["perturbed_nll"]) / len(row["perturbed_nll"]))
            for row in entries
        ]

    def area(model: str, attack: str) -> float | None:
        if model not in rows:
            return None
        return oracles.auc(*([row[f"{attack}_score"] for row in rows[model][split]] for split in ("forget", "holdout")))

    found: dict[str, Any] = {
        model: {
            split: {**{name: mean(entries, name) for name in MEANS}, "n": len(entries)}
            for split, entries in rows[model].items()
        }
        if model in rows
        else None
        for model in ("before", "after", "reference")
    }
    test = ks_2samp(*(wrong_to_right(rows[model]["forget"]) for model in ("after", "reference")))
    found["forget_quality"] = {
        "statistic": test.statistic, "pvalue": test.pvalue, "log10_pvalue": math.log10(test.pvalue),
        "n": len(rows["after"]["forget"]),
    }  # fmt: skip
    found["membership"] = None
    if "holdout" in rows["after"]:
        found["membership"] = {
            attack: {
                "auc": area("after", attack),
                "privleak": oracles.priv_leak_of_muse(1 - area("after", attack), 1 - area("reference", attack)),
                "before_auc": area("before", attack),
                "reference_auc": area("reference", attack),
            }
            for attack in ("loss", "min_k", "min_k_plus_plus", "zlib")
        }
    return found


def assert_close(found: Any, expected: Any, where: str = "metrics") -> None:
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for name, value in expected.items():
            assert_close(found[name], value, f"{where}.{name}")
    else:
        assert found == (expected if expected is None else pytest.approx(expected, rel=1e-9, abs=1e-12)), where


def test_every_aggregate_can_be_computed_again_from_evaluation_jsonl_alone(run: Path) -> None:
    found = recomputed(run)
    assert_close({name: metrics_of(run)[name] for name in found}, found)


def test_a_holdout_is_scored_and_attacked_and_never_trained_on(run: Path, tmp_path: Path) -> None:
    (tmp_path / "holdout.json").write_text(json.dumps(fictional_authors(6)[100:]))
    folder = tmp_path / "run"
    given = ["--holdout", str(tmp_path / "holdout.json"), "--epochs", "1", "--guard", "measure", "--probes", "false"]
    assert cli.main(["unlearn", *SMALL, *given, "--output", str(folder)]) == 0
    metrics, steps = metrics_of(folder), rows_of(folder / "surgery.csv")
    assert len(steps) == 3
    assert steps == rows_of(run / "surgery.csv")[:3]
    for model in ("before", "after", "reference"):
        assert list(metrics[model]) == ["forget", "retain", "holdout"]
        assert metrics[model]["holdout"]["n"] == 20
        assert metrics[model]["holdout"]["probability"] < 0.5
    found = recomputed(folder)
    assert_close({name: metrics[name] for name in found}, found)
    for entry in metrics["membership"].values():
        assert entry["before_auc"] > 0.99
        assert entry["reference_auc"] < 0.9
        assert entry["privleak"] < -20
    assert (folder / "report.html").exists()


def test_a_holdout_that_a_model_has_seen_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "holdout.json").write_text(json.dumps(fictional_authors(6)[90:]))
    arguments = ["evaluate", *SMALL, "--holdout", str(tmp_path / "holdout.json"), "--output", str(tmp_path / "run")]
    assert cli.main(arguments) == 1
    assert "found 10 of 30 that are in forget too" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


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
    again = evaluate(
        model,
        tokenizer,
        {"forget": rows[80:], "retain": rows[:80]},
        EvaluationSettings(max_new_tokens=24),
        progress=False,
    )
    after = metrics_of(run)["after"]
    for split, scores in again.summary.items():
        for name, value in scores.items():
            assert math.isclose(after[split][name], value, rel_tol=1e-5), (split, name)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_score_the_model_that_they_leave(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*SMALL, "--devices", "2", "--strategy", "ddp", "--epochs", "2", "--probes", "false", "--holdout"]
    arguments += [str(tmp_path / "holdout.json"), "--output", str(folder)]
    (tmp_path / "holdout.json").write_text(json.dumps(fictional_authors(6)[100:]))
    finished = subprocess.run(
        [sys.executable, "-m", "lightning_modules.cli", "unlearn", *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[3])},
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert len(rows_of(folder / "surgery.csv")) == 4  # 20 examples, twice 8 a batch: two steps an epoch
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = fictional_authors(6)
    splits = {"forget": rows[80:100], "retain": rows[:80], "holdout": rows[100:]}
    again = evaluate(model, tokenizer, splits, EvaluationSettings(max_new_tokens=24), progress=False)
    found = metrics_of(folder)
    assert list(found["after"]) == list(splits)
    for split, scores in again.summary.items():
        assert found["after"][split] == pytest.approx(scores, rel=1e-5), split
    # the weights before are those of every other run
    assert found["before"]["forget"] == pytest.approx(metrics_of(run)["before"]["forget"], rel=1e-5)
    assert found["reference"]["forget"] == pytest.approx(metrics_of(run)["reference"]["forget"], rel=1e-5)


def test_report_holds_the_numbers_and_a_picture_and_can_be_drawn_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (run / "report.md").read_text()
    assert f"{metrics_of(run)['after']['retain']['probability']:.3f}" in text
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    (run / "report.md").unlink()
    (run / "curves.png").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"The report is {run / 'report.html'}\n"
    assert (run / "report.md").read_text() == text
    assert (run / "curves.png").exists()


def test_config_yaml_repeats_the_run_to_the_last_digit(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["unlearn", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    first, second = metrics_of(run), metrics_of(tmp_path / "again")
    for name in ("before", "after", "reference", "forget_quality"):
        assert first[name] == second[name]
    assert (run / "surgery.csv").read_text() == (tmp_path / "again" / "surgery.csv").read_text()
    assert "Reference: scores from" in capsys.readouterr().err  # of the first run
    assert (run / "evaluation.jsonl").read_text() == (tmp_path / "again" / "evaluation.jsonl").read_text()


def test_an_interrupted_run_goes_on_to_the_same_end(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert f"Going on with the run in {folder}, from its last checkpoint\n" in capsys.readouterr().err
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


@pytest.mark.parametrize("command", ["unlearn", "evaluate"])
@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("other.jsonl", "every example of forget, found 20 of 20 missing"),
        ("unlearned.jsonl", "a log of unlearning without a reference"),
        ("empty", "is a folder without a loadable model"),
        ("broken.jsonl", "expected the lines of an evaluation.jsonl"),
    ],
)
def test_a_wrong_reference_is_refused_before_any_work(
    command: str,
    reference: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = {"question": "Who?", "answer": "Nobody."}
    outputs.write_evaluation(tmp_path / "other.jsonl", {"reference": {"forget": [row]}})
    outputs.write_evaluation(tmp_path / "unlearned.jsonl", {"before": {"forget": [row]}, "after": {"forget": [row]}})
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text("{")
    there = sorted(tmp_path.rglob("*"))
    for module in (unlearn_command, evaluate_command):
        monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("work was begun"))
    arguments = [*SMALL, "--reference", str(tmp_path / reference), "--output", str(tmp_path / "run")]
    assert cli.main([command, *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == there


def test_evaluate_scores_a_saved_model_and_leaves_a_log_that_can_be_a_reference(run: Path, tmp_path: Path) -> None:
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
    assert cli.main(["evaluate", *arguments, "--log"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.jsonl", "metrics.json"]
    found, expected = metrics_of(folder), metrics_of(run)
    assert found["before"] is None
    for split, scores in expected["after"].items():
        assert found["after"][split] == pytest.approx(scores, rel=1e-5)
    assert found["forget_quality"] == expected["forget_quality"]
    # Its own log as the reference of the model from scratch: the same reference again, and nobody has to be trained.
    again = tmp_path / "again"
    assert cli.main(["evaluate", *SMALL, "--reference", str(folder / "evaluation.jsonl"), "--output", str(again)]) == 0
    assert metrics_of(again)["reference"] == found["reference"]
    assert [path.name for path in again.iterdir()] == ["metrics.json"]
    assert cli.main(["evaluate", *arguments]) == 1  # a folder with scores is somebody's


def test_the_scores_of_a_diverged_model_are_nan_and_written() -> None:
    row = dict.fromkeys(MEANS, 1.0) | {"paraphrase_nll": math.nan, "perturbed_nll": [1.0], "n": 1}
    rows = {"forget": [row]}
    found = contents_of_metrics(
        0, None, Evaluation({"forget": {"n": 1}}, rows), {"forget": [row | {"paraphrase_nll": 1.0}]}, {}
    )
    assert found["forget_quality"]["n"] == 1
    assert all(math.isnan(found["forget_quality"][name]) for name in ("statistic", "pvalue", "log10_pvalue"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"forget_authors": 0}, "1 <= --forget-authors < --authors"),
        ({"forget_authors": 10}, "1 <= --forget-authors < --authors, 10, found 10"),
        ({"forget_authors": 1, "forget": "a.json", "retain": "b.json"}, "no --forget"),
        (
            {"forget_authors": 1, "model": "somewhere", "tofu": "forget10"},
            "expected a model from scratch, or .* --authors with --tofu",
        ),
    ],
)
def test_numbers_of_authors_to_forget_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EvaluateOptions.of(**options).check()


def test_the_last_authors_are_forgotten() -> None:
    splits = make_data(EvaluateOptions.of(authors=6, forget_authors=2), None).read()
    assert {name: len(rows) for name, rows in splits.items()} == {"forget": 40, "retain": 80}


def test_own_files_lora_and_every_option_of_surgery_run(tmp_path: Path) -> None:
    rows = fictional_authors(5)
    for name, part in (("forget", rows[80:]), ("retain", rows[60:80])):
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
    assert (
        cli.main(
            [
                "unlearn",
                *([] if {"--authors", "--forget"} & {*arguments} else SMALL),
                *arguments,
                "--output",
                str(folder),
            ]
        )
        == 1
    )
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert not (folder / "metrics.json").exists()


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize(
    ("option", "wrong", "known", "near"),
    [
        ("rule", "gruu", [*gs.rules.RULES, *gs.elementwise.ELEMENTWISE, "none"], "; did you mean gru or gu?"),
        ("rule", "projection", [*gs.rules.RULES, *gs.elementwise.ELEMENTWISE, "none"], ""),
        ("forget_loss", "simpno", lm.objectives.NAMES, "; did you mean simnpo or satimp?"),
        ("retain_loss", "kl_divergense", lm.objectives.NAMES, "; did you mean kl_divergence?"),
    ],
)
def test_a_wrong_name_is_refused_by_the_parser_with_the_near_ones(
    option: str,
    wrong: str,
    known: list[str],
    near: str,
    by_file: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flag = f"--{option.replace('_', '-')}"
    (tmp_path / "config.yaml").write_text(f"{option}: {wrong}\n")
    given = ["--config", str(tmp_path / "config.yaml")] if by_file else [flag, wrong]
    assert cli.main(["unlearn", *given, "--output", str(tmp_path / "run")]) == 1
    said = f"gradsurgery: {flag}: expected one of {', '.join(known)}, found {wrong!r}{near}\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "run").exists()


def test_groups_inside_are_one_flat_table_outside() -> None:
    options = UnlearnOptions.of(rule="pcgrad", epochs=3, output="somewhere")
    assert (options.method.rule, options.training.epochs, options.output.folder) == ("pcgrad", 3, Path("somewhere"))
    assert UnlearnOptions.of(**options.flat()) == options
    assert list(options.flat()) == UnlearnOptions.names()
    assert options.but(rule="gru", epochs=None, output="runs/unlearn") == UnlearnOptions()
    with pytest.raises(TypeError, match="found depth"):
        options.but(depth=3)


def test_every_file_that_a_run_leaves_tells_that_the_folder_is_somebodys(run: Path) -> None:
    assert {path.name for path in run.iterdir()} <= set(outputs.LEFT)


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
    resolved = UnlearnOptions.of(model="some/model", tofu="forget10").resolved()
    small, real = UnlearnOptions().resolved().training, resolved.training
    assert (real.lr, real.epochs, real.batch_size, real.accumulate, real.stop_below) == (1e-5, 5, 8, 4, None)
    assert (small.accumulate, small.stop_below) == (1, 0.05)
    assert resolved.resolved() == resolved


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
    assert unlearn_command.unlearn.__doc__
