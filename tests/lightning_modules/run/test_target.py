"""A run is driven by its target: where it ends, with which learning rate, and what it says where it did not get there."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from safetensors.torch import load_file

from lightning_modules import cli
from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.data.tokenization import encode, padding_id
from lightning_modules.report import figures
from lightning_modules.report.changed import changed_options
from lightning_modules.run import methods, reference_log, report, settling
from lightning_modules.run.options import UnlearnOptions, fitted, most_steps
from lightning_modules.run.run import Run
from lightning_modules.training.callbacks import TradeoffCurve
from lightning_modules.training.finetuning import FinetuningDataModule, FinetuningSettings, taught_alone
from lightning_modules.training.scratch import ScratchSettings, scratch_model
from tests.lightning_modules.evaluation.evaluation_workers import model_and_tokenizer

ROWS = fictional_authors(1)[:14]
FORGET, RETAIN = ROWS[:5], ROWS[5:]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Pictures are half of the time of so small a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "drawn", lambda _: {})
        patch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(b"a picture"))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with dropout that knows the answers, `taught`, one that knows none, `plain`, and the data."""
    root = tmp_path_factory.mktemp("target")
    small = ScratchSettings(hidden_size=32, num_layers=1, num_heads=2, epochs=1)
    model, tokenizer = scratch_model(ROWS, small, cache_dir=root / "cache")
    model.save_pretrained(root / "plain")
    encoded = [encode(tokenizer, str(row["question"]), str(row["answer"])) for row in ROWS]
    lesson = FinetuningSettings(epochs=60, lr=1e-2)
    data = FinetuningDataModule(encoded, padding_id(tokenizer), lesson)
    taught_alone(model, data, lesson, device=torch.device("cpu"))
    model.config.attention_dropout = 0.2  # so that every batch draws random numbers
    model.save_pretrained(root / "taught")
    for name in ("plain", "taught"):
        tokenizer.save_pretrained(root / name)
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        (root / f"{name}.json").write_text(json.dumps(rows))
    return root


def command(world: Path, output: Path, *further: str, model: str = "taught") -> list[str]:
    files = [text for name in ("forget", "retain") for text in (f"--{name}", str(world / f"{name}.json"))]
    small = [
        "--batch-size",
        "2",
        "--max-new-tokens",
        "2",
        "--precision",
        "32-true",
        "--devices",
        "1",
        "--recipe",
        "paper",
    ]
    return ["unlearn", "--model", str(world / model), *files, *small, "--output", str(output), *further]


def ran(folder: Path) -> Any:
    return yaml.safe_load((folder / "config.yaml").read_text())


def metrics(folder: Path) -> Any:
    return json.loads((folder / "metrics.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def first(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of somebody who names neither a target nor a learning rate."""
    folder = tmp_path_factory.mktemp("first") / "run"
    assert cli.main(command(world, folder)) == 0
    return folder


def test_it_ends_below_its_target_before_its_last_step_and_says_how(first: Path) -> None:
    config, found = ran(first), metrics(first)
    assert (config["stop_below"], found["target"]["forget_probability"]) == (0.05, 0.05)
    assert found["target"]["reached"]
    assert found["target"]["found"] < 0.05
    with (first / "curve.csv").open() as file:
        curve = [float(row["forget"]) for row in csv.DictReader(file)]
    assert curve[-1] == found["target"]["found"]
    assert all(value >= 0.05 for value in curve[:-1])
    steps = len((first / "surgery.csv").read_text().splitlines()) - 1
    most = most_steps(UnlearnOptions.of(**config).training, len(FORGET))
    assert steps == found["target"]["steps"] < most
    assert found["before"]["forget"]["probability"] > 0.5 > 0.1 > found["after"]["forget"]["probability"]
    report = (first / "report.md").read_text()
    assert f"The learning rate, {config['lr']:g}, was found from " in report
    assert "The target was not reached" not in report


def test_the_report_names_as_not_the_default_what_was_given_and_nothing_that_the_run_chose(first: Path) -> None:
    listed = set(changed_options(ran(first), report.defaults(first)))
    paper = {
        "--recipe",
        "--ema-decay",
        "--retain-weight",
        "--guard",
        "--keep-asked-words",
    }  # of the recipe that was given, not of the usual one
    assert listed == {"--model", "--forget", "--retain", "--batch-size", "--max-new-tokens", "--devices"} | paper


def test_the_rate_is_found_again_and_config_yaml_repeats_the_run_without_a_search(
    first: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "fit", stop)
    assert cli.main(command(world, tmp_path / "again", "--lr", "auto")) == 130
    assert ran(tmp_path / "again") | {"output": ""} == ran(first) | {"output": ""}
    monkeypatch.undo()
    monkeypatch.setattr(settling, "trial", stop)
    assert cli.main(["unlearn", "--config", str(first / "config.yaml"), "--output", str(tmp_path / "repeated")]) == 0
    same(first, tmp_path / "repeated")


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def same(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_trial_step_sees_the_batches_of_all_processes_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or two processes with half a batch each would have another rate than one."""
    seen: list[tuple[int, int, bool]] = []

    def tried(module: Any, data: Any, *_: Any, **trainer: Any) -> Any:
        surgery = module.make_surgery(torch.optim.SGD(module.named_parameters(), lr=0.1))
        seen.append((data.batch_size, trainer["accumulate_grad_batches"], surgery._options.accumulate))
        raise KeyboardInterrupt

    monkeypatch.setattr(settling, "trial", tried)
    model, tokenizer = model_and_tokenizer()
    encoded = {split: [encode(tokenizer, "Who?", "Ada")] for split in ("forget", "retain")}
    for devices, accumulate in (("1", 1), ("2", 1), ("2", 3)):
        given: dict[str, Any] = {"model": "m", "forget": "f.json", "retain": "r.json", "lr": "auto", "batch_size": 2}
        options = UnlearnOptions.of(**given, devices=devices, accumulate=accumulate)
        run: Any = Run(options.resolved(), Path(), {"forget": FORGET, "retain": RETAIN}, tokenizer)
        with pytest.raises(KeyboardInterrupt):
            settling.settle_rate(run, model, None, TradeoffCurve(encoded, pad_token_id=0))
    assert seen == [(2, 1, False), (2, 2, True), (2, 6, True)]


@pytest.mark.parametrize("moment", [(settling, "trial"), (methods, "fit"), (methods, "ended")], ids=lambda x: x[1])
def test_a_run_that_is_interrupted_is_resumed_with_the_rate_and_the_target_that_it_had(
    moment: tuple[Any, str], first: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*moment, stop)
        assert cli.main(command(world, tmp_path / "run")) == 130
    assert ran(tmp_path / "run")["lr"] == ("auto" if moment[1] == "trial" else ran(first)["lr"])
    with monkeypatch.context() as patch:
        if moment[1] != "trial":
            patch.setattr(settling, "trial", stop)  # it is not searched again
        again = ["unlearn", "--resume", "--lr", "auto", "--output", str(tmp_path / "run")]
        assert cli.main(again) == 0
    same(first, tmp_path / "run")
    assert ran(tmp_path / "run") | {"output": ""} == ran(first) | {"output": ""}
    for name in ("surgery.csv", "curve.csv", "training.json"):
        assert (tmp_path / "run" / name).read_bytes() == (first / name).read_bytes()


def test_a_run_with_a_rate_of_its_own_is_not_resumed_with_another(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(methods, "fit", stop)
    assert cli.main(command(world, tmp_path / "run", "--lr", "1e-4", "--stop-below", "0.2")) == 130
    assert cli.main(["unlearn", "--resume", "--lr", "auto", "--output", str(tmp_path / "run")]) == 1
    assert "--lr auto (there it is 0.0001)" in capsys.readouterr().err


def test_a_reference_is_scored_once_before_the_training_and_its_level_is_the_target(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    rows, fit = reference_log.reference_rows, methods.fit
    monkeypatch.setattr(settling, "reference_rows", lambda *a, **k: (seen.append("reference"), rows(*a, **k))[1])
    monkeypatch.setattr(methods, "fit", lambda *a, **k: (seen.append("fit"), fit(*a, **k))[1])
    monkeypatch.setattr("lightning_modules.run.unlearn.reference_rows", stop)
    given = ["--reference", str(world / "plain"), "--reference-cache", "false", "--lr", "3e-3"]
    assert cli.main(command(world, tmp_path / "run", *given)) == 0
    assert seen == ["reference", "fit"]
    found = metrics(tmp_path / "run")
    level = found["reference"]["forget"]["probability"]
    assert math.isclose(found["target"]["forget_probability"], level, rel_tol=1e-12)
    assert ran(tmp_path / "run")["stop_below"] == found["target"]["forget_probability"]
    assert f"is below {level:.3f} (the reference's own)" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("keeping", "also"),
    [("false", ""), ("true", ", or forget the words of the questions too, --keep-asked-words false")],
)
def test_a_target_that_was_not_reached_is_said_with_what_to_raise(
    keeping: str, also: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--lr", "1e-6", "--epochs", "1", "--keep-asked-words", keeping)
    assert cli.main(command(world, tmp_path / "run", *flags)) == 0
    target = metrics(tmp_path / "run")["target"]
    assert not target["reached"]
    assert target["steps"] == 3
    said = (
        "The target was not reached: the run took 3 optimizer steps and ended with a mean probability of the scored forget answers of "
        f"{target['found']:.3f}, which was to fall below 0.05; raise --lr, or --steps or --epochs{also}, in a new run."
    )
    assert " ".join(capsys.readouterr().out.split()).count(said) == 1
    assert said in (tmp_path / "run" / "report.md").read_text()
    assert said in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--finish-steps", "10"), "the finish after it brought it back; take fewer --finish-steps"),
        (("--best-below", "0.9"), "its weights are of an earlier step; take a lower --best-below"),
    ],
)
def test_a_target_that_the_saved_model_is_above_again_was_not_reached(
    given: tuple[str, ...], said: str, world: Path, tmp_path: Path
) -> None:
    flags = ("--stop-below", "0.2", "--lr", "3e-3", "--score-every", "1", *given)
    assert cli.main(command(world, tmp_path / "run", *flags)) == 0
    found, target = metrics(tmp_path / "run"), metrics(tmp_path / "run")["target"]
    assert target["trained"] < 0.2 < target["found"]
    assert not target["reached"]
    assert math.isclose(target["found"], found["after"]["forget"]["probability"], rel_tol=1e-4)
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"training had come to {target['trained']:.3f}, and {said}" in report


@pytest.mark.parametrize(
    ("given", "steps", "said"),
    [
        ([], 3, "a run usually ends below 0.05; this one takes all its steps"),
        (["--stop-below", "0.9"], 0, "--stop-below is 0.9; no step is taken"),
        (["--reference", "plain", "--lr", "1e-4"], 3, "that of the reference, which never saw them, is 0.0"),
        (["--reference", "taught", "--lr", "1e-4"], 3, "a run usually ends below 0.1"),
    ],
)
def test_where_there_is_nothing_to_forget_it_is_said_before_and_after(
    given: list[str], steps: int, said: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(world / text) if text in ("taught", "plain") else text for text in given]
    assert cli.main(command(world, tmp_path / "run", "--epochs", "1", *given, model="plain")) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "Warning: There is nothing to forget: the mean probability of the forget answers is " in shown
    assert said in shown
    report = (tmp_path / "run" / "report.md").read_text()
    assert "There is nothing to forget" in report
    assert "not reached" not in report
    table = tmp_path / "run" / "surgery.csv"
    assert (len(table.read_text().splitlines()) - 1 if table.exists() else 0) == steps
    assert ran(tmp_path / "run")["lr"] == (1e-4 if "--lr" in given else 1e-5)


@pytest.mark.parametrize("examples", [1, 7, 20, 40, 100, 200, 400, 4000])
def test_defaults_leave_enough_steps_for_any_number_of_examples(examples: int) -> None:
    training = fitted(UnlearnOptions.of(model="some/model", devices="1"), examples).training
    assert most_steps(training, examples) >= 40
    assert 1 <= (training.accumulate or 0) <= 4
    assert (training.epochs or 0) >= 5
    assert training.lr == "auto"
    keeping = UnlearnOptions.of(model="some/model", devices="1", keep_asked_words=True)
    assert most_steps(fitted(keeping, examples).training, examples) >= 80
    mine = fitted(UnlearnOptions.of(model="some/model", lr=1e-3, accumulate=7, steps=2), examples).training
    assert (mine.lr, mine.accumulate, mine.steps, mine.epochs) == (1e-3, 7, 2, None)


def test_defaults_for_all_of_tofu_are_the_papers_and_those_from_scratch_and_of_uld_stay() -> None:
    plain = UnlearnOptions.of(model="some/model", devices="1", recipe="paper")
    usual, found = plain.resolved().training, fitted(plain, 400).resolved().training
    assert (found.accumulate, found.epochs) == (usual.accumulate, usual.epochs) == (4, 5)
    for options in (UnlearnOptions(), UnlearnOptions.of(model="some/model", method="uld")):
        assert fitted(options, 8) == options
