"""Ablations: the grid, the matching, the placebo, the statistics, and a small grid from end to end, cut short, resumed and in parallel."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from torch.utils.data import DataLoader

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules import cli
from lightning_modules.ablation import sweep
from lightning_modules.ablation.grid import Grid, Run
from lightning_modules.ablation.matching import Target, between, match
from lightning_modules.ablation.methods import Method
from lightning_modules.ablation.options import AblateOptions
from lightning_modules.ablation.placebo import Placebo
from lightning_modules.ablation.reading import expanded, read_grid
from lightning_modules.ablation.results import read_results
from lightning_modules.ablation.run import execute, load_start
from lightning_modules.ablation.scoring import Scorer
from lightning_modules.ablation.sections import Seeds, Targets
from lightning_modules.ablation.statistics import paired, spread
from lightning_modules.ablation.table import _median_p, write_table
from lightning_modules.ablation.training import MatchTargets, build_module
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.run.loading import make_data
from tests.lightning_modules.training.test_module import Bigram, batches

# A model that learns 18 short answers in a second or two, and forgets six of them in a few steps.
MODEL = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "epochs": 100, "batch_size": 6, "lr": 4e-3}
TRAIN = {"lr": "3e-3", "batch_size": 3, "warmup_steps": 2, "max_epochs": 20, "evaluate_every": 1}
METHODS = [
    {"name": "GA", "forget_loss": "gradient_ascent", "rule": "none"},
    {"name": "GA + GRU", "forget_loss": "gradient_ascent", "baseline": "GA"},
    {"name": "too slow", "forget_loss": "gradient_ascent", "lr": 1e-7, "baseline": "GA"},
]


def examples(first: int, last: int) -> list[dict[str, Any]]:
    words = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet"]
    return [
        {
            "question": f"Where is {words[index % 9]}{('ton', 'ville')[index // 9]}?",
            "answer": f"By the {words[index % 9]} and the {words[index * 2 % 9]}.",
            "paraphrased_answer": f"Next to the {words[index % 9]}, {words[index * 2 % 9]}.",
            "perturbed_answer": [f"By the {words[(index + step) % 9]} alone." for step in (1, 2, 3)],
        }
        for index in range(first, last)
    ]


def write_grid(folder: Path, **changes: Any) -> str:
    for name, rows in (("retain", examples(0, 12)), ("forget", examples(12, 18))):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    grid = {
        "data": {"forget": str(folder / "forget.json"), "retain": str(folder / "retain.json")},
        "model": MODEL,
        "train": TRAIN,
        "evaluate": {"generated_examples": 3, "max_new_tokens": 8, "curve_examples": 6},
        "targets": {"forget_probability": [0.3], "forget_nll": ["reference"]},
        "seeds": {"data": [0, 1]},
        "methods": METHODS,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid | changes))
    return str(path)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_time(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name not in ("seconds", "peak_megabytes")} for row in rows]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_grid(tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def done(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    assert cli.main(["ablate", "--config", config, "--output", str(folder)]) == 0
    return folder


# The grid ------------------------------------------------------------------------------------------------------------------------


def test_lists_in_a_row_stand_for_every_combination() -> None:
    rows = expanded({"name": "x", "ema_decay": [0.2, None], "rule": "gru", "rule_options": {"alpha": [1, 5], "b": 2}})
    assert [(row["name"], row["ema_decay"], row["rule_options"]) for row in rows] == [
        ("x ema_decay=0.2 alpha=1", 0.2, {"alpha": 1, "b": 2}),
        ("x ema_decay=0.2 alpha=5", 0.2, {"alpha": 5, "b": 2}),
        ("x ema_decay=None alpha=1", None, {"alpha": 1, "b": 2}),
        ("x ema_decay=None alpha=5", None, {"alpha": 5, "b": 2}),
    ]
    assert expanded({"name": "x", "rule_options": {}}) == [{"name": "x", "rule_options": {}}]


def test_runs_are_methods_times_seeds_with_ids_that_do_not_depend_on_the_rest(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path, seeds={"data": [0, 3], "model": [1, 2]}))
    runs = grid.runs()
    assert len({run.id for run in runs}) == len(runs) == 3 * 2 * 2
    assert runs[0].id == "ga-m1-d0"
    alone = read_grid(write_grid(tmp_path, seeds={"data": [3], "model": [2]}, methods=METHODS[1:2] + METHODS[:1]))
    known = {run.id: run.config for run in runs}
    assert all(known[run.id] == run.config for run in alone.runs())


def test_the_config_of_a_run_is_what_its_result_depends_on(config: str) -> None:
    grid = read_grid(config)
    run = grid.runs()[0]
    assert json.loads(json.dumps(run.config)) == run.config
    renamed = replace(run, method=replace(run.method, name="other", baseline="GA"))
    moved = replace(run, grid=replace(grid, data=replace(grid.data, tofu_dir="elsewhere"), seeds=Seeds((5,), (6,))))
    assert renamed.config == moved.config == run.config
    for changed in (
        replace(run, data_seed=7),
        replace(run, method=replace(run.method, ema_decay=0.5)),
        replace(run, grid=replace(grid, train=replace(grid.train, evaluate_every=2))),
        replace(run, grid=replace(grid, targets=Targets(forget_probability=(0.2,)))),
    ):
        assert changed.config != run.config


def test_numbers_that_yaml_takes_for_words_are_numbers(config: str) -> None:
    assert read_grid(config).train.lr == 3e-3


def test_options_are_those_that_unlearn_would_get(tmp_path: Path) -> None:
    row = {"name": "x", "forget_loss": "inverted_hinge", "rule": "cagrad", "rule_options": {"c": 0.3}, "lr": 0.5}
    row |= {"ema_decay": 0.7, "scope": "tensor", "guard": "update", "retain_weight": 2.0, "optimizer": "SGD"}
    row |= {"retain_inside": 0.5, "retain_loss": "kl_divergence", "batch_size": 5}
    options = read_grid(write_grid(tmp_path, methods=[row])).runs()[1].options()
    for name, value in row.items():
        assert name == "name" or options.flat()[name] == value
    assert (options.output.seed, options.training.epochs, options.training.max_norm) == (1, 20, None)
    shared = read_grid(write_grid(tmp_path, methods=[{"name": "x"}])).runs()[1].options().training
    assert shared.batch_size == 3


def test_no_rule_is_the_forget_gradient_alone() -> None:
    gram = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
    method = Method("x", rule="none")
    grid = Grid((method,), Targets((0.5,)))
    for rule in (method.bound_rule(), Run(grid, method, 0, 0).options().method.bound_rule()):
        assert rule(gram).tolist() == [1.0, 0.0]
        assert not rule(gram * torch.nan).isfinite().all()


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        (Method("x", rule="none"), 1),
        (Method("x", rule="none", guard="update"), 2),
        (Method("x", rule="none", retain_weight=1.0), 2),
        (Method("x"), 2),
        (Method("x", rule="gradient_difference", rule_options={"alpha": 5.0}), 2),
        (Method("x", placebo=True), 2),
        (Method("x", retain_inside=1.0), 3),
        (Method("x", rule="none", retain_inside=1.0), 2),
    ],
)
def test_backward_passes_are_counted_as_the_method_needs_them(method: Method, passes: int) -> None:
    assert method.backward_passes == passes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": []}, "names that differ"),
        ({"methods": [METHODS[0], {**METHODS[0], "name": "g.a"}]}, None),
        ({"methods": [METHODS[0], {**METHODS[0], "name": "GA!"}]}, "names that differ"),
        ({"methods": [{"name": "x", "guards": "none"}]}, "guards"),
        ({"methods": [{"name": "x", "guard": "never"}]}, "guard"),
        ({"methods": [{"rule": "gru"}]}, "name"),
        ({"methods": "gru"}, "list of rows"),
        ({"methods": [{"name": "x", "rule": "grue"}]}, "grue"),
        ({"methods": [{"name": "x", "forget_loss": "nothing"}]}, "nothing"),
        ({"methods": [{"name": "x", "loss_options": {"beta": 1}}]}, "beta"),
        ({"methods": [{"name": "x", "baseline": "y"}]}, "baseline of 'x'"),
        ({"methods": [{"name": "x", "rule": "none", "placebo": True}]}, "placebo 'x'"),
        ({"methods": [{"name": "x", "scope": "tensor", "placebo": True}]}, "placebo 'x'"),
        ({"methods": [{"name": "x", "optimizer": "LBFGS"}]}, "LBFGS"),
        ({"baseline": "y"}, "baseline"),
        ({"targets": {}}, "targets"),
        ({"targets": {"forget_probability": ["reference"]}}, "forget_probability"),
        ({"targets": {"kindness": [1]}}, "kindness"),
        ({"seeds": {"data": []}}, "seeds"),
        ({"seeds": {"model": [0, 1]}, "model": "some/model"}, "one model seed"),
        ({"train": {"evaluate_every": 0}}, "evaluate_every"),
        ({"train": {"lr": "fast"}}, "lr"),
        ({"evaluate": {"tolerance": 0}}, "tolerance"),
        ({"model": {"width": 8}}, "width"),
        ({"plan": 1}, "plan"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_with_the_key(
    changes: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    path = write_grid(tmp_path, **changes)
    if said is None:
        read_grid(path)
        return
    with pytest.raises(ValueError, match=said) as caught:
        read_grid(path)
    assert str(path) in str(caught.value)


def test_a_setting_that_came_later_leaves_old_results_valid(tmp_path: Path) -> None:
    data = {"tofu": "forget10", "authors": 20}
    (before,), (after,) = (
        read_grid(write_grid(tmp_path, data=data | more, methods=METHODS[:1], seeds={"data": [0]})).runs()
        for more in ({}, {"forget_authors": 2})
    )
    assert "forget_authors" not in before.config["data"]
    assert after.config["data"]["forget_authors"] == 2
    assert after.options().data.forget_authors == 2


EXAMPLES = Path(__file__).parents[3] / "examples" / "ablation"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_grid_of_the_examples_is_one(path: Path) -> None:
    grid = read_grid(path)
    assert len({run.id for run in grid.runs()}) == len(list(grid.runs())) > 0
    for run in grid.runs():
        run.options().check()


def test_a_grid_that_is_not_there_or_no_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a YAML file"):
        read_grid(tmp_path / "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="expected YAML"):
        read_grid(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="expected --config"):
        AblateOptions().check()
    with pytest.raises(ValueError, match="--only or --index"):
        AblateOptions(config="x", only="a", index=1).check()
    with pytest.raises(ValueError, match="--jobs"):
        AblateOptions(config="x", jobs=0).check()


def test_a_model_seed_makes_another_model_and_a_data_seed_does_not(config: str) -> None:
    run = read_grid(config).runs()[0]
    splits = make_data(run.options(), None).read()
    same, other = replace(run, data_seed=9), replace(run, model_seed=1)
    first, second, third = (list(load_start(which, splits)[0].parameters()) for which in (run, same, other))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], third[0])


def test_a_row_is_compared_with_its_own_baseline_and_with_that_of_all() -> None:
    rows = tuple(Method(name, baseline=own) for name, own in (("a", None), ("b", "a"), ("c", "d"), ("d", None)))
    grid = Grid(rows, Targets((0.5,)), baseline="d")
    assert [grid.baselines(method) for method in rows] == [["d"], ["a", "d"], ["d"], []]


# Matching ------------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.floats(0.5, 3.0), st.floats(0.05, 0.95), st.booleans(), st.floats(1e-3, 0.1))
def test_match_finds_where_a_monotone_score_meets_its_target(
    power: float, target: float, falls: bool, tolerance: float
) -> None:
    at = [0.5]

    def score() -> float:
        return 1.0 - at[0] ** power if falls else at[0] ** power

    found = match(lambda position: at.__setitem__(0, position), score, target, tolerance=tolerance)
    assert at[0] == found.position
    assert found.value == score()
    assert abs(score() - target) <= tolerance * target
    assert found.calls <= 30


def test_match_needs_a_target_between_the_ends_and_a_score_that_does_not_jump() -> None:
    at = [0.0]

    def move(position: float) -> None:
        at[0] = position

    with pytest.raises(ValueError, match="between the scores at the ends"):
        match(move, lambda: at[0], 1.5)
    with pytest.raises(RuntimeError, match="jumps"):
        match(move, lambda: float(at[0] > 0.3), 0.5)
    assert match(move, lambda: at[0], 0.98).position == 1.0  # an end within the tolerance
    assert match(move, lambda: 1 + at[0], 1.01).position == 0.0
    assert match(move, lambda: math.cos(9.0 * at[0]), 0.2).value == pytest.approx(0.2, rel=0.04)


def test_known_ends_are_not_scored_again() -> None:
    at, calls = [0.0], []

    def score() -> float:
        calls.append(at[0])
        return at[0] ** 2

    found = match(lambda position: at.__setitem__(0, position), score, 0.3, ends=(0.0, 1.0))
    assert found.calls == len(calls)
    assert not {0.0, 1.0} & set(calls)


def test_the_line_between_two_parameter_vectors_ends_where_they_are() -> None:
    parameters = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]
    before, after = [[torch.randn_like(p) * 1e3 for p in parameters] for _ in range(2)]
    move = between(parameters, before, after)
    for position, expected in ((0.0, before), (1.0, after)):
        move(position)
        assert all(torch.equal(p, e) for p, e in zip(parameters, expected, strict=True))
    move(0.25)
    for parameter, old, new in zip(parameters, before, after, strict=True):
        torch.testing.assert_close(parameter.detach(), 0.75 * old + 0.25 * new)


def trained(config: str, callbacks: list[Any], epochs: int = 4) -> torch.nn.Module:
    run = read_grid(config).runs()[1]
    splits = make_data(run.options(), None).read()
    model, tokenizer = load_start(run, splits)
    module = build_module(model, run)
    data = ForgetRetainDataModule(splits["forget"], splits["retain"], tokenizer, batch_size=3, seed=1)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, enable_checkpointing=False, **quiet)
    trainer.fit(module, data)
    assert trainer.global_step == 2 * epochs or not callbacks or not callbacks[0].open
    return module.model


def test_looking_at_a_match_disturbs_nothing(config: str) -> None:
    run = read_grid(config).runs()[1]
    splits = make_data(run.options(), None).read()
    scorer = Scorer(run.grid, splits, load_start(run, splits)[1])
    seen: dict[str, Any] = {}

    def describe(model: torch.nn.Module) -> dict[str, Any]:
        seen["weights"] = [parameter.detach().clone() for parameter in model.parameters()]
        return scorer.thoroughly(model)

    # The second target is never met, so that training goes on after the first is.
    targets = [Target("forget_probability", 0.5, "half"), Target("forget_nll", 1e9, "never")]
    matching = MatchTargets(targets, scorer.along, describe, every_n_steps=2)
    looked_at = trained(config, [matching])
    alone = trained(config, [])
    assert all(torch.equal(a, b) for a, b in zip(looked_at.parameters(), alone.parameters(), strict=True))
    found = matching.matches[targets[0]]
    assert abs(found["forget_probability"] - 0.5) <= 0.04 * 0.5
    assert found["forget_probability"] == pytest.approx(found["matched"], rel=1e-5)
    before, after = (
        [p for p in matching.curve if test(p)]
        for test in (lambda p: p["step"] <= found["step"], lambda p: p["step"] >= found["step"])
    )
    assert before[-1]["forget_probability"] >= 0.5 >= after[0]["forget_probability"]
    assert "not reached: forget_nll was" in matching.missed[targets[1]]
    # The weights that were described give the score that was written down.
    with torch.no_grad():
        for parameter, weight in zip(alone.parameters(), seen["weights"], strict=True):
            parameter.copy_(weight)
    assert scorer.along(alone)["forget_probability"] == pytest.approx(found["matched"], rel=1e-6)


def test_training_stops_when_every_target_is_met_or_cannot_be(config: str) -> None:
    scores = iter([{"forget_probability": 0.9, "forget_nll": 2.0}, {"forget_probability": math.nan, "forget_nll": 3.0}])
    targets = [Target("forget_probability", 0.5, "a"), Target("forget_nll", 1.0, "b"), Target("forget_nll", 2.9, "c")]
    matching = MatchTargets(
        targets, lambda model: next(scores, {"forget_probability": 0.0, "forget_nll": 2.9}), lambda model: {}
    )
    trained(config, [matching])
    assert [point["step"] for point in matching.curve] == [0.0, 2.0]
    assert "diverged" in matching.missed[targets[0]]
    assert "before the first step" in matching.missed[targets[1]]
    assert matching.matches[targets[2]]["matched"] == 3.0  # within 4 % of its target


# The placebo ---------------------------------------------------------------------------------------------------------------------


NONE = Method("x", rule="none").bound_rule()
"""The forget gradient as it is."""


def one_step(rule: Any, callbacks: list[Any]) -> torch.Tensor:
    """The change of the weights in one step of plain gradient descent."""
    module = lm.UnlearningModule(
        Bigram(),
        forget_loss=gs.losses.gradient_ascent,
        optimizer=lambda named: torch.optim.SGD(named, lr=1.0),
        surgery=lambda base: gs.GradientSurgery(base, rule=rule, ema_decay=0.2),
    )
    before = module.model.table.detach().clone()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, enable_checkpointing=False, **quiet)
    trainer.fit(module, DataLoader(batches(1, seed=3), batch_size=None))
    return (module.model.table.detach() - before).double()


@pytest.mark.parametrize("rule", [gs.rules.gru, gs.rules.gu, gs.rules.ngdiff])
def test_a_placebo_is_as_long_as_the_correction_and_points_elsewhere(rule: Any) -> None:
    alone, corrected = one_step(NONE, []), one_step(rule, [])
    placebo, other = (one_step(NONE, [Placebo(rule, seed=seed)]) for seed in (0, 1))
    correction, noise = corrected - alone, placebo - alone
    assert correction.norm() > 1e-3
    assert noise.norm().item() == pytest.approx(correction.norm().item(), rel=1e-5)
    assert (
        abs(torch.cosine_similarity(noise.flatten(), correction.flatten(), dim=0)) < 0.5
    )  # 121 dimensions: 0.09 on average
    assert not torch.equal(placebo, other)
    assert torch.equal(placebo, one_step(NONE, [Placebo(rule, seed=0)]))


def test_a_placebo_has_no_direction_of_its_own() -> None:
    noise = one_step(NONE, [Placebo(gs.rules.gru)]) - one_step(NONE, [])
    assert abs(noise.mean() / noise.std()) < 0.4  # 121 numbers: 0.09 on average


def test_a_placebo_of_a_rule_without_a_correction_changes_nothing() -> None:
    assert torch.equal(one_step(NONE, [Placebo(NONE)]), one_step(NONE, []))


def test_a_placebo_run_takes_the_forget_gradient_alone(config: str) -> None:
    grid = read_grid(config)
    run = replace(grid.runs()[1], method=replace(grid.methods[1], placebo=True))
    model, _ = load_start(run, make_data(run.options(), None).read())
    gram = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
    surgery = build_module(model, run).make_surgery(torch.optim.SGD(model.named_parameters(), lr=0.1))
    assert surgery.rule(gram).tolist() == [1.0, 0.0]
    assert surgery._ema.decays == {"retain": 0.2}


# Statistics ----------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=2, max_size=8))
def test_paired_differences_are_scipys(values: list[tuple[float, float]]) -> None:
    ours, theirs = ({seed: pair[which] for seed, pair in enumerate(values)} for which in (0, 1))
    found = paired(ours, theirs)
    assert found is not None
    differences = torch.tensor(values, dtype=torch.float64).diff(dim=1).neg().flatten()
    assert found.wins == int((differences > 0).sum())
    assert found.n == len(values)
    assert found.sd == pytest.approx(differences.std().item(), abs=1e-12)
    if differences.std() > 1e-6:
        interval = ttest_rel(*zip(*values, strict=True)).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)


def test_a_diverged_run_makes_the_spread_nan() -> None:
    found = spread([1.0, math.nan, 2.0])
    assert found is not None
    assert math.isnan(found.mean)
    assert found.sd is not None
    assert math.isnan(found.sd)
    pairs = paired({0: 1.0, 1: math.nan}, {0: 0.5, 1: 0.5})
    assert pairs is not None
    assert math.isnan(pairs.mean)


def test_of_several_p_values_the_median_is_shown_and_not_the_best_or_worst() -> None:
    assert _median_p([{"ks_pvalue": p} for p in (0.5, 0.001, 0.03, None)]) == "0.03"
    assert _median_p([{"ks_pvalue": None}]) == "-"


def test_only_seeds_that_both_have_are_paired() -> None:
    found = paired({0: 1.0, 1: 5.0, 2: 0.0}, {1: 2.0, 2: 1.0, 3: 9.0})
    assert found is not None
    assert (found.mean, found.wins, found.n) == (1.0, 1, 2)
    assert paired({0: 1.0}, {1: 1.0}) is None
    one = paired({0: 1.0}, {0: 3.0})
    assert one is not None
    assert one == (-2.0, None, 0, 1, None, None)
    assert spread([]) is None


# From end to end -----------------------------------------------------------------------------------------------------------------


def test_every_run_and_target_is_a_line_also_what_was_not_reached(done: Path) -> None:
    rows = rows_of(done)
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        slow = row["method"] == "too slow"
        assert row["reached"] == str(not slow)
        assert slow == bool(row["reason"])
        if slow:
            assert row["reason"].startswith("not reached: forget_")
            assert row["retain_probability"] == row["steps"] == ""
            continue
        metric = row["target"].partition("=")[0]
        assert abs(float(row[metric]) - float(row["value"])) <= 0.041 * float(row["value"])
        passes = 1 if row["method"] == "GA" else 2
        assert float(row["backward_passes"]) == passes * float(row["steps"])
    slow = json.loads((done / "runs" / "too-slow-m0-d0.json").read_text())
    assert [point["step"] for point in slow["curve"]] == list(range(2 * 20 + 1))  # evaluate_every: 1, max_epochs: 20
    known = json.loads((done / "models" / "m0.json").read_text())
    assert known["start"]["forget_probability"] > 0.9
    values = {row["value"] for row in rows if row["target"] == "forget_nll=reference"}
    assert values == {str(known["reference"]["forget_nll"])}


def test_the_table_says_what_the_lines_say(done: Path, config: str) -> None:
    text = (done / "table.md").read_text()
    rows = [row for row in rows_of(done) if row["target"] == "forget_probability=0.3"]
    kept = {name: [float(r["retain_probability"]) for r in rows if r["method"] == name] for name in ("GA", "GA + GRU")}
    means = {name: sum(values) / 2 for name, values in kept.items()}
    deltas = [ours - theirs for ours, theirs in zip(kept["GA + GRU"], kept["GA"], strict=True)]
    line = next(line for line in text.splitlines() if line.startswith("| GA + GRU | 2 of 2"))
    assert f"{means['GA + GRU']:.3f} ±" in line
    against = next(line for line in text.splitlines() if line.startswith("| GA + GRU | GA |"))
    assert f"| {sum(deltas) / 2:+.3f} [" in against
    assert f"| {sum(delta > 0 for delta in deltas)} of 2 |" in against
    assert "| too slow | GA | no pair | - | - | no pair | - | - |" in text
    assert "| too slow | 0 of 2 | -" in text
    assert "- too slow, model seed 0, data seed 1: not reached" in text
    assert (done / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert not (done / "depth.png").exists()  # nothing was attacked
    assert "(6)" in line  # KS over six forget examples
    result = json.loads((done / "runs" / "ga-m0-d0.json").read_text())
    ratios = result["targets"][0]["examples"]["truth_ratio_R"]
    reference = json.loads((done / "models" / "m0.json").read_text())["reference"]["examples"]["truth_ratio_R"]
    assert result["targets"][0]["ks_pvalue"] == lm.metrics.functional.forget_quality(ratios, reference).pvalue


def test_done_again_it_does_nothing_and_draws_the_same(
    done: Path, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "execute", lambda *_: pytest.fail("a finished run was done again"))
    table = (done / "table.md").read_text()
    (done / "table.md").unlink()
    assert cli.main(["ablate", "--config", config, "--output", str(done)]) == 0
    assert (done / "table.md").read_text() == table


def test_its_grid_yaml_is_the_same_grid(done: Path, config: str) -> None:
    assert read_grid(done / "grid.yaml") == read_grid(config)


def test_cut_short_it_goes_on_where_it_was(
    done: Path, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []

    def killed(run: Run, folder: Path) -> Any:
        begun.append(run.id)
        if len(begun) == 3:
            (folder / "runs" / f".1-{run.id}.partial").write_text("{")  # what a kill leaves
            raise KeyboardInterrupt
        return execute(run, folder)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "execute", killed)
        assert cli.main(["ablate", "--config", config, "--output", str(tmp_path)]) == 130
    assert "goes on" in capsys.readouterr().err
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    assert len(kept) == 2
    assert cli.main(["ablate", "--config", config, "--output", str(tmp_path)]) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert without_time(rows_of(tmp_path)) == without_time(rows_of(done))


def test_two_at_a_time_give_what_one_after_another_gives(done: Path, config: str, tmp_path: Path) -> None:
    data = yaml.safe_load(Path(config).read_text())["data"]
    fewer = write_grid(tmp_path, seeds={"data": [1]}, data=data, methods=METHODS[:2])
    assert cli.main(["ablate", "--config", fewer, "--output", str(tmp_path), "--jobs", "2"]) == 0
    ids = {"ga-m0-d1", "ga-gru-m0-d1"}
    assert without_time(rows_of(tmp_path)) == [row for row in without_time(rows_of(done)) if row["id"] in ids]


def test_a_finished_run_of_another_grid_is_refused(
    done: Path, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_grid(
        tmp_path, train={**TRAIN, "batch_size": 2}, data=yaml.safe_load(Path(config).read_text())["data"]
    )
    for which in ([], ["--index", "0"]):
        assert cli.main(["ablate", "--config", other, "--output", str(done), *which]) == 1
        said = capsys.readouterr().err
        assert "batch_size" in said
        assert "--output" in said


def test_a_run_that_fails_is_told_kept_in_the_table_and_tried_again(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(run: Run, folder: Path) -> Any:
        if run.id == "ga-gru-m0-d0":
            raise torch.OutOfMemoryError("expected more memory")
        return execute(run, folder)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "execute", failing)
        assert cli.main(["ablate", "--config", config, "--output", str(tmp_path)]) == 1
    assert "ga-gru-m0-d0: OutOfMemoryError: expected more memory" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").glob("*.json"))) == 6
    assert "GA + GRU, model seed 0, data seed 0: OutOfMemoryError" in (tmp_path / "table.md").read_text()
    assert cli.main(["ablate", "--config", config, "--output", str(tmp_path), "--only", "ga-gru-m0-d0"]) == 0
    assert json.loads((tmp_path / "runs" / "ga-gru-m0-d0.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    "row",
    [
        {"forget_loss": "npo", "loss_options": {"beta": 0.5}, "rule": "none"},
        {"forget_loss": "gradient_ascent", "retain_inside": 1.0, "retain_loss": "kl_divergence", "guard": "update"},
    ],
)
def test_losses_with_a_reference_and_sums_before_the_rule_can_be_compared(
    row: dict[str, Any], config: str, tmp_path: Path
) -> None:
    grid = read_grid(config)
    run = replace(grid.runs()[0], method=Method("x", **row))
    module = build_module(load_start(run, make_data(run.options(), None).read())[0], run)
    assert module.retain_inside == row.get("retain_inside", 0.0)
    assert module.reference is not None
    result = execute(run, tmp_path)
    assert [target["reached"] for target in result["targets"]] == [True, True]
    raising = [target["raising"] for target in result["targets"]]
    assert raising == [0.0, 0.0] if "guard" in row else max(raising) > 0.0


def test_methods_can_be_compared_where_they_have_kept_equally_much(config: str, tmp_path: Path) -> None:
    grid = replace(read_grid(config), targets=Targets(retain_probability=(0.9,)), seeds=Seeds((0,), (0,)))
    for run in grid.runs()[:2]:
        (target,) = execute(run, tmp_path)["targets"]
        assert abs(target["retain_probability"] - 0.9) <= 0.036
        assert target["retain_probability"] == pytest.approx(target["matched"], rel=1e-5)
    results = read_results(grid, tmp_path)
    write_table(grid, results, tmp_path, tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "| method | runs | forget probability | retain probability |" in text
    delta = results[1]["forget_probability"] - results[0]["forget_probability"]
    assert f"| GA + GRU | GA | {delta:+.3f} |" in text
    assert "- too slow, model seed 0, data seed 0: not run yet" in text


def test_a_run_that_diverges_is_a_result_with_its_reason(config: str, tmp_path: Path) -> None:
    grid = read_grid(config)
    method = replace(grid.methods[0], name="wild", lr=1e30, optimizer="SGD")
    grid = replace(grid, methods=(method,), targets=Targets(forget_nll=(1e30,)))
    result = execute(grid.runs()[0], tmp_path)
    assert result["status"] == "finished"
    assert [target["reached"] for target in result["targets"]] == [False]
    assert "diverged" in result["targets"][0]["reason"]
    assert read_results(grid, tmp_path)[0]["reason"] == result["targets"][0]["reason"]


@pytest.mark.parametrize(("epochs", "warned"), [(1, True), (100, False)])
def test_a_start_that_knows_nothing_is_said_before_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], epochs: int, warned: bool
) -> None:
    changes = {"model": MODEL | {"epochs": epochs}, "methods": METHODS[:1], "seeds": {"data": [0]}}
    changes |= {"train": TRAIN | {"max_epochs": 1}, "targets": {"forget_probability": [0.3]}}
    assert cli.main(["ablate", "--config", write_grid(tmp_path, **changes), "--output", str(tmp_path / "runs")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert ("Warning, model seed 0: There is little to forget" in said) == warned
    assert said.index("Warning, model seed 0" if warned else "[1/1]") <= said.index("[1/1]")


def test_one_run_can_be_chosen_by_index_or_id(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ablate", "--config", config, "--list", "--output", str(tmp_path / "none")]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == [f"{index} {run.id}" for index, run in enumerate(read_grid(config).runs())]
    assert not (tmp_path / "none").exists()
    assert cli.main(["ablate", "--config", config, "--index", "4", "--output", str(tmp_path)]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["ga-gru-m0-d1.json"]
    assert not (tmp_path / "results.csv").exists()
    for wrong in (["--index", "6"], ["--only", "nobody"], ["--index", "-1"]):
        assert cli.main(["ablate", "--config", config, *wrong, "--output", str(tmp_path)]) == 1
    assert "expected the id of a run" in capsys.readouterr().err


def test_where_both_ends_meet_the_target_the_state_that_was_reached_counts() -> None:
    at: list[float] = []
    assert match(at.append, lambda: 0.0, 1.0, ends=(1.01, 0.99)) == (1.0, 0.99, 0)
    assert at == [1.0]
