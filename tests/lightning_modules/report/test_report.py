"""The report: what it says of a run is what the run's files say, it trusts no text in them, and it needs nothing but itself."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from lightning_modules import cli
from lightning_modules import folder as outputs
from lightning_modules.evaluation import intervals
from lightning_modules.report import mean_interval
from lightning_modules.report.changed import changed_options
from lightning_modules.report.finished import read
from lightning_modules.report.samples import is_degenerate, samples
from lightning_modules.report.terminal import sentences
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.report import defaults, draw
from tests.lightning_modules.report.reports import Page, make, read_metrics

HOSTILE = "<script>alert(1)</script> </td></tr></table></p> \x1b[2J\x1b]0;owned\x07 & \"quotes\" | `code` ![x](http://example.com/x.png) <img src='//evil/x'> \x00\u202e\ud800"


def page_of(folder: Path) -> Page:
    draw(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make(tmp_path_factory.mktemp("report") / "run")
    draw(made)
    return made


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# ---- the page


def test_it_begins_with_what_happened_in_two_sentences(folder: Path, page: Page) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    forget, kept = metrics["after"]["forget"]["probability"], metrics["after"]["retain"]["probability"]
    start = metrics["before"]["retain"]["probability"]
    words = page.words()
    for text in (words, (folder / "report.md").read_text()):
        assert f"The mean probability of the 40 answers to forget fell from 0.990 to {forget:.3f}" in text
        assert f"keep fell from {start:.3f} to {kept:.3f}, {100 * kept / start:.0f} % of what it was." in text
    assert words.index("The mean probability") < words.index("What the model knows")


def test_every_number_of_the_table_is_that_of_metrics_json_with_an_interval(folder: Path, page: Page) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    for model in ("before", "after", "reference"):
        for split in ("forget", "retain"):
            for column in ("probability", "rouge_l_recall", "truth_ratio", "nll"):
                values = [row[column] for row in rows if (row["model"], row["split"]) == (model, split)]
                low, high, n = mean_interval(values)
                assert (low < metrics[model][split][column] < high, n) == (True, len(values))
                cell = f"{metrics[model][split][column]:.3f} [{low:.3f}, {high:.3f}]"
                assert cell in page.words()
                assert cell in (folder / "report.md").read_text()
    assert "p = 0.03 (log10 p = -1.5, n = 40)" in page.words()


def test_the_conflict_is_that_of_the_steps(page: Page) -> None:
    words = page.words()
    assert "conflicted in 7 of 10 steps (70 %), with a mean cosine of -0.275" in words
    assert (
        "0.25 times the forget gradient, of length 1, and 2 times the retain gradient, of length 1; clipping included"
        in words
    )
    assert "raised the retain loss to first order in 2 of 10 steps (20 %)" in words


def test_parts_of_the_update_are_means_over_the_steps_and_a_change_of_zero_raises_nothing(tmp_path: Path) -> None:
    made = make(tmp_path)
    with (made / "surgery.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for step, row in enumerate(rows, start=1):  # the larger the coefficient, the shorter the gradient
        row |= {"coefficient_retain": str(step), "norm_retain": str(11 - step)}
        row["actual_change_retain"] = "0.1" if step > 7 else "0.0"
    with (made / "surgery.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    words = page_of(made).words()
    size = sum(step * (11 - step) for step in range(1, 11)) / 10
    assert f"5.5 times the retain gradient, of length {size:.3g}; clipping included" in words
    assert "raised the retain loss to first order in 3 of 10 steps (30 %)" in words


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    made = make(tmp_path)
    lines = (made / "surgery.csv").read_text().splitlines()
    (made / "surgery.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines))
    words = page_of(made).words()
    assert "was not measured: --guard measure does" in words
    assert "Not measured. gradsurgery unlearn --probes" in words
    for said in (words, (made / "report.md").read_text().replace("`", "")):
        assert "gradsurgery report DIR OTHER_DIR ... shows the spread over runs with other seeds" in said
        assert "gradsurgery ablate --config GRID.yaml" in said


def test_what_was_run_is_there_first_what_is_not_the_default(page: Page) -> None:
    words = page.words()
    assert "Options that are not the default: --rule pcgrad To repeat it" in words
    assert "gradsurgery unlearn --config config.yaml --output ANOTHER_FOLDER" in words
    assert "Seed 7; 12.3 s to train, 5.0 s to evaluate; torch 2.13" in words
    assert "ema_decay: 0.2" in words
    assert words.index("--rule pcgrad") < words.index("ema_decay: 0.2")


@pytest.mark.parametrize("kind", [{}, {"model": "some/model", "tofu": "forget10"}, {"method": "uld"}])
def test_a_default_run_has_no_changed_options(kind: dict[str, Any]) -> None:
    resolved = UnlearnOptions.of(**kind).resolved()
    config = yaml.safe_load(yaml.safe_dump(resolved.recorded()))
    assert changed_options(config, defaults()) == {f"--{name}": value for name, value in kind.items()}
    config |= {"ema_decay": None, "dual": {"limit": 0.3}, "precision": "16-mixed", "output": "elsewhere", "added": 3}
    expected = {"--ema-decay": "null", "--dual": '{"limit": 0.3}', "--precision": "16-mixed", "--added": "3"}
    assert changed_options(config, defaults()) == {f"--{name}": value for name, value in kind.items()} | expected


def test_the_curves_show_every_series_and_can_be_read_aloud(page: Page) -> None:
    titles = re.findall(r"(?:Line|Bar) chart over [^.]*\.?[^.]*\.[^.]*\.", page.text)
    assert len(titles) == 3
    for text in (
        "retain",
        "forget",
        "never saw the forget set",
        "Conflict in 7 of 10 steps",
        "What the update is made of",
    ):
        assert text in page.text
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert len(drawn) == 3
    for attributes in drawn:
        assert attributes["role"] == "img"
        assert attributes["aria-labelledby"] in ids
        assert "width" not in attributes  # it takes the width there is


def test_every_colour_of_a_figure_is_one_of_the_page_in_light_and_in_dark(folder: Path, page: Page) -> None:
    source = (folder / "report.html").read_text()
    style = source.partition("<style>")[2].partition("</style>")[0]
    found: set[tuple[str, str]] = set()
    for _, attributes in page.tags:
        for entry in (attributes.get("style") or "").split(";"):
            what, _, value = entry.strip().partition(": ")
            if what in ("fill", "stroke") and value != "none":
                found.add((what, value))
    assert len(found) > 6
    for what, value in found:
        rule = re.search(rf'\[style\*="{what}: {value}"\] {{ {what}: var\(--(\w+)\) !important; }}', style)
        assert rule is not None, (what, value)
        light, dark = re.findall(rf"--{rule[1]}: (#\w+);", style)
        assert light == value
        assert dark != value


def test_the_page_has_its_language_headings_and_labels(page: Page) -> None:
    names = [tag for tag, _ in page.tags]
    assert ("html", {"lang": "en"}) in page.tags
    assert names.count("h1") == names.count("title") - 3 == names.count("main") == 1
    levels = [int(name[1]) for name in names if re.fullmatch(r"h\d", name)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for name in ("aria-labelledby",):
            assert attributes.get(name) is None or attributes[name] in ids
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert not page.open


# ---- what it may not do


def test_it_needs_no_network_no_script_and_no_other_file(folder: Path, page: Page) -> None:
    source = (folder / "report.html").read_text()
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert not {"script", "link", "iframe", "object", "embed", "base", "img", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster", "background"):
                assert value is not None
                assert value.startswith("#")
                assert value[1:] in ids
            for target in re.findall(r"url\(\s*['\"]?([^)'\"]*)", value or ""):
                assert target.startswith("#")
                assert target[1:] in ids
    assert "@import" not in source
    assert not re.search(r"url\(\s*['\"]?(?!#)", source)
    assert "http" not in source


def test_no_text_of_the_run_becomes_part_of_the_page(tmp_path: Path) -> None:
    made = make(tmp_path, lambda model, split, index: HOSTILE, versions={HOSTILE[:20]: HOSTILE}, seed=HOSTILE)
    lines = []
    for line in (made / "evaluation.jsonl").read_text().splitlines():
        row = json.loads(line)
        lines.append(json.dumps(row | {"question": HOSTILE + row["question"], "answer": HOSTILE}))
    (made / "evaluation.jsonl").write_text("\n".join(lines))
    config = yaml.safe_load((made / "config.yaml").read_text())
    (made / "config.yaml").write_text(yaml.safe_dump(config | {"model": HOSTILE[:-3], "<b>": "</style></title><b>"}))
    outputs.write_json(made / "training.json", {"collapse": {"reason": HOSTILE}})
    clean, found = page_of(make(tmp_path / "clean")), page_of(made)
    allowed = {tag for tag, _ in clean.tags}
    assert {tag for tag, _ in found.tags} <= allowed
    assert "<script>alert(1)</script>" in found.text
    assert "</style></title><b>" in found.text
    assert "\u2400" in found.text  # the control character can be seen
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]", found.text)  # nor would a terminal obey
    assert "\ufffd" in found.text  # half a surrogate pair, which UTF-8 cannot hold
    text = (made / "report.md").read_text()
    body = text.split("```yaml")[0]
    assert "<" not in body
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]", text)
    assert not re.search(r"(?<!\\)!\[(?!Forgetting)", body.replace("!\\[", ""))


def test_the_same_files_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "elsewhere")
    for _ in range(2):
        draw(other)
        for name in ("report.html", "report.md", "curves.png"):
            assert (other / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_long_run_is_a_small_page(tmp_path: Path) -> None:
    made = make(tmp_path)
    head, *rows = (made / "surgery.csv").read_text().splitlines()
    (made / "surgery.csv").write_text("\n".join([head, *rows * 1000]))
    words = page_of(made).words()
    assert "7000 of 10000 steps" in words
    assert "(means of 84)" in words
    assert (made / "report.html").stat().st_size < 200_000


# ---- generations


def test_generations_stand_side_by_side_whatever_they_say(tmp_path: Path) -> None:
    broken = "again " * 60
    made = make(tmp_path, lambda m, s, i: "" if i % 2 else broken if m == "after" else f"{m} {s} {i}")
    found, run = page_of(made), read(made)
    for split in ("forget", "retain"):
        chosen = samples(run, split)
        assert len(chosen) == 4
        for sample in chosen:
            assert sample.question in found.words()
            assert list(sample.said) == ["before", "after", "reference"]
            index = int(re.search(r"\d+", sample.question)[0])
            assert sample.said["before"] == ("" if index % 2 else f"before {split} {index}")
            assert sample.said["after"] == ("" if index % 2 else broken)
    chosen = [text for split in ("forget", "retain") for sample in samples(run, split) for text in sample.said.values()]
    assert found.text.count("(nothing)") == chosen.count("") > 0
    assert found.tags.count(("span", {"class": "tag"})) == chosen.count("") + chosen.count(broken)
    assert found.text.count("36 more words") == chosen.count(broken) > 0  # the others are shown at once
    assert found.words().count("again again") * 2 >= 59 * chosen.count(broken)  # and none is left out
    assert "forget: 20 of 40 before, 40 of 40 after, 20 of 40 reference" in found.words()
    assert (
        "40 of 40 answers to forget questions are degenerate (empty, or repeating themselves), 20 before"
        in found.words()
    )


def test_the_chosen_questions_are_spread_and_out_of_step_with_the_file(tmp_path: Path) -> None:
    run = read(make(tmp_path))
    for split, n in (("forget", 40), ("retain", 30)):
        for count in (1, 4, 7):
            chosen = [int(re.search(r"\d+", sample.question)[0]) for sample in samples(run, split, count)]
            assert chosen == sorted(set(chosen))
            assert len(chosen) == count
        gaps = np.diff([0, *chosen, n])
        assert gaps.max() <= 2.5 * n / count
        assert len({index % 10 for index in chosen}) > 3  # equal distances would meet one kind of question only
    assert len(samples(run, "retain", 100)) == 30
    assert samples(run, "other") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        (" \n", True),
        ("1949 1949 1949 1949 1949 1949", True),
        ("Hana Hana", False),
        ("a b c a b c a b c", True),
        ("She was born in Garinport on 11 May 1949.", False),
        ("a b c d e f a b c d e f", False),  # six of ten are different
        ("AnnaCarlCarlCarlCarlCarlCarl", True),  # tokens without a space between them
        ("." * 60, True),
        ("东京" * 10, True),
        ("Carl Dahl was born in Lund Lund Lund Lund Lund Lund", True),
        ("In Ros .......", False),  # few signs
        ("She was born in a small town, and the others too: Lund Lund Lund Lund Lund", False),  # less than half
        ("abcd abcd abcd efgh", False),  # it follows itself but twice
    ],
)
def test_what_degenerate_means(text: str, expected: bool) -> None:
    assert is_degenerate(text) is expected


# ---- what else a run may say


def test_an_earlier_request_above_its_limit_is_named(tmp_path: Path) -> None:
    target = {"forget_probability": 0.05, "found": 0.04, "reached": False, "steps": 9, "stopped_early": False}
    made = make(tmp_path, target=target | {"above": ["an earlier author"]})
    assert "what the ledger holds to a limit did not: an earlier author" in page_of(made).words()


def test_a_collapse_a_kept_step_and_probes_are_told(tmp_path: Path) -> None:
    made = make(tmp_path)
    best = {"step": 8, "forget": 0.2, "retain": 0.84, "target": 0.3, "last_step": 10, "restored": True}
    outputs.write_json(made / "training.json", {"collapse": {"reason": "retain 0.01 at step 9"}, "best": best})
    points = [{"step": s, "taught": 0.1 + s / 10, "rest": 0.1 + s / 20, "retain": 0.9} for s in (0, 4, 8)]
    still = [point | {"rest": 0.1} for point in points]
    model = {"steps": 8, "lr": 1e-5, "batch_size": 8, "taught": 10, "rest": 30}
    relearn = {"model": model | {"points": points}, "control": model | {"points": still}}
    rounded = [{"bits": bits, "forget": f, "retain": 0.9} for bits, f in ((None, 0.111), (8, 0.222), (4, 0.333))]
    outputs.write_json(made / "probes.json", {"relearn": relearn, "quantization": {"points": rounded}})
    found = page_of(made)
    words, text = found.words(), (made / "report.md").read_text()
    for said in (words, text):
        assert "The collapse alarm stopped the run: retain 0.01 at step 9." in said
        assert "step 8 of 10, the best trade-off" in said
        assert "brought the 30 others from 0.100 to 0.500 (reference: 0.100)" in said
        assert "0.222" in said
        assert "0.333" in said
        assert "mean probability of the examples scored while training; every linear layer but the head" in said
    assert "kept" in found.text
    assert len([tag for tag, _ in found.tags if tag == "svg"]) == 4
    outputs.write_json(made / "probes.json", {"relearn": {"model": relearn["control"], "control": None}})
    words = page_of(made).words()
    assert "shallow" not in words
    assert "stayed at 0.100. There is no reference with the same tokenizer" in words
    assert "was attacked in the same way" in (said := (made / "report.md").read_text()) + text
    assert "was attacked in the same way" not in words + said


def test_a_beginning_of_the_answer_is_no_leak_as_long_as_no_reference_says_what_it_gives_away(tmp_path: Path) -> None:
    """Half of an answer and other answers help a model that never saw it too; other words for the question do not."""
    ways = {
        "question": (0.10, 0.30),
        "prefix_50": (0.40, 0.60),
        "few_shot": (0.40, 0.60),
        "paraphrase": (0.40, 0.60),
    }

    def found(shift: float) -> dict[str, Any]:
        return {
            way: {"probability": p - shift, "rouge_l_recall": r - shift, "n": 5}
            | dict.fromkeys(("probability_interval", "rouge_interval"))
            for way, (p, r) in ways.items()
        }

    made = make(tmp_path)
    for control, leaking in ((None, ["other words"]), (0.0, []), (0.2, ["50 %", "other questions", "other words"])):
        never = None if control is None else {"attacks": found(control)}
        outputs.write_json(made / "probes.json", {"prompts": {"model": {"attacks": found(0.0)}, "control": never}})
        words = page_of(made).words()
        leaks = [part.partition(":")[0] for part in words.split("The answers leak when ")[1:]]
        assert [any(name in leak for leak in leaks) for name in ("50 %", "other questions", "other words")] == [
            name in leaking for name in ("50 %", "other questions", "other words")
        ]


def test_nan_scores_are_shown_and_warned_of(tmp_path: Path) -> None:
    made = make(tmp_path)
    metrics = json.loads((made / "metrics.json").read_text())
    metrics["after"]["retain"] |= {"probability": "NaN", "nll": "NaN"}
    (made / "metrics.json").write_text(json.dumps(metrics))
    rows = [json.loads(line) for line in (made / "evaluation.jsonl").read_text().splitlines()]
    for row in rows:
        if (row["model"], row["split"]) == ("after", "retain"):
            row |= {"probability": "NaN", "nll": "NaN"}
    (made / "evaluation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = page_of(made).words()
    assert "Some scores are NaN, not a number: after retain. The model diverged." in words
    assert "went from 0.990 to NaN." in words
    assert "NaN [NaN, NaN]" in words
    assert "cannot be read" not in words


def test_an_evaluated_model_without_a_before_has_a_report(tmp_path: Path) -> None:
    made = make(tmp_path, before=None, reference=None, forget_quality=None)
    for name in ("surgery.csv", "curve.csv", "config.yaml", "evaluation.jsonl"):
        (made / name).unlink()
    words = page_of(made).words()
    assert "The mean probability of the 40 answers to forget is 0." in words
    assert not (made / "curves.png").exists()


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("surgery.csv", "the conflict of the gradients"),
        ("curve.csv", "forgetting and retention over the steps"),
        ("evaluation.jsonl", "generations and confidence intervals"),
        ("config.yaml", "what was run"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "empty", "damaged", "cut"])
def test_a_file_that_is_not_there_or_not_whole_is_named_and_not_fatal(
    tmp_path: Path, name: str, lacks: str, how: str
) -> None:
    made = make(tmp_path)
    whole = (made / name).read_text()
    if how == "missing":
        (made / name).unlink()
    else:
        damaged = {"empty": "", "damaged": "{\x00]: step,\n1,2\n", "cut": whole[: len(whole) // 2 - 3]}
        (made / name).write_text(damaged[how])
    page = page_of(made)
    if (how, name) == ("cut", "config.yaml") or (how == "empty" and name == "evaluation.jsonl"):
        return  # half of a YAML file can be a YAML file, and no example is an empty log
    for text in (page.words(), (made / "report.md").read_text().replace("\\", "")):
        assert f"{name} {'is not in the folder' if how == 'missing' else 'cannot be read'}" in text
        assert f"lacks {lacks}." in text


def test_other_examples_than_the_means_are_of_are_noticed(tmp_path: Path, page: Page) -> None:
    assert "disagree" not in page.words()
    made = make(tmp_path)
    rows = (made / "evaluation.jsonl").read_text().splitlines()
    (made / "evaluation.jsonl").write_text("\n".join(rows[1:]))
    assert "disagree about forget of the model before" in page_of(made).words()


def test_a_folder_without_a_run_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, said in (
        (None, "expected a finished run"),
        ("{", "expected JSON"),
        ('{"after": 1}', "one without before"),
    ):
        if content is not None:
            (tmp_path / "metrics.json").write_text(content)
        assert cli.main(["report", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
        assert not (tmp_path / "report.html").exists()


# ---- intervals


@pytest.mark.parametrize("n", [2, 7, 40, 400])
@pytest.mark.parametrize("confidence", [0.95, 0.6])
def test_the_interval_is_scipys(n: int, confidence: float) -> None:
    values = np.random.default_rng(n).gamma(0.5, size=n)
    found = mean_interval(values.tolist(), confidence=confidence, resamples=20_000)
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=20_000,
        confidence_level=confidence,
        rng=np.random.default_rng(1),
    )
    spread = values.std() / math.sqrt(n)
    # Both are drawn: a 2.5 % quantile of 20,000 draws is known to sqrt(p (1 - p) / 20000) / density, 0.02 spreads; of two values it is exact.
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.08 * spread)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.08 * spread)
    assert found.n == n


def test_many_examples_give_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    found = mean_interval(values.tolist())
    expected = stats.norm.interval(0.95, values.mean(), values.std() / math.sqrt(2000))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.1 * values.std() / math.sqrt(2000))


def test_it_covers_the_true_mean_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        found = mean_interval(draws.uniform(size=40).tolist(), resamples=500)
        covered += found.low <= 0.5 <= found.high
    assert 270 <= covered <= 296  # 95 % of 300 is 285; 40 examples cost a percentile interval one or two per cent


def test_intervals_of_little_and_of_nan() -> None:
    assert mean_interval([]) is None
    assert mean_interval([1.0]) is None
    assert mean_interval([0.5] * 9)[:2] == (0.5, 0.5)
    for wrong in (math.nan, math.inf):
        found = mean_interval([1.0, wrong, 2.0])
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    assert mean_interval([1.0, 2.0, 4.0]) == mean_interval([1.0, 2.0, 4.0])
    for wrong in ({"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match="mean_interval"):
            mean_interval([1.0, 2.0], **wrong)


def test_an_interval_does_not_depend_on_how_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50).tolist()
    whole = intervals.mean_interval(values)
    monkeypatch.setattr(intervals, "_AT_ONCE", 7 * len(values))  # 5000 is no multiple of 7
    assert intervals.mean_interval(values) == whole


def test_a_mean_over_fewer_answers_than_n_says_so(tmp_path: Path) -> None:
    made = make(tmp_path)
    metrics = read_metrics(made)
    metrics["after"]["forget"] |= {"n": 4, "n_truth_ratio": 1, "n_rouge_l_recall": 3}
    outputs.write_json(made / "metrics.json", metrics)
    draw(made)
    said = (
        "Some means are over fewer answers than n: ROUGE-L recall over 3 of 4 forget answers, those with a word; "
        "truth ratio over 1 of 4 forget answers, those with wrong answers."
    )
    assert said in sentences(metrics)
    assert said in (made / "report.md").read_text()
    assert said in Page((made / "report.html").read_text()).words()
