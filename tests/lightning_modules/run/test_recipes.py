"""Recipes, and the finish: named options that others override, recorded so that they repeat, resumed exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_modules import cli
from lightning_modules.data.examples import as_example
from lightning_modules.run import methods, report
from lightning_modules.run.finish import substitute_answers
from lightning_modules.run.options import RECIPES, UnlearnOptions
from lightning_modules.run.options.method import MethodOptions
from lightning_modules.run.show import show_recipe
from lightning_modules.training.perturb import PerturbSettings
from tests.lightning_modules.run.small_runs import small_run

DEEP = {"start": 0.2, "end": 2.0}


def test_the_recipe_called_paper_is_the_defaults() -> None:
    assert UnlearnOptions.of(recipe="paper") == UnlearnOptions.of() == UnlearnOptions()


def test_a_model_that_is_given_learns_other_answers_inside_or_those_of_a_teacher_in_a_finish() -> None:
    def found(**own: Any) -> tuple[Any, ...]:
        options = UnlearnOptions.of(recipe="deep", model="m", tofu="forget10", **own).resolved()
        options.check()
        method, training = options.method, options.training
        return (
            method.substitute_weight,
            options.finish.finish_steps,
            training.steps,
            method.radius,
            method.retain_weight,
        )

    assert found() == (1.0, 0, 36, "auto", 20.0)
    assert found(teacher="base") == (0.0, 16, 32, "auto", 20.0)
    assert found(teacher="base", finish_steps=4) == (0.0, 4, 32, "auto", 20.0)


def test_what_a_recipe_sets_that_nobody_named_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def said(**given: Any) -> str:
        show_recipe(UnlearnOptions.of(**given), given)
        return capsys.readouterr().err

    model = {"model": "m", "tofu": "forget10"}
    expected = (
        "Recipe balanced, as no --recipe was given: --ema-decay 0.7 --guard update --keep-asked-words true; --recipe paper leaves them "
        "out\n"
    )
    assert said(**model, retain_weight=5.0) == expected
    assert not said() + said(**model, recipe="balanced") + said(**model, method="uld")


@pytest.mark.parametrize(
    ("given", "weight", "keeps"),
    [
        ({"tofu": "forget10"}, 15.0, True),
        ({"forget": "f.json", "retain": "r.json", "forget_loss": "npo"}, 15.0, True),
        ({"tofu": "forget10", "keep_asked_words": False}, 50.0, False),
        ({"tofu": "forget10", "forget_loss": "idk"}, 50.0, False),
        ({"tofu": "forget10", "forget_loss": "dpo"}, 50.0, False),
        ({"tofu": "forget10", "forget_loss": "kl_divergence", "teacher": "base"}, 50.0, False),
        ({"muse": "news"}, 50.0, False),
        ({"wmdp": "cyber"}, 50.0, False),
        ({"forget": "f.json", "retain": "r.json", "ledger": "l"}, 50.0, False),
    ],
)
def test_balanced_leaves_the_words_of_questions_alone_where_answers_to_them_are_forgotten(
    given: dict[str, Any], weight: float, keeps: bool
) -> None:
    options = UnlearnOptions.of(model="m", **given)
    options.check()
    assert (options.recipe.recipe, options.method.retain_weight) == ("balanced", weight)
    assert options.method.keep_asked_words is keeps
    recorded = options.resolved().recorded()
    usual = report.defaults().usual(recorded)
    listed = {name for name in ("recipe", "retain_weight", "keep_asked_words") if usual[name] != recorded[name]}
    assert listed == ({"retain_weight", "keep_asked_words"} if "keep_asked_words" in given else set())


def test_a_radius_that_does_not_grow_is_a_number() -> None:
    assert MethodOptions(radius=0.3).perturb() == MethodOptions(radius={"start": 0.3}).perturb() == PerturbSettings(0.3)


def test_options_that_are_given_win_over_the_recipe() -> None:
    plain, deep = UnlearnOptions().flat(), UnlearnOptions.of(recipe="deep").flat()
    said = {"recipe": "deep", "lr": 1e-3, "steps": 76, "radius": DEEP, "finish_steps": 6, "accumulate": 1}
    said |= {"retain_loss": "kl_divergence", "retain_noise": 0.5, "optimizer_options": {"eps": 1e-4}, "batch_size": 40}
    said |= {"ema_decay": 0.7, "retain_weight": 10.0, "guard": "update", "lr_schedule": "linear"}
    said |= {"substitute_weight": 1.0}
    assert {name: value for name, value in deep.items() if value != plain[name]} == said | {
        "stop_below": 0.0,
        "score_every": 4,
    }
    own = {"retain_weight": 3.0, "radius": {"start": 0.1}, "finish_steps": 0, "epochs": 2}
    mine = UnlearnOptions.of(recipe="deep", **own)
    mine.check()
    assert {name: value for name, value in mine.flat().items() if value != deep[name]} == own | {"steps": None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_came_to_repeats_the_run(recipe: str) -> None:
    """As config.yaml holds it: also where a later version has another recipe of that name."""
    own = {"model": "m", "tofu": "forget10", "teacher": "base"} if recipe == "imitate" else {}
    once = UnlearnOptions.of(recipe=recipe, **own).resolved()
    once.check()
    again = UnlearnOptions.of(**once.recorded())
    again.check()
    assert again == again.resolved() == once
    assert UnlearnOptions.of(**once.recorded() | {"recipe": "paper"}).flat() | {"recipe": recipe} == once.flat()


FIRST: dict[str, Any] = {"model": "base", "tofu": "forget10", "finetune_first": True}


@pytest.mark.parametrize(
    ("given", "recipe", "teacher"),
    [
        (FIRST | {"recipe": "imitate"}, "imitate", "base"),
        (FIRST | {"recipe": "imitate", "teacher": "mine"}, "imitate", "mine"),
        (FIRST | {"recipe": "imitate", "forget_loss": "undial", "loss_options": {"beta": 1.0}}, "imitate", "base"),
        (FIRST, "balanced", None),
        (FIRST | {"recipe": "deep"}, "deep", None),
    ],
)
def test_a_model_that_is_taught_first_imitates_itself_as_it_was(
    given: dict[str, Any], recipe: str, teacher: str | None
) -> None:
    found = UnlearnOptions.of(**given)
    found.check()
    assert (found.recipe.recipe, found.method.teacher) == (recipe, teacher)
    assert found.method.imitates == (recipe == "imitate")


@pytest.mark.parametrize(("beside", "kept"), [({}, True), ({"tofu": None, "muse": "news"}, False)])
def test_who_imitates_leaves_the_words_of_questions_alone(beside: dict[str, Any], kept: bool) -> None:
    found = UnlearnOptions.of(**FIRST | {"recipe": "imitate", "finetune_first": False, "teacher": "base"} | beside)
    found.check()
    assert (found.method.keep_asked_words, found.method.forget_loss) == (kept, "undial")


@pytest.fixture(scope="module")
def deep_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    assert cli.main(arguments(folder)) == 0
    return folder


def arguments(folder: Path, *further: str) -> list[str]:
    own = ["--recipe", "deep", "--radius", "{start: 0.1, end: 0.3}", "--finish-steps", "3", "--steps", "4"]
    own += ["--retain-anchor", "100"]
    given = small_run(folder, *own, *further)
    epochs = given.index("--epochs")
    return given[:epochs] + given[epochs + 2 :]


def test_a_deep_run_leaves_its_options_its_steps_and_a_finished_model(deep_run: Path) -> None:
    config = yaml.safe_load((deep_run / "run" / "config.yaml").read_text())
    assert config["radius"] == {"start": 0.1, "end": 0.3}
    assert (config["recipe"], config["steps"], config["epochs"], config["guard"]) == ("deep", 4, None, "update")
    assert (config["finish_steps"], config["finish_lr"]) == (3, config["lr"] / 2)
    assert len((deep_run / "run" / "surgery.csv").read_text().splitlines()) == 1 + 4
    assert not (Path.cwd() / "checkpoints").exists()


def test_it_is_repeated_bit_for_bit_by_its_config_and_by_resuming_after_or_in_the_finish(
    deep_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(deep_run / "run" / "model" / "model.safetensors")
    again = ["unlearn", "--config", str(deep_run / "run" / "config.yaml"), "--output"]
    assert cli.main([*again, str(tmp_path / "again")]) == 0
    finish = methods.finish

    def interrupted(*arguments: Any) -> None:
        finish(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(methods, "finish", interrupted)
        assert cli.main([*again, str(tmp_path / "resumed")]) == 130
    assert not (tmp_path / "resumed" / "metrics.json").exists()
    assert cli.main(["unlearn", "--resume", "--output", str(tmp_path / "resumed")]) == 0
    for name in ("again", "resumed"):
        found = load_file(tmp_path / name / "model" / "model.safetensors")
        assert all(torch.equal(found[key], value) for key, value in weights.items()), name


@pytest.mark.parametrize(
    "stage",
    [
        ("--steps", "4", "--lr", "1e-3", "--finish-steps", "0"),
        ("--steps", "1", "--lr", "1e-9", "--finish-steps", "4", "--finish-lr", "1e-3"),
    ],
    ids=["training", "finish"],
)
def test_an_anchor_holds_the_weights_in_every_stage(tmp_path: Path, stage: tuple[str, ...]) -> None:
    moved = []
    for strength in ("0", "1e9"):
        folder = tmp_path / strength
        folder.mkdir()
        assert cli.main(arguments(folder, "--retain-anchor", strength, "--radius", "{}", *stage)) == 0
        start, found = (load_file(folder / name / "model.safetensors") for name in ("model", "run/model"))
        moved.append(max(float((found[name] - value).abs().max()) for name, value in start.items() if "norm" in name))
    assert moved[1] < 1e-3 * moved[0]


def test_the_finish_teaches_the_substitutes(tmp_path: Path) -> None:
    """Measured by their probability, which is that of a holdout, with and without it."""
    folder = tmp_path
    arguments(folder)  # writes the files
    rows = json.loads((folder / "forget.json").read_text())
    given = [{"question": row["question"], "answer": "Nobody knows."} for row in rows]
    (folder / "substitutes.json").write_text(json.dumps(given))
    holdout = ["--holdout", str(folder / "substitutes.json"), "--lr", "2e-2"]
    scores: dict[str, float] = {}
    for name, own in {
        "none": ["--finish-steps", "0"],
        "short": ["--substitutes", str(folder / "substitutes.json"), "--finish-steps", "20"],
    }.items():
        assert cli.main([*arguments(folder, *holdout, *own), "--output", str(folder / name)]) == 0
        metrics = json.loads((folder / name / "metrics.json").read_text())
        scores[name] = metrics["after"]["holdout"]["probability"]
    assert scores["short"] > 2 * scores["none"]


def test_substitutes_of_a_conversation_are_said_after_its_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "You are Bo."}, {"role": "user", "content": "Where?"}]
    forget = as_example({"messages": [*turns, {"role": "assistant", "content": "In Ros."}]})
    (tmp_path / "s.json").write_text(json.dumps([{"question": "You are Bo.\nWhere?", "answer": "In Pel."}]))
    options = UnlearnOptions.of(finish_steps=1, substitutes=str(tmp_path / "s.json"))
    (row,) = substitute_answers(options, {"forget": [forget], "retain": [forget]})
    assert row["messages"] == [*turns, {"role": "assistant", "content": "In Pel."}]
    assert row["answer"] == "In Pel."


REFUSED = [
    (
        ["--recipe", "deeep"],
        "--recipe: expected one of paper, balanced, deep, imitate, found 'deeep'; did you mean deep?",
    ),
    *(
        (
            ["--recipe", name, "--method", "uld"],
            f"gradsurgery: --recipe {name}: expected a run with surgery, found --method uld,",
        )
        for name in ("balanced", "deep", "imitate")
    ),
    (["--radius", "{end: 1}"], "--radius: expected a number, or start and end"),
    (["--radius", "0"], "--radius: perturb, start: expected a radius > 0, found 0"),
    (["--radius", "-1"], "--radius: perturb, start: expected a radius > 0, found -1"),
    (["--radius", "nan"], "--radius: expected float, dict"),
    (["--radius", "{start: 0}"], "--radius: perturb, start: expected a radius > 0, found 0"),
    (["--radius", "{start: 1, scale: 2}"], "--radius: expected a number, or start and end"),
    (["--radius", "aut"], "--radius: expected"),
    (["--radius", "auto", "--retain-inside", "1"], "--retain-inside: expected 0 with --radius, found 1"),
    (["--radius", "auto", "--method", "uld"], "--radius: expected a run with surgery, found --method uld"),
    (["--radius", "auto", "--strategy", "fsdp2"], "--radius auto: expected numbers with --strategy fsdp2"),
    (["--radius-scale", "tensor"], "expected --radius with --radius-scale tensor, found none"),
    (["--radius", "{start: 1}", "--retain-inside", "1"], "--retain-inside: expected 0 with --radius, found 1"),
    (["--radius", "{start: 1}", "--method", "uld"], "--radius: expected a run with surgery, found --method uld"),
    (["--steps", "3"], "expected --epochs or --steps, found both, 2 and 3"),
    (["--finish-steps", "-1"], "expected --finish-steps >= 0, found -1"),
    (["--finish-lr", "1"], "expected --finish-steps with --finish-lr"),
    (["--finish-steps", "3", "--finish-lr", "0"], "expected --finish-lr > 0, found 0"),
    (["--retain-anchor", "1", "--strategy", "fsdp2"], "--retain-anchor: expected 0 with --strategy fsdp2, found 1.0"),
    (["--finish-steps", "3", "--strategy", "fsdp2"], "--finish-steps: expected 0 with --strategy fsdp2, found 3"),
    (["--finish-steps", "3", "--substitutes", "none.json"], "none.json"),
    (["--substitutes", "forget.json"], "--substitutes: expected --finish-steps or --substitute-weight"),
    (["--substitute-weight", "-1"], "expected --substitute-weight >= 0, found -1"),
    (
        ["--substitute-weight", "1", "--forget-loss", "idk"],
        "--substitute-weight: expected a --forget-loss that teaches no answer",
    ),
    (["--substitute-weight", "1", "--substitutes", "forget.json"], "found the answer that is to be forgotten"),
    (
        ["--substitute-weight", "1", "--method", "uld"],
        "--substitute-weight: expected a run with surgery, found --method uld",
    ),
    (["--finish-steps", "3", "--substitutes", "retain.json"], "found to a question that is not in the forget set"),
    (["--finish-steps", "3", "--substitutes", "forget.json"], "found the answer that is to be forgotten"),
]


def test_what_does_not_fit_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = small_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    for own, said in REFUSED:
        assert cli.main([*given, *own]) == 1
        assert said in capsys.readouterr().err, own
        assert not (tmp_path / "run").exists()
