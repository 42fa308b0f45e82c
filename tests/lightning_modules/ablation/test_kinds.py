"""Rows of an ablation that are not surgery on all weights: adapters, ULD, task vectors; and methods at equal retention."""

from __future__ import annotations

import copy
import csv
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_modules import cli
from lightning_modules.ablation import training, weights
from lightning_modules.ablation.ending import Cost
from lightning_modules.ablation.grid import Grid, Run
from lightning_modules.ablation.matching import Matching, Target
from lightning_modules.ablation.methods import Method
from lightning_modules.ablation.reading import expanded, read_grid
from lightning_modules.ablation.results import read_results
from lightning_modules.ablation.retention import Ended, equal_retention, own_end
from lightning_modules.ablation.run import KINDS, load_start
from lightning_modules.ablation.scoring import Scorer
from lightning_modules.ablation.sections import Targets
from lightning_modules.ablation.table import write_table
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.uld import uld_data
from lightning_modules.run.loading import make_data
from lightning_modules.training.uld import ULDSettings
from tests.lightning_modules.ablation.test_ablation import METHODS, write_grid

ROWS = [
    {"name": "GA", "forget_loss": "gradient_ascent", "rule": "none"},
    {"name": "SAGO", "forget_loss": "gradient_ascent", "rule": "sago", "ema_decay": None, "lr": 6e-3, "epochs": 80},
    {"name": "FILA", "forget_loss": "inverted_hinge", "lora_rank": 2, "lora_init": "fila", "lr": 5e-3},
    {"name": "ULD", "kind": "uld", "lr": 5e-3, "epochs": 10, "uld": {"num_layers": 1}, "max_weight": 3},
    {"name": "task vector", "kind": "task_vector", "lr": 1e-3, "epochs": 3, "max_weight": 20},
    {"name": "TRU", "kind": "rectified_task_vector", "lr": 1e-3, "epochs": 3, "max_weight": 40},
]
TARGETS = {"forget_probability": [0.3], "retained": [0.95, 0.5]}
OLD_METHOD = {
    "forget_loss": "ceu",
    "loss_options": {},
    "retain_loss": "cross_entropy",
    "rule": "gru",
    "rule_options": {},
    "ema_decay": 0.2,
    "scope": "global",
    "metric": "euclidean",
    "guard": "measure",
    "retain_weight": 0.0,
    "retain_inside": 0.0,
    "placebo": False,
    "lr": None,
    "optimizer": None,
}
"""Of a run's config, as results hold it that were made when there was one kind of row only."""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return read_grid(write_grid(tmp_path_factory.mktemp("grid"), targets=TARGETS, seeds={"data": [0]}, methods=ROWS))


@pytest.fixture(scope="module")
def done(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    config = Path(grid.data.forget or "").parent / "grid.yaml"
    assert cli.main(["ablate", "--config", str(config), "--output", str(folder)]) == 0
    return folder


def run_of(grid: Grid, name: str) -> Run:
    return next(run for run in grid.runs() if run.method.name == name)


def line(done: Path, name: str, target: str) -> dict[str, str]:
    with (done / "results.csv").open(newline="") as file:
        return next(row for row in csv.DictReader(file) if (row["method"], row["target"]) == (name, target))


def start(run: Run) -> tuple[nn.Module, Any, Scorer]:
    splits = make_data(run.options(), None).read()
    model, tokenizer = load_start(run, splits)
    return model, tokenizer, Scorer(run.grid, splits, tokenizer)


def half(run: Run) -> list[Target]:
    return [Target("forget_probability", 0.5, "half")]


# The grid ------------------------------------------------------------------------------------------------------------------------


def test_results_made_before_there_were_kinds_stay_valid() -> None:
    run = Run(Grid((Method("x"),), Targets((0.5,))), Method("x"), 0, 0)
    assert run.config["method"] == OLD_METHOD
    assert run.config["targets"] == {"forget_probability": [0.5], "forget_nll": [], "retain_probability": []}


@pytest.mark.parametrize(
    "change", [{"lora_rank": 4}, {"epochs": 3}, {"kind": "uld"}, {"uld": {"num_layers": 1}}, {"max_weight": 1.0}]
)
def test_what_a_result_depends_on_is_in_its_config(change: dict[str, Any]) -> None:
    method = Method("x", **change)
    config = Run(Grid((method,), Targets((0.5,), retained=(0.9,))), method, 0, 0).config
    assert config["method"] == {**OLD_METHOD, **change}
    assert config["targets"]["retained"] == [0.9]


def test_options_are_those_that_unlearn_would_get(grid: Grid) -> None:
    given = [run_of(grid, name).options() for name in ("FILA", "ULD", "GA")]
    assert [options.method.method for options in given] == ["surgery", "uld", "surgery"]
    fila, uld, ga = (options.training for options in given)
    assert (fila.lora_rank, fila.lora_init, fila.lr, fila.epochs) == (2, "fila", 5e-3, 20)
    assert (uld.uld, uld.epochs) == ({"num_layers": 1}, 10)
    assert (ga.lora_rank, ga.lora_init) == (0, "default")


def test_ranks_starts_and_settings_are_axes() -> None:
    rows = expanded({"name": "x", "lora_rank": [4, 8], "lora_init": ["default", "fila"], "loss_options": {"a": [1, 2]}})
    assert len({row["name"] for row in rows}) == len(rows) == 8
    assert rows[-1] == {"name": "x lora_rank=8 lora_init=fila a=2", "lora_rank": 8, "lora_init": "fila", "loss_options": {"a": 2}}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": [{"name": "x", "kind": "magic"}]}, "kind"),
        ({"methods": [{"name": "x", "kind": "uld", "rule": "pcgrad"}]}, r"kind uld.*found \['rule'\]"),
        ({"methods": [{"name": "x", "kind": "task_vector", "lora_rank": 2}]}, r"found \['lora_rank'\]"),
        ({"methods": [{"name": "x", "max_weight": 1.0}]}, r"kind surgery.*found \['max_weight'\]"),
        ({"methods": [{"name": "x", "kind": "uld", "uld": {"weight": 1}}]}, "weight"),
        ({"methods": [{"name": "x", "kind": "uld", "uld": {"heads": 1}}]}, "heads"),
        ({"methods": [{"name": "x", "kind": "uld", "max_weight": 0}]}, "max_weight"),
        ({"methods": [{"name": "x", "epochs": 0}]}, "epochs"),
        ({"methods": [{"name": "x", "lora_init": "fila"}]}, "lora-rank"),
        ({"methods": [{"name": "x", "rule": "sago", "placebo": True}]}, "placebo 'x'"),
        ({"methods": [{"name": "x", "placebo": True, "metric": "optimizer"}]}, "placebo 'x'.*metric: optimizer"),
        ({"methods": [{"name": "x", "placebo": True, "max_norm": 1.0}]}, "placebo 'x'.*max_norm: 1.0"),
        ({"targets": {"retained": [0.95]}}, "met on the way"),
        ({"targets": {"forget_probability": [0.5], "retained": [95]}}, "retained"),
    ],
)
def test_a_row_that_cannot_be_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        read_grid(write_grid(tmp_path, **changes))


@pytest.mark.parametrize(("kind", "passes"), [("uld", 2), ("task_vector", 1), ("rectified_task_vector", 1)])
def test_backward_passes_of_a_step(kind: Any, passes: int) -> None:
    assert Method("x", kind=kind).backward_passes == passes


# Along a weight ------------------------------------------------------------------------------------------------------------------


class Dial(nn.Module):
    """A model whose forgetting is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = 0.0

    def load(self, state: Any) -> None:
        self.weight = float(state["weight"])


def walked(targets: list[Target], score: Callable[[float], dict[str, float]], max_weight: float = 2.0) -> Ended:
    method = Method("x", kind="uld", max_weight=max_weight)
    run = Run(Grid((method,), Targets((0.5,))), method, 0, 0)
    scorer: Any = SimpleNamespace(
        along=lambda model: score(model.weight), thoroughly=lambda model: {"seen": model.weight}
    )
    dial, clock = Dial(), weights._Clock()
    clock.steps, clock.seconds = 7, 1.5
    line = weights.Weighted(dial, lambda w: {"weight": torch.tensor(w, dtype=torch.float64)}, dial.load)
    return weights._walk(run, line, clock, scorer, targets)


def test_the_weight_rises_from_zero_until_every_target_is_met() -> None:
    # It meets 0.5 first at weight 0.5, and again at 1.5: the first is the answer.
    targets = [Target("forget_probability", 0.5, "a"), Target("forget_nll", 1.3, "b")]
    ended = walked(targets, lambda w: {"forget_probability": abs(1.0 - w), "forget_nll": w})
    first, second = (ended.matching.matches[target] for target in targets)
    assert abs(1.0 - first["weight"]) == pytest.approx(0.5, rel=0.04)
    assert first["weight"] < 1.0
    assert first["seen"] == pytest.approx(first["weight"])
    assert second["weight"] == pytest.approx(1.3, rel=0.04)
    assert (first["step"], first["seconds"]) == (7.0, 1.5)
    assert float(ended.after["weight"]) == pytest.approx(1.3)  # it stops at the next state, of 0.1 each
    assert float(ended.before["weight"]) == 0.0
    assert [round(point["weight"], 6) for point in ended.matching.curve] == [round(n / 10, 6) for n in range(14)]


def test_what_no_weight_reaches_is_missed_with_the_largest() -> None:
    target = Target("forget_probability", 0.5, "a")
    ended = walked([target], lambda w: {"forget_probability": 1.0 - w / 10})
    assert ended.matching.missed[target] == "not reached: forget_probability was 0.8 at weight 2"
    wild = walked([target], lambda w: {"forget_probability": math.nan if w > 0.35 else 1.0})
    assert "diverged: forget_probability is nan after 7 steps, weight 0.4" in wild.matching.missed[target]
    assert len(wild.matching.curve) == 5


# Adam divides a gradient by its own size: where that is near 0, rounding moves a weight as far as a gradient would. Measured: 2e-4.
ROUNDING = 2e-3


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Distance over length."""
    distance, length = (torch.cat([row[name].flatten() for name in expected]).norm() for row in (
        {name: found[name] - expected[name] for name in expected}, expected
    ))  # fmt: skip
    return float(distance / length)


def fine_tuned_by_hand(model: nn.Module, tokenizer: Any, rows: list[Any], run: Run) -> dict[str, Tensor]:
    """A plain loop: what the last state has that the first had not."""
    options, seed = run.options().training, run.options().output.seed
    data = ForgetRetainDataModule(rows, rows, tokenizer, batch_size=options.batch_size, seed=seed)
    tuned = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=options.lr or 0.0, weight_decay=options.weight_decay)
    loader, step = data.train_dataloader(), 0
    for epoch in range(options.epochs or 0):
        loader.sampler.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]
        for pair in loader:
            batch = pair["forget"]
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = (options.lr or 0.0) * min(1.0, step / options.warmup_steps)
            logits = tuned(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    old = dict(model.named_parameters())
    return {name: parameter.detach() - old[name].detach() for name, parameter in tuned.named_parameters()}


def test_a_task_vector_is_what_fine_tuning_adds_and_is_taken_away(grid: Grid) -> None:
    run = run_of(grid, "task vector")
    model, tokenizer, scorer = start(run)
    vector = fine_tuned_by_hand(model, tokenizer, scorer.forget, run)
    before = copy.deepcopy(dict(model.named_parameters()))
    ended = KINDS["task_vector"](run, model, tokenizer, scorer, half(run))
    (found,) = ended.matching.matches.values()
    end = ended.matching.curve[-1]
    assert end["step"] == run.options().training.epochs * 2  # six examples in batches of three
    moved = {name: (before[name] - ended.after[name]).detach() / end["weight"] for name in vector}
    assert apart(moved, vector) < ROUNDING
    for name in vector:
        assert torch.equal(ended.before[name], before[name])
    # The weight that was written down is that of the model that was described.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name] - found["weight"] * vector[name])
    assert scorer.along(model)["forget_probability"] == pytest.approx(found["matched"], rel=1e-3)
    assert found["forget_probability"] == pytest.approx(0.5, rel=0.041)


def test_a_rectified_vector_is_that_of_both_halves_each_against_the_other(grid: Grid) -> None:
    run = run_of(grid, "TRU")
    model, tokenizer, scorer = start(run)
    first, second = (fine_tuned_by_hand(model, tokenizer, rows, run) for rows in (scorer.forget[:3], scorer.forget[3:]))
    before = copy.deepcopy(dict(model.named_parameters()))
    ended = KINDS["rectified_task_vector"](run, model, tokenizer, scorer, half(run))
    weight = ended.matching.curve[-1]["weight"]

    def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(float((a[name].double() * b[name].double()).sum()) for name in a)

    # v = -tau; where it conflicts with the other half's tau, the conflicting part is taken out.
    shares = [max(0.0, dot(own, other)) / dot(other, other) for own, other in ((first, second), (second, first))]
    assert min(shares) > 0.01  # else this would test negation again
    assert ended.matching.curve[-1]["step"] == 2 * run.options().training.epochs
    expected = {n: -first[n] + shares[0] * second[n] - second[n] + shares[1] * first[n] for n in first}
    moved = {name: (ended.after[name] - before[name]).detach() / weight for name in first}
    assert apart(moved, expected) < ROUNDING


def test_the_assistant_is_trained_as_the_row_says(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(grid, "ULD")
    model, tokenizer, scorer = start(run)
    given: dict[str, Any] = {}

    def train(*arguments: Any, **options: Any) -> Any:
        given.update(options, settings=arguments[3])
        raise InterruptedError

    monkeypatch.setattr(weights, "train_assistant", train)
    with pytest.raises(InterruptedError):
        KINDS["uld"](run, model, tokenizer, scorer, half(run))
    assert given.pop("trainer")["max_epochs"] == 10
    expected: dict[str, Any] = {"lora_rank": 32, "lr": 5e-3, "weight_decay": 0.01, "warmup_steps": 2, "batch_size": 3}
    assert given == {"settings": ULDSettings(**expected, max_length=512, seed=0, num_layers=1)}


def test_uld_changes_its_weight_and_nothing_else(grid: Grid) -> None:
    run = run_of(grid, "ULD")
    model, tokenizer, scorer = start(run)
    before = copy.deepcopy(list(model.parameters()))
    ended = KINDS["uld"](run, model, tokenizer, scorer, half(run))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    (found,) = ended.matching.matches.values()
    ended.load({"weight": torch.tensor(found["weight"])})
    assert scorer.along(ended.model)["forget_probability"] == pytest.approx(found["matched"], rel=1e-3)
    ended.load(ended.before)
    at_zero, known = scorer.along(ended.model), scorer.along(model)
    assert at_zero == pytest.approx(known, rel=1e-5)
    mixed = equal_retention(0.95, ended, scorer)
    assert isinstance(mixed, dict)
    assert mixed["share_of_start"] > 0.0
    assert ended.model.weight == pytest.approx(mixed["weight"])
    assert mixed["weight"] < ended.matching.curve[-1]["weight"]
    rows = uld_data(make_data(run.options(), None).read())["forget"]
    assert found["step"] == 10 * math.ceil(len(rows) / run.options().training.batch_size)
    assert found["seconds"] > 0.0


# Adapters ------------------------------------------------------------------------------------------------------------------------


def test_adapters_end_merged_and_their_start_counts_as_training(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(grid, "FILA")
    model, tokenizer, scorer = start(run)
    names, known = list(model.state_dict()), scorer.along(model)
    original = training.assembly.adapted

    def slowly(*arguments: Any) -> nn.Module:
        time.sleep(0.3)
        return original(*arguments)

    monkeypatch.setattr(training.assembly, "adapted", slowly)
    ended = KINDS["surgery"](run, model, tokenizer, scorer, half(run))
    assert ended.extra_backward_passes == 2 * 2  # both sets, two batches each
    assert ended.matching.curve[0]["seconds"] >= 0.3
    assert list(ended.after) == list(ended.before) == names
    ended.load(ended.before)
    assert scorer.along(ended.model) == pytest.approx(known, rel=1e-5)
    ended.load(ended.after)
    last = ended.matching.curve[-1]
    assert scorer.along(ended.model)["forget_probability"] == pytest.approx(last["forget_probability"], rel=1e-3)
    assert last["forget_probability"] <= 0.5


def test_seconds_before_training_count() -> None:
    late, early = (training.MatchTargets([], lambda model: {}, lambda model: {}, spent=spent) for spent in (7.0, 0.0))
    trainer: Any = SimpleNamespace(global_step=0, should_stop=False)
    for matching in (late, early):
        matching.on_train_start(trainer, SimpleNamespace(get_submodule=lambda name: nn.Linear(1, 1)))
    assert 7.0 <= late.curve[0]["seconds"] < 7.5
    assert early.curve[0]["seconds"] < 0.5


def test_the_seconds_and_steps_of_every_training_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 5.0, 9.0])
    monkeypatch.setattr(weights.time, "perf_counter", lambda: next(now))
    clock: Any = weights._Clock()
    for steps in (3, 4):  # a vector is fine-tuned on each half of the forget set
        clock.on_train_start(SimpleNamespace(global_step=0), None)
        clock.on_train_end(SimpleNamespace(global_step=steps), None)
    assert (clock.steps, clock.seconds) == (7, 6.0)


# Equal retention -----------------------------------------------------------------------------------------------------------------


def ended_at(value: float) -> tuple[Ended, Any]:
    """A model with one number that is both what it is and how much it retains; it started at 1."""
    model = nn.Module()
    model.register_parameter("x", nn.Parameter(torch.tensor(value)))
    matching = Matching([], lambda model: {"forget_probability": 0.0}, lambda model: {})
    matching.look(model, {"step": 4.0, "seconds": 2.0}, lambda position: None)
    before, after = {"x": torch.tensor(1.0)}, {"x": torch.tensor(value)}
    scorer = SimpleNamespace(
        retention=lambda model: float(model.x.detach()),
        thoroughly=lambda model: {"retain_probability": float(model.x.detach())},
    )
    return Ended(matching, model, model.load_state_dict, before, after), scorer


def test_the_mix_keeps_the_share_and_no_more() -> None:
    found = equal_retention(0.75, *ended_at(0.2))
    assert isinstance(found, dict)
    assert found["share_of_start"] == pytest.approx((0.75 - 0.2) / 0.8, abs=2e-3)
    assert 0.75 <= found["retain_probability"] < 0.752
    assert (found["step"], found["seconds"]) == (4.0, 2.0)


def test_nothing_is_mixed_where_enough_is_kept() -> None:
    found = equal_retention(0.75, *ended_at(0.8))
    assert isinstance(found, dict)
    assert (found["share_of_start"], found["retain_probability"]) == (0.0, pytest.approx(0.8))


def test_a_mix_of_what_a_weight_takes_away_has_a_smaller_weight() -> None:
    ended, scorer = ended_at(0.2)
    ended.matching.curve[-1]["weight"] = 2.0
    found = equal_retention(0.75, ended, scorer)
    assert isinstance(found, dict)
    assert found["weight"] == pytest.approx(2.0 * (1.0 - 0.75) / (1.0 - 0.2), abs=5e-3)


def test_what_comes_after_the_last_step_counts_at_a_methods_own_end() -> None:
    ended, scorer = ended_at(0.8)
    attacked: list[bool] = []
    scorer.thoroughly = lambda model, attack: attacked.append(attack) or {"retain_probability": float(model.x.detach())}
    found = own_end(ended._replace(cost=Cost(3.0, 8), peak_megabytes=5.0), scorer)
    assert isinstance(found, dict)
    assert (found["step"], found["seconds"], found["further_backward_passes"]) == (4.0, 5.0, 8)
    assert (found["retain_probability"], found["peak_megabytes"]) == (pytest.approx(0.8), 5.0)
    assert attacked == [True]
    assert own_end(ended._replace(diverged="diverged: step 3"), scorer) == "diverged: step 3"
    ended, scorer = ended_at(math.nan)
    assert own_end(ended, scorer) == "diverged: retain_probability is nan at the end"


def test_an_end_that_diverged_has_no_equal_retention() -> None:
    assert equal_retention(0.75, *ended_at(math.nan)) == "diverged: retain_probability is nan at the end"
    ended, scorer = ended_at(0.9)  # where a step was refused, the weights are those before it
    assert equal_retention(0.75, ended._replace(diverged="diverged: step 3"), scorer) == "diverged: step 3"


# From end to end -----------------------------------------------------------------------------------------------------------------


def test_every_kind_forgets_as_much_and_then_keeps_as_much(done: Path, grid: Grid) -> None:
    known = json.loads((done / "models" / "m0.json").read_text())["start"]["retain_probability"]
    for run in grid.runs():
        name = run.method.name
        met = line(done, name, "forget_probability=0.3")
        assert met["reached"] == "True", (name, met["reason"])
        assert float(met["forget_probability"]) == pytest.approx(0.3, rel=0.041)
        assert bool(met["weight"]) == (run.method.kind != "surgery")
        for share in (0.95, 0.5):
            mixed = line(done, name, f"retained={share}")
            rho, kept = float(mixed["share_of_start"]), float(mixed["retain_probability"])
            assert kept >= share * known * (1 - 1e-6)
            assert rho == 0.0 or kept == pytest.approx(share * known, rel=0.02), name
            assert float(mixed["steps"]) >= float(met["steps"]) - 1e-6
        assert float(line(done, name, "retained=0.95")["share_of_start"]) >= rho
    assert any(float(line(done, row["name"], "retained=0.95")["share_of_start"]) > 0.0 for row in ROWS)


def test_backward_passes_before_the_first_step_are_counted(done: Path) -> None:
    row, other = (line(done, name, "forget_probability=0.3") for name in ("FILA", "task vector"))
    assert float(row["backward_passes"]) == pytest.approx(4 + 2 * float(row["steps"]))
    assert float(other["backward_passes"]) == float(other["steps"]) == 6.0


def test_the_table_has_notes_weights_and_shares(done: Path) -> None:
    text = (done / "table.md").read_text()
    head = next(part for part in text.split("\n") if part.startswith("| method | runs | retain"))
    assert head.endswith("| seconds | notes |")
    assert "## At 95% of the start's retain probability, restored by mixing with the start model" in text
    assert "| method | runs | forget probability | retain probability |" in text
    tru = next(part for part in text.split("\n") if part.startswith("| TRU | 1 of 1"))
    assert "TRU-style (unverified)" in tru
    seconds = float(line(done, "TRU", "forget_probability=0.3")["seconds"])
    assert f"| {seconds:.1f} | TRU-style" in tru
    weight = float(line(done, "ULD", "forget_probability=0.3")["weight"])
    assert any(part.startswith("| ULD | ") and f" {weight:.3f} |" in part for part in text.split("\n"))
    assert (done / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_a_grid_of_plain_rows_has_no_notes_and_no_weights(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path, methods=METHODS))
    write_table(grid, read_results(grid, tmp_path), tmp_path, tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "notes" not in text
    assert "weight" not in text.lower().replace("weights", "")


def test_a_mix_or_an_end_after_a_finish_is_not_a_point_on_the_way(grid: Grid, done: Path) -> None:
    from lightning_modules.ablation.figure import _interpolated

    rows = [row for row in read_results(grid, done) if row["method"] == "GA"]
    way = [row for row in rows if not row["target"].startswith("retained")]
    at = torch.logspace(0, -2, 20).numpy()
    end = way[0] | {"target": "end=own", "reached": True, "forget_probability": 0.2, "retain_probability": 0.999}
    assert _interpolated([*rows, end], at).tolist() == pytest.approx(_interpolated(way, at).tolist(), nan_ok=True)
