"""The spread over seeds: of the runs' own numbers, of one configuration only, and no surer than it is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lightning_modules import cli
from lightning_modules import folder as outputs
from lightning_modules.report import figures
from lightning_modules.report.finished import FinishedRun
from lightning_modules.report.over_seeds import curves, scores_over_seeds, sd_factors, sentences
from lightning_modules.report.terminal import shown
from lightning_modules.run.report import draw
from tests.lightning_modules.report.reports import Page, make_seed, read_metrics, read_seeds
from tests.reference.report import mean_and_deviation

NAMES = {"probability": "probability", "rouge_l_recall": "ROUGE-L recall", "truth_ratio": "truth ratio", "nll": "NLL"}
CELLS = [(split, model) for split in ("forget", "retain") for model in ("before", "after", "reference")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seeds 3 (whose report it is), 10 and 2, of which the second stopped earlier."""
    root = tmp_path_factory.mktemp("seeds")
    made = [make_seed(root / f"r{seed}", seed, points=points) for seed, points in ((3, 9), (10, 6), (2, 11))]
    assert cli.main(["report", *map(str, made)]) == 0
    return made


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def table_of(folder: Path) -> dict[tuple[str, ...], list[str]]:
    """Rows of the Markdown table over seeds."""
    text = (folder / "report.md").read_text(encoding="utf-8").partition("### Over seeds")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {tuple(row[:3]): row[3:] for row in rows[2:]}


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.exists() else {}


# ---- what it says


def test_every_row_is_of_the_runs_metrics(runs: list[Path]) -> None:
    metrics = [read_metrics(folder) for folder in runs]
    table, words = table_of(runs[0]), page_of(runs[0]).words()
    assert len(table) == len(CELLS) * len(NAMES)
    for split, model in CELLS:
        for column, heading in NAMES.items():
            values = [found[model][split][column] for found in metrics]
            mean, sd = mean_and_deviation(values)
            expected = [*map(shown, (values[0], mean, sd, min(values), max(values))), "3"]
            assert table[split, model, heading] == expected
            assert re.search(re.escape(heading) + r"\s*" + r"\s*".join(map(re.escape, expected)), words)
    exact = {(row.split, row.model, row.heading): row for row in scores_over_seeds(read_seeds(runs[0], runs[1:]))}
    for split, model in CELLS:
        values = [found[model][split]["nll"] for found in metrics]
        row = exact[split, model, "NLL"]
        assert (row.mean, row.sd) == pytest.approx(mean_and_deviation(values), rel=1e-12)
        assert (row.value, row.low, row.high, row.n) == (values[0], min(values), max(values), 3)


def test_the_words_say_what_a_seed_changes_and_how_little_three_runs_tell(runs: list[Path]) -> None:
    markdown = (runs[0] / "report.md").read_text()
    for text in (page_of(runs[0]).words(), " ".join(markdown.split())):
        assert "3 runs of this configuration were made, with seeds 3 (this one), 2 and 10." in text
        assert (
            "Another seed changes the order in which the examples are trained on, which examples to keep a run sees at all if it is "
            "shorter than a pass over them and the small model that is trained" in text
        )
        assert "and with it the reference" in text
        assert "the spread says nothing about other data." in text
        assert "how far another seed lands, not how well the mean is known" in text
        assert (
            "for 3 normally distributed values the true standard deviation is 0.52 to 6.3 times the one shown" in text
        )
        assert "is below 0.05 (--stop-below)" in text.replace("`", "")
        assert "Nothing here says how far another seed would land" not in text
        assert "standard deviation of two" not in text
        assert "different versions" not in text
        assert "NaN" not in text
    assert page_of(runs[0]).words().index("How sure it is") < page_of(runs[0]).words().index("Over seeds")


SOME = "which examples to keep a run sees at all if it is shorter than a pass over them"


@pytest.mark.parametrize(
    ("options", "said", "not_said"),
    [
        ({"model": "m", "tofu": "forget10"}, ["what dropout leaves out", "does not change the model before, the sets"], ["scratch", "adapters", "A run stops", "refusal"]),
        ({"model": "m", "tofu": "forget10", "lora_rank": 4}, ["the first weights of the adapters"], ["scratch"]),
        ({"model": "m", "tofu": "forget10", "method": "uld"}, ["the first weights of the adapters"], ["scratch"]),
        ({"reference": "log"}, ["from scratch first.", "does not change the reference, the sets"], ["with it the reference", "dropout"]),
        ({"model": "m", "tofu": "forget10", "finetune_first": True}, ["the target that is taught first, and with it the reference.", "does not change the sets"], ["model before"]),
        ({"model": "m", "tofu": "forget10", "retain_noise": 0.1}, ["which tokens of the noised retain examples are replaced"], []),
        ({"forget_loss": "dpo"}, [", which refusal each answer to forget gets and", SOME], []),
        ({"forget_loss": "idk", "retain_weight": 1.0}, ["which refusal each answer to forget gets", SOME], []),
        ({"forget_loss": "npo"}, [SOME], ["refusal"]),
        ({"forget_loss": "of a later version"}, [SOME], ["refusal"]),
        ({"forget_loss": "dpo", "method": "uld"}, [SOME], ["refusal"]),
    ],
)  # fmt: skip
def test_what_a_seed_changes_depends_on_what_was_run(
    tmp_path: Path, options: dict[str, Any], said: list[str], not_said: list[str]
) -> None:
    made = [make_seed(tmp_path / str(seed), seed, **options) for seed in (0, 1, 2)]
    words = " ".join(sentences(read_seeds(made[0], made[1:])))
    for text in said:
        assert text in words
    for text in not_said:
        assert text not in words


def test_levels_that_each_run_settled_by_itself_are_all_said(tmp_path: Path) -> None:
    made = [make_seed(tmp_path / str(seed), seed, stop_below=level) for seed, level in ((0, 0.0677), (1, 0.0701))]
    for folder in made:
        outputs.write_json(folder / "training.json", {"target": {"of": "reference"}})
    words = " ".join(sentences(read_seeds(made[0], made[1:])))
    assert "below its reference's level, 0.0677 to 0.0701 here. Among" in words


def test_two_runs_are_hardly_a_spread(tmp_path: Path) -> None:
    made = [make_seed(tmp_path / str(seed), seed) for seed in (0, 1)]
    draw(made[0], made[1:])
    words = page_of(made[0]).words()
    assert "A standard deviation of two is hardly one: it is their distance divided by the square root of 2." in words
    assert "0.45 to 32 times the one shown (95 % interval, chi-squared with 1 degree of freedom)" in words
    for row in scores_over_seeds(read_seeds(made[0], made[1:])):
        assert row.sd == pytest.approx((row.high - row.low) / math.sqrt(2.0), abs=1e-12)


def test_a_run_alone_has_the_report_that_it_had(tmp_path: Path) -> None:
    made, other = (make_seed(tmp_path / name, 0) for name in "ab")
    assert cli.main(["report", str(made)]) == 0
    draw(other, [])
    text, words = (made / "report.md").read_text(), page_of(made).words()
    for said in (text, words):
        assert "This is one run with one seed. Nothing here says how far another seed would land" in said
        assert "Over seeds" not in said
        assert "Thin lines" not in said
    for name in ("curves.png", "report.md"):
        assert (made / name).read_bytes().replace(b"/a\n", b"/b\n") == (other / name).read_bytes()
    assert scores_over_seeds(read_seeds(made, [])) == []


def test_the_other_folders_are_only_read_and_their_order_does_not_matter(tmp_path: Path) -> None:
    made = [make_seed(tmp_path / str(seed), seed) for seed in (5, 11, 2, 7)]
    before = [everything(folder) for folder in made[1:]]
    draw(made[0], made[1:])
    first = everything(made[0])
    assert [everything(folder) for folder in made[1:]] == before
    draw(made[0], made[:0:-1])
    assert everything(made[0]) == first
    assert "with seeds 5 (this one), 2, 7 and 11." in (first["report.md"]).decode()


def test_nan_in_one_run_is_nan_in_the_spread(tmp_path: Path) -> None:
    made = [make_seed(tmp_path / str(seed), seed) for seed in (0, 1, 2)]
    metrics = read_metrics(made[1])
    for wrong in ("NaN", "Infinity"):
        metrics["after"]["retain"]["nll"] = wrong
        outputs.write_json(made[1] / "metrics.json", metrics)
        run = read_seeds(made[0], made[1:])
        rows = {(row.split, row.model, row.heading): row for row in scores_over_seeds(run)}
        row = rows["retain", "after", "NLL"]
        assert row.value == read_metrics(made[0])["after"]["retain"]["nll"]
        assert [math.isnan(value) for value in (row.mean, row.sd, row.low, row.high)] == [True] * 4
        assert row.n == 3
        assert sum(math.isnan(row.mean) for row in rows.values()) == 1
        assert sentences(run)[-1] == "Where a score is not finite in some run, its spread is NaN: no run was left out."
    draw(made[0], made[1:])
    assert table_of(made[0])["retain", "after", "NLL"] == [shown(row.value), "NaN", "NaN", "NaN", "NaN", "3"]


def test_a_score_that_a_run_lacks_is_counted(tmp_path: Path) -> None:
    made = [make_seed(tmp_path / str(seed), seed) for seed in (0, 1, 2)]
    metrics = read_metrics(made[2])
    metrics["after"]["retain"]["truth_ratio"] = None
    outputs.write_json(made[2] / "metrics.json", metrics | {"reference": None})
    metrics = read_metrics(made[1]) | {"reference": None}
    outputs.write_json(made[1] / "metrics.json", metrics)
    draw(made[0], made[1:])
    table = table_of(made[0])
    assert table["retain", "after", "truth ratio"][-1] == "2"
    assert table["retain", "after", "NLL"][-1] == "3"
    value = table["forget", "reference", "NLL"][0]
    assert table["forget", "reference", "NLL"] == [value, value, "-", value, value, "1"]
    draw(made[1], [made[0], made[2]])  # what this run lacks has no row
    assert ("forget", "reference", "NLL") not in table_of(made[1])


def test_a_score_of_zero_counts_as_any_other() -> None:
    def finished(probability: float) -> FinishedRun:
        return FinishedRun({"before": None, "after": {"forget": {"probability": probability}}, "reference": None})

    run = finished(0.5)
    run.others = [finished(0.0), finished(0.25)]
    (row,) = scores_over_seeds(run)
    assert (row.value, row.mean, row.sd, row.low, row.high, row.n) == (0.5, 0.25, 0.25, 0.0, 0.5, 3)


def test_other_versions_and_a_collapse_are_told_and_are_text(tmp_path: Path) -> None:
    made = [make_seed(tmp_path / str(seed), seed) for seed in (0, 1, 2)]
    outputs.write_json(made[1] / "metrics.json", read_metrics(made[1]) | {"versions": {"torch": "<b>2|2</b>"}})
    outputs.write_json(made[2] / "training.json", {"collapse": {"reason": "retain 0.01"}})
    draw(made[0], made[1:])
    page = page_of(made[0])
    assert "The runs were made with different versions of torch (2.13, <b>2|2</b>)" in page.words()
    assert "The collapse alarm stopped the run with seed 2." in page.words()
    assert "b" not in {tag for tag, _ in page.tags}
    assert "<b>" not in (made[0] / "report.md").read_text()
    assert "2|2" not in (made[0] / "report.md").read_text().replace("2\\|2", "")


# ---- what is refused


def change(folder: Path, **options: Any) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text()) | options
    known = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.yaml").write_text(yaml.safe_dump(known))


def rescore(folder: Path, changed: Callable[[dict[str, Any]], object]) -> None:
    metrics = read_metrics(folder)
    changed(metrics)
    outputs.write_json(folder / "metrics.json", metrics)


def ask_others(folder: Path) -> None:
    text = (folder / "evaluation.jsonl").read_text()
    (folder / "evaluation.jsonl").write_text(text.replace("retain question 3?", "retain question three?"))


REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "options": (lambda f: change(f, rule="sum", epochs=3), ["--epochs 3 (not 20)", '--rule "sum" (not "gru")']),
    "one more": (lambda f: change(f, added=1), ["--added 1 (not missing)"]),
    "one fewer": (lambda f: change(f, lr=...), ["--lr missing (not 5e-05)"]),
    "seed": (lambda f: (change(f, seed=0), rescore(f, lambda m: m.update(seed=0))), ["found seed 0 in", "no independent evidence"]),
    "two seeds": (lambda f: change(f, seed=4), ["found 4 in config.yaml and 1 in metrics.json"]),
    "no config": (lambda f: (f / "config.yaml").unlink(), ["expected a config.yaml", "config.yaml is not in the folder"]),
    "bad config": (lambda f: (f / "config.yaml").write_text("{"), ["expected a config.yaml", "config.yaml cannot be read"]),
    "empty config": (lambda f: (f / "config.yaml").write_text("{}"), ["config.yaml has no whole number as seed"]),
    "word as seed": (lambda f: change(f, seed="one"), ["config.yaml has no whole number as seed"]),
    "fewer splits": (lambda f: rescore(f, lambda m: m["after"].pop("retain")), ["found 40 of forget in", "40 of forget, 30 of retain in"]),
    "fewer examples": (lambda f: rescore(f, lambda m: m["after"]["retain"].update(n=29)), ["40 of forget, 29 of retain in", "has changed"]),
    "other examples": (ask_others, ["with other texts", "the data has changed"]),
    "no run": (lambda f: (f / "metrics.json").unlink(), ["expected a finished run, found no metrics.json"]),
    "other json": (lambda f: (f / "metrics.json").write_text("[]"), ["found one without an object"]),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_other_seed_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    made = [make_seed(tmp_path / f"r{seed}", seed) for seed in (0, 1, 2)]
    spoil, said = REFUSED[what]
    spoil(made[1])
    for order in ((0, 1, 2), (0, 2, 1)):
        before = [everything(folder) for folder in made]
        assert cli.main(["report", *(str(made[index]) for index in order)]) == 1
        error = capsys.readouterr().err
        for text in said:
            assert text in error
        assert str(made[1]) in error
        assert "Traceback" not in error
        assert [everything(folder) for folder in made] == before


@pytest.mark.parametrize("twice", [(0, 0), (0, 1, 1), (0, 1, 0)])
def test_the_same_folder_twice_is_refused(tmp_path: Path, twice: tuple[int, ...]) -> None:
    made = [make_seed(tmp_path / str(seed), seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match="expected runs with different seeds"):
        draw(made[0], [made[index] for index in twice[1:]])
    assert not (made[0] / "report.html").exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_seed(tmp_path / "run", 0)
    assert cli.main(["report", str(made), str(tmp_path / "nowhere")]) == 1
    assert f"found no metrics.json in {tmp_path / 'nowhere'}" in capsys.readouterr().err
    assert not (made / "report.md").exists()


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_what_changes_no_score_may_differ_and_a_missing_option_is_the_default(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    made = [make_seed(tmp_path / str(seed), seed) for seed in (0, 1, 2)]
    change(made[1], reference_cache=False, tofu_dir="elsewhere", probes=False, resume=True)
    new = ("reference_cache", "holdout", "forget_authors", "best_below", "loss_options", "guard", "probes", "tofu_dir")
    change(made[2], **dict.fromkeys(new, ...))
    first, *others = (made[index] for index in order)
    assert [run.config["seed"] for run in read_seeds(first, others).others] == sorted(order[1:])
    change(made[1], holdout="h.json", max_norm=..., lr=...)
    with pytest.raises(ValueError, match="other options than in") as caught:
        read_seeds(made[0], made[1:])
    assert '--holdout "h.json" (not null)' in str(caught.value)
    assert "--lr missing (not 5e-05)" in str(caught.value)  # its default depends on what the run was
    assert "--max-norm" not in str(caught.value)
    change(made[1], holdout=None, lr=5e-5, evaluation_batch_size=64)
    with pytest.raises(ValueError, match="--evaluation-batch-size 64"):
        read_seeds(made[0], made[1:])


def test_the_output_may_differ_and_a_missing_log_is_no_reason(tmp_path: Path) -> None:
    made = [make_seed(tmp_path / str(seed), seed, output=f"out{seed}") for seed in (0, 1, 2)]
    for folder in made[1:]:
        for name in ("evaluation.jsonl", "surgery.csv"):
            (folder / name).unlink()
    draw(made[0], made[1:])
    words = page_of(made[0]).words()
    assert "Over seeds" in words
    assert "is not in the folder" not in words  # nothing is missing of this run


# ---- the figure


def test_the_other_curves_are_thin_pale_and_behind(runs: list[Path]) -> None:
    run = read_seeds(runs[0], runs[1:])
    axes = Figure().subplots()
    figures._tradeoff(axes, run)
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 2]
    thin, own = [line for line in lines if line.get_alpha()], [line for line in lines if not line.get_alpha()]
    assert (len(thin), len(own)) == (4, 2)
    drawn = {(to_hex(line.get_color()), tuple(line.get_xdata()), tuple(line.get_ydata())) for line in thin}
    expected = {
        (figures.COLOURS[name], tuple(p["step"] for p in other.curve), tuple(p[name] for p in other.curve))
        for other in run.others
        for name in ("forget", "retain")
    }
    assert drawn == expected
    assert max(line.get_zorder() for line in thin) < min(line.get_zorder() for line in own)
    assert max(line.get_linewidth() for line in thin) < min(line.get_linewidth() for line in own)
    assert max(line.get_alpha() for line in thin) < 1.0
    names = {text.get_text(): text.xy[0] for text in axes.texts}
    assert names["forget"] == names["retain"] == 10.0  # where the longest curve ends: clear of them all
    assert "thin lines: other seeds" in axes.get_xlabel()


def test_the_thin_lines_are_explained(runs: list[Path]) -> None:
    said = "Thin lines: the same configuration with seeds 2 and 10."
    assert page_of(runs[0]).words().count(said) == 2  # the caption, and the title for who cannot see it
    assert said in (runs[0] / "report.md").read_text()


def test_a_run_without_a_curve_is_named(tmp_path: Path) -> None:
    made = [make_seed(tmp_path / str(seed), seed) for seed in (0, 1, 2)]

    def said() -> str | None:
        return curves(read_seeds(made[0], made[1:]))

    thin = "Thin lines: the same configuration with seed"
    assert said() == f"{thin}s 1 and 2."
    whole = (made[2] / "curve.csv").read_text()
    (made[1] / "curve.csv").unlink()
    assert said() == f"{thin} 2. The run with seed 1 left no curve.csv that can be read."
    (made[2] / "curve.csv").write_text("nonsense")
    assert said() == "The runs with seeds 1 and 2 left no curve.csv that can be read."
    draw(made[0], made[1:])
    assert said() in page_of(made[0]).words()
    assert "thin lines" not in page_of(made[0]).words()
    (made[0] / "curve.csv").unlink()
    (made[2] / "curve.csv").write_text(whole)
    draw(made[0], made[1:])
    assert said() is None
    assert "Over seeds" in page_of(made[0]).words()


# ---- how sure a standard deviation is


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_factors_hold_the_true_deviation_as_often_as_they_say(n: int) -> None:
    draws = np.random.default_rng(n).normal(5.0, 3.0, size=(40_000, n))
    deviations = np.array([mean_and_deviation(row)[1] for row in draws[:4000]])
    low, high = sd_factors(n, 0.9)
    covered = ((low * deviations <= 3.0) & (high * deviations >= 3.0)).mean()
    below = (high * deviations < 3.0).mean()
    # 4000 draws know a share of .9 to .005, one of .05 to .0035; four times that is never exceeded.
    assert covered == pytest.approx(0.9, abs=0.02)
    assert below == pytest.approx(0.05, abs=0.014)
    assert sd_factors(n)[0] < low < 1.0 < high < sd_factors(n)[1]


@pytest.mark.parametrize(("n", "confidence"), [(1, 0.95), (0, 0.95), (3, 0.0), (3, 1.0), (3, math.nan)])
def test_no_factors_of_nothing(n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="sd_factors: expected n >= 2"):
        sd_factors(n, confidence)
