"""Depth in an ablation: own ends, attacks, held-out retention, finish, UNDO, adversary, JensUn and many protected rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs
from lightning_modules import cli
from lightning_modules.ablation import attacks, depth_figure
from lightning_modules.ablation.attacks import attacked, relearn_settings
from lightning_modules.ablation.grid import Grid, Run
from lightning_modules.ablation.many_rows import ManyRows, RowsData
from lightning_modules.ablation.memory import peak_megabytes, reset_peak
from lightning_modules.ablation.methods import Method
from lightning_modules.ablation.reading import read_grid
from lightning_modules.ablation.results import read_results
from lightning_modules.ablation.sections import Data, Evaluate, Targets
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.run.options import FirstOptions
from lightning_modules.training.callbacks import RelearnSettings, relearn_probe
from tests.lightning_modules.ablation.test_ablation import MODEL, examples, write_grid
from tests.lightning_modules.evaluation.evaluation_workers import SPLITS, model_and_tokenizer
from tests.lightning_modules.training.test_module import Bigram, batches, fit
from tests.lightning_modules.training.test_perturbed import answers
from tests.tolerances import STEPPED_FLOAT32, close

pytestmark = pytest.mark.filterwarnings("ignore:.*computes all its logits.*", "ignore:.*does not have many workers.*")
METHODS = [
    {"name": "CE-U", "stop_below": 0.5},
    {"name": "deep", "steps": 3, "lr_schedule": "linear", "radius": {"start": 0.1, "end": 0.2}, "finish_steps": 2},
    {"name": "auto", "steps": 3, "radius": "auto"},
    {"name": "instead", "steps": 3, "radius": {"start": 0.1}, "substitute_weight": 1.0},
    {"name": "noise", "steps": 3, "retain_noise": 0.1, "finish_steps": 2},
    {"name": "anchor", "steps": 3, "retain_anchor": 100, "finish_steps": 2},
    {"name": "rows", "retain_rows": 4, "row_examples": 2, "ema_decay": 0.9, "guard": "update", "steps": 2},
    {"name": "UNDO", "steps": 2, "undo": {"steps": 3, "alpha": 0.3}},
    {"name": "adversary", "steps": 3, "adversary": {"lr": 0.1, "every": 2}},
    {"name": "JensUn", "steps": 2, "forget_loss": "jensun", "retain_loss": "jensen_shannon", "rule": "sum"},
]
PASSES = {
    "deep": 3 * 3 + 2 * 2,
    "auto": 2 + 3 * 3,
    "instead": 3 * 4,
    "noise": 3 * 3 + 2 * 3,
    "rows": 2 * 5,
    "UNDO": 2 * 2 + 2 * 3,
    "adversary": 3 * 3,
    "JensUn": 2 * 2,
}
"""Forget and retain, or each of the parts, and the direction, the adversary's lesson, noised examples or substitutes; two for each step of
an end, with noised examples three. A radius is measured on two batches."""
ATTACKS = {"long": {"steps": 4, "lr": 2e-3}, "short": {"steps": 2, "lr": 1e-3}}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def written(folder: Path, **changes: Any) -> str:
    heldout = folder / "heldout.json"
    heldout.write_text(json.dumps([{"question": "Where is Oslo?", "answer": "By the fjord."}]))
    small = {"generated_examples": 3, "max_new_tokens": 4, "curve_examples": 6, "attacks": ATTACKS}
    data = {name: str(folder / f"{name}.json") for name in ("forget", "retain")}
    grid: dict[str, Any] = {
        "model": MODEL | {"epochs": 20},
        "data": data | {"retain_heldout": str(heldout)},
        "targets": {"end": ["own"]},
        "seeds": {"data": [0]},
        "evaluate": small,
        "methods": METHODS,
    }
    return write_grid(folder, **grid | changes)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def done(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    assert cli.main(["ablate", "--config", config, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def lines(done: Path) -> dict[str, dict[str, str]]:
    with (done / "results.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


# A grid from end to end ----------------------------------------------------------------------------------------------------------


def test_every_method_is_scored_and_attacked_at_its_own_end(lines: dict[str, dict[str, str]], done: Path) -> None:
    for method in METHODS:
        row = lines[method["name"]]
        assert (row["target"], row["reached"], row["value"]) == ("end=own", "True", "")
        assert all(0.0 <= float(row[f"attack {name}"]) <= 1.0 for name in ATTACKS)
        assert 0.0 < float(row["retain_heldout_probability"]) < 1.0
        assert int(float(row["retain_heldout_n"])) == 1
        assert 0.0 <= float(row["forget_degenerate"]) <= 1.0
        if "steps" in method:
            assert float(row["steps"]) == method["steps"]
    table = (done / "table.md").read_text()
    assert "## At each method's own end" in table
    heads = next(line for line in table.splitlines() if line.startswith("| method | runs"))
    wanted = ["held-out retain probability", *ATTACKS, "degenerate"]
    assert [name for name in heads.split(" | ") if name in wanted] == wanted


def test_backward_passes_are_those_of_every_loss_and_of_the_end(lines: dict[str, dict[str, str]]) -> None:
    assert {name: float(lines[name]["backward_passes"]) for name in PASSES} == PASSES


def test_a_measured_radius_is_written_down_and_is_as_good_as_given(done: Path, tmp_path: Path) -> None:
    measured = json.loads((done / "runs" / "auto-m0-d0.json").read_text())
    assert set(measured["radius"]) == {"start", "end"}
    given = written(tmp_path, methods=[{"name": "given", "steps": 3, "radius": measured["radius"]}])
    assert cli.main(["ablate", "--config", given, "--output", str(tmp_path / "runs")]) == 0
    same = json.loads((tmp_path / "runs" / "runs" / "given-m0-d0.json").read_text())
    assert same["radius"] is None
    assert same["targets"][0]["attacks"] == measured["targets"][0]["attacks"]


def test_it_ends_where_the_forget_probability_is_low_enough(lines: dict[str, dict[str, str]], done: Path) -> None:
    curve = json.loads((done / "runs" / "ce-u-m0-d0.json").read_text())["curve"]
    assert [point["forget_probability"] < 0.5 for point in curve] == [False] * (len(curve) - 1) + [True]
    assert float(lines["CE-U"]["forget_probability"]) == pytest.approx(curve[-1]["forget_probability"], rel=1e-5)


def test_the_picture_has_a_point_for_every_method_and_attack(
    done: Path, lines: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert (done / "depth.png").read_bytes().startswith(b"\x89PNG")
    grid = read_grid(done / "grid.yaml")
    drawn: dict[str, list[tuple[float, float]]] = {}

    def point(axes: Any, at: Any, mark: str, colour: Any, label: str) -> None:
        drawn.setdefault(label, []).append((at[0].mean, at[1].mean))

    monkeypatch.setattr(depth_figure, "_point", point)
    depth_figure.draw_depth(grid, read_results(grid, done), done, tmp_path / "depth.png")
    reference = json.loads((done / "models" / "m0.json").read_text())["reference"]
    assert drawn.pop(depth_figure.REFERENCE) == [
        (reference["attacks"][name], reference["retain_heldout_probability"]) for name in ATTACKS
    ]
    for method, points in drawn.items():
        row = lines[method]
        wanted = [(float(row[f"attack {name}"]), float(row["retain_heldout_probability"])) for name in ATTACKS]
        assert points == [pytest.approx(pair) for pair in wanted]
    assert drawn.keys() == lines.keys()


def test_the_reference_is_the_control_of_every_attack(done: Path) -> None:
    known = json.loads((done / "models" / "m0.json").read_text())
    assert list(known["reference"]["attacks"]) == list(ATTACKS)
    assert known["start"]["retain_heldout_n"] == 1
    row = next(line for line in (done / "table.md").read_text().splitlines() if line.startswith("| never saw"))
    for name in ATTACKS:
        assert f"{known['reference']['attacks'][name]:.3f}" in row


def test_what_is_done_is_not_done_again_and_other_attacks_are_refused(
    config: str, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ablate", "--config", config, "--output", str(done)]) == 0
    assert f"{len(METHODS)} runs, 0 of them now" in capsys.readouterr().err
    other = Path(config).parent / "other.yaml"
    other.write_text(Path(config).read_text().replace("lr: 0.002", "lr: 0.003"))
    assert cli.main(["ablate", "--config", str(other), "--output", str(done)]) == 1
    assert "made with other settings (evaluate" in " ".join(capsys.readouterr().err.split())


# Its parts -----------------------------------------------------------------------------------------------------------------------


def test_an_attack_is_the_relearning_probe_of_these_settings() -> None:
    model, tokenizer = model_and_tokenizer()
    data = ForgetRetainDataModule(SPLITS["forget"], SPLITS["retain"], tokenizer)
    data.setup()
    assert data.dataset is not None
    forget, pad = data.dataset.forget, tokenizer.pad_token_id
    found = attacked(model, forget, ATTACKS, pad_token_id=pad)
    for name, settings in ATTACKS.items():
        exact = RelearnSettings(steps=int(settings["steps"]), every=1, lr=settings["lr"])
        assert found[name] == relearn_probe(model, forget, pad_token_id=pad, settings=exact)["points"][-1]["rest"]
    assert relearn_settings({"steps": 20.0, "lr": 1e-3, "batch_size": 4.0}).batch_size == 4


def test_attacks_of_different_lengths_are_one_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_and_tokenizer()
    data = ForgetRetainDataModule(SPLITS["forget"], SPLITS["retain"], tokenizer)
    data.setup()
    assert data.dataset is not None
    forget, pad = data.dataset.forget, tokenizer.pad_token_id
    lengths = {"A7": {"steps": 7, "lr": 2e-3}, "other": {"steps": 4, "lr": 1e-3}, "A4": {"steps": 4, "lr": 2e-3}}
    apart = {name: attacked(model, forget, {name: given}, pad_token_id=pad)[name] for name, given in lengths.items()}
    scored: list[list[int]] = []

    def counted(*args: Any, settings: RelearnSettings, **keywords: Any) -> dict[str, Any]:
        result = relearn_probe(*args, settings=settings, **keywords)
        scored.append([point["step"] for point in result["points"]])
        return result

    monkeypatch.setattr(attacks, "relearn_probe", counted)
    together = attacked(model, forget, lengths, pad_token_id=pad)
    assert together == apart
    assert (list(together), scored) == (list(lengths), [[0, 4, 7], [0, 4]])  # and never in between


def test_the_parts_of_the_retain_set_are_whole_apart_and_in_their_order() -> None:
    _, tokenizer = model_and_tokenizer()
    rows, kept = examples(12, 18), examples(0, 11)
    data = ForgetRetainDataModule(rows, kept, tokenizer, batch_size=2, seed=3)
    loader = RowsData(data, 4, 1)
    loader.setup()
    given = [*loader.train_dataloader()]
    assert [sorted(batch) for batch in given] == [["forget", "retain_0", "retain_1", "retain_2", "retain_3"]] * 3
    seen = [[int(batch[f"retain_{row}"]["index"]) for batch in given] for row in range(4)]
    ends = [0, 3, 6, 8, 11]  # rounded quarters of 11
    for row, first, last in zip(seen, ends, ends[1:], strict=False):
        assert sorted(set(row)) == list(
            range(first, last)
        )  # three draws are a whole part, or a part of two and one again
    forget = [batch["forget"]["index"].tolist() for batch in given]
    assert forget == [batch["forget"]["index"].tolist() for batch in data.train_dataloader()]
    with pytest.raises(ValueError, match="at most as many rows as retain examples, 11, found 12"):
        RowsData(data, 12).train_dataloader()


@pytest.mark.parametrize("weight", [0.0, 6.0])
def test_every_part_has_a_row_of_its_own(weight: float) -> None:
    parts, model = [batches(1, seed=seed)[0]["retain"] for seed in (1, 2, 3)], Bigram()
    batch = {"forget": batches(1)[0]["forget"], **{f"retain_{number}": part for number, part in enumerate(parts)}}

    def gradient(name: str, loss: Any, skip: int = 0) -> torch.Tensor:
        return torch.autograd.grad(answers(model, batch[name], loss, skip), [model.table])[0].flatten().double()

    rows = [gradient("forget", gs.losses.ceu, 1), *(gradient(f"retain_{n}", gs.losses.cross_entropy) for n in range(3))]
    before, lr = model.table.detach().clone(), 0.1

    def surgery(base: Any, **options: Any) -> gs.GradientSurgery:
        return gs.GradientSurgery(base, rule="gru", **options)

    module = ManyRows(
        model, rows=3, surgery=surgery, retain_weight=weight, optimizer=lambda named: torch.optim.SGD(named, lr=lr)
    )
    fit(module, [batch])
    stacked = torch.stack(rows)
    record = module.surgery.record
    assert record is not None
    close(record.gram, stacked @ stacked.T, STEPPED_FLOAT32)
    coefficients = gs.rules.gru(stacked @ stacked.T)
    coefficients[1:] += weight / 3
    close(model.table.detach().flatten().double(), before.flatten() - lr * coefficients @ stacked, STEPPED_FLOAT32)


def test_the_peak_of_memory_is_watched_anew() -> None:
    if not reset_peak():
        pytest.skip("this system does not say how much memory a process took")
    before = peak_megabytes()
    assert before is not None
    held = torch.ones(64 * 2**20)  # 256 MB
    after = peak_megabytes()
    assert after is not None
    assert after - before > 200
    del held
    reset_peak()
    assert (peak_megabytes() or 0.0) < after - 100


# The grid ------------------------------------------------------------------------------------------------------------------------


PLAIN = Method("x")


def config_of(method: Method = PLAIN, **sections: Any) -> dict[str, Any]:
    return Run(Grid((method,), **{"targets": Targets((0.5,))} | sections), method, 0, 0).config


@pytest.mark.parametrize(
    "change",
    [{"steps": 5}, {"stop_below": 0.1}, {"radius": {"start": 0.5}}, {"undo": {"alpha": 0.2}}, {"retain_rows": 2},
     {"adversary": {"lr": 0.1}}, {"finish_steps": 3}, {"lr_schedule": "linear"}, {"max_norm": 1.0}],
)  # fmt: skip
def test_what_a_result_depends_on_is_in_its_config(change: dict[str, Any]) -> None:
    default = config_of()["method"]
    assert config_of(Method("x", **change))["method"] == {**default, **change}
    assert not set(change) & set(default)


def test_sections_that_came_later_are_left_out_where_they_say_nothing() -> None:
    plain = config_of()
    assert "end" not in plain["targets"]
    assert "first" not in plain
    assert not {"attacks", "attack_matches"} & set(plain["evaluate"])
    assert not {"retain_heldout", "heldout_authors"} & set(plain["data"])
    later = config_of(
        data=Data(heldout_authors=2),
        evaluate=Evaluate(attacks=ATTACKS),
        targets=Targets(end=("own",)),
        model="model",
        first=FirstOptions(True),
    )
    assert later["data"]["heldout_authors"] == 2
    assert later["evaluate"]["attacks"] == ATTACKS
    assert later["targets"]["end"] == ["own"]
    assert later["first"]["finetune_first"] is True


BAD: list[tuple[dict[str, Any], str]] = [
    ({"methods": [{"name": "x", "stop_below": 0.1}], "targets": {"forget_probability": [0.3]}, "evaluate": {}}, "for stop_below"),
    ({"methods": [{"name": "x", "undo": {"alpha": 0}}]}, "undo, alpha"),
    ({"methods": [{"name": "x", "undo": {"gamma": 1}}]}, "undo and adversary know.*gamma"),
    ({"methods": [{"name": "x", "undo": {"alpha": 0.5}, "finish_steps": 2}]}, "undo or finish_steps, found both"),
    ({"methods": [{"name": "x", "adversary": {"every": 0}}]}, "adversary, every"),
    ({"methods": [{"name": "x", "adversary": {"lr": 1}, "radius": {"start": 1}}]}, "neither radius nor retain_inside"),
    ({"methods": [{"name": "x", "radius": "atuo"}]}, "radius.*atuo"),
    ({"methods": [{"name": "x", "retain_rows": -1}]}, "retain_rows >= 0"),
    ({"methods": [{"name": "x", "retain_rows": 2, "radius": {"start": 1}}]}, "retain_rows: expected none of .*found radius"),
    ({"methods": [{"name": "x", "steps": 2, "epochs": 2}]}, "steps or epochs, found both"),
    ({"methods": [{"name": "x", "steps": 0}]}, "steps"),
    ({"methods": [{"name": "x", "stop_below": 1.5}]}, "stop_below between 0 and 1"),
    ({"methods": [{"name": "x", "kind": "uld", "uld": {"num_layers": 1}}]}, "end: expected methods of the kind surgery"),
    ({"methods": [{"name": "x", "kind": "task_vector", "steps": 2}], "targets": {"forget_probability": [0.3]}, "evaluate": {}}, r"found \['steps'\]"),
    ({"evaluate": {"attacks": {"A": {"steps": 2}}}}, "attacks, A: expected steps and lr.*no lr"),
    ({"evaluate": {"attacks": {"A": {"steps": 2.5, "lr": 1}}}}, "steps: expected a whole number"),
    ({"evaluate": {"attacks": {"A": {"steps": 2, "lr": 0}}}}, "attacks, A: .*learning rate > 0"),
    ({"evaluate": {"attacks": {"A": {"steps": 2, "lr": 1, "share": 1.0}}}}, "attacks, A: .*share"),
    ({"evaluate": {"attacks": {"A": {"steps": 2, "lr": 1, "kind": 1}}}}, "attacks, A: .*kind"),
    ({"evaluate": {"attacks": {"A": {"steps": 2, "lr": 1, "also": 1}}}}, "attacks, A: expected no also"),
    ({"evaluate": {"attack_matches": True}}, "attacks with attack_matches"),
    ({"targets": {"forget_probability": [0.3]}}, "attacks: expected targets with end"),
    ({"targets": {"end": ["own", "own"]}}, r"end: expected \[own\]"),
    ({"targets": {"end": ["other"]}}, "own"),
    ({"first": {"finetune_first": True}}, "first: expected a ready model"),
    ({"first": {"epochs": 2}}, "first.*expected any of"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_a_grid_that_cannot_be_meant_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    rows = {"methods": [{"name": "x"}]}
    with pytest.raises(ValueError, match=said):
        read_grid(written(tmp_path, **rows | changes))
