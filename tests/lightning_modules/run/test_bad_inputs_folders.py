"""Bad folders and results: of runs to go on with, of references, of reports and of ablations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules import cli
from lightning_modules.run.options import UnlearnOptions
from tests.lightning_modules.run.bad_inputs import FILES, ROWS, Row, laid

PROOF = "code-was-executed"
CODE = f"!!python/object/apply:os.system ['touch {PROOF}']"
DEEP = "[" * 100000
GOOD = UnlearnOptions.of(model="model", forget="forget.json", retain="retain.json", output="out").resolved().recorded()
SAVED = ("out/config.yaml: expected the options of `gradsurgery unlearn`",)


def resumed(title: str, config: str | bytes | dict[str, Any], *said: str, extra: str = "") -> Row:
    """A run to go on with."""
    files = {"out/config.yaml": yaml.safe_dump(config) if isinstance(config, dict) else config}
    return laid(
        title, files | ({"out/metrics.json": extra} if extra else {}), ["unlearn", "--resume", "--output", "out"], *said
    )


RESUMED = [
    Row("no folder", lambda _: ["unlearn", "--resume", "--output", "out"], ("--resume: expected a run in out",)),
    laid("nothing in it", {"out/notes": ""}, ["unlearn", "--resume", "--output", "out"], "found no config.yaml"),
    resumed("finished", GOOD, "expected an interrupted run, found a finished one in out", extra="{}"),
    resumed("torn options", "lr: [1", "out/config.yaml: expected YAML with the options", "found something else"),
    resumed("no options", "", *SAVED, "found NoneType"),
    resumed("a list", "- 1", *SAVED, "found list"),
    resumed("another program's options", "foo: 1", *SAVED, "found 'foo', which is none"),
    resumed("a misspelt option", GOOD | {"ema_dacay": 1}, *SAVED, "did you mean ema_decay"),
    resumed("a word for a number", GOOD | {"lr": "abc"}, *SAVED, "lr", "abc"),
    resumed("a list for a number", GOOD | {"epochs": [1]}, *SAVED, "epochs"),
    resumed("a wrong name", GOOD | {"rule": "banana"}, "rule: expected one of", "found 'banana'"),
    resumed("a number outside its domain", GOOD | {"epochs": 0}, "expected --epochs >= 1, found 0"),
    resumed("code", f"lr: {CODE}", "expected YAML with the options", "python/object/apply:os.system"),
    resumed("binary options", b"\xff\xfe\0", "out/config.yaml", "found UTF-16: save it as UTF-8"),
]


def log(title: str, rows: list[Any] | str | bytes, *said: str) -> Row:
    """A log as reference."""
    text = rows if isinstance(rows, (str, bytes)) else "\n".join(map(json.dumps, rows))
    return laid(title, {"log.jsonl": text}, ["evaluate", *FILES, "--reference", "log.jsonl"], *said)


SCORED = [
    {"model": "reference", "split": "forget" if n < 2 else "retain", "nll": 1.0} | row for n, row in enumerate(ROWS)
]
LINES = ("log.jsonl: expected the lines of an evaluation.jsonl",)
REFERENCES = [
    log("other questions", [row | {"question": "Why?"} for row in SCORED], "--reference: expected log.jsonl to hold every"),
    log("a torn line", f"{json.dumps(SCORED[0])}\n{json.dumps(SCORED[1])[:-9]}", *LINES, "row 2 of it is no JSON"),
    log("nothing", "", "log.jsonl: expected rows of a model called reference or after, found []"),
    log("other columns", [{"a": 1}], "log.jsonl, row 1: expected a line", "without model, split, question, answer"),
    log("a table", "a,b\n1,2\n", *LINES, "row 1 of it is no JSON"),
    log("examples", json.dumps(ROWS), *LINES, "row 1 is a list and no object"),
    log("binary", b"\xff\xfe\0\1", *LINES, "utf-8"),
    log("10000 brackets", DEEP, *LINES, "row 1 of it is no JSON"),
    log("words for scores", [SCORED[0] | {"nll": "abc"}], *LINES, "'abc'"),
    log("lists for scores", [SCORED[0] | {"nll": [1]}], "row 1: expected a line", "without nll as a number"),
    log("half a truth ratio", [SCORED[0] | {"perturbed_nll": [1.0]}], "without paraphrase_nll"),
    log("only the model before", [SCORED[0] | {"model": "before"}], "called reference or after, found ['before']"),
    log("an unlearned model", [row | {"model": name} for row in SCORED for name in ("before", "after")],
        "expected the scores of a model that never saw the forget set"),
    laid("a folder without a model", {"e/x": ""}, ["evaluate", *FILES, "--reference", "e"], "'e' is a folder without"),
    Row("nothing to score", lambda _: ["evaluate", "--model", "model"], ("which answers is it to forget?",)),
    laid("scores in the folder", {"out/metrics.json": "{}"}, ["evaluate", *FILES], "expected a new or empty folder"),
]  # fmt: skip

SCORES = {"probability": 0.1, "rouge_l_recall": 0.1, "truth_ratio": 0.1, "nll": 1.0, "n": 2}
METRICS = {"before": None, "after": {"forget": SCORES}, "reference": None, "forget_quality": None, "membership": None}
METRICS |= {"seconds": {"train": 1.0}, "seed": 0, "versions": {"torch": "2"}}


def reported(title: str, metrics: Any, *said: str) -> Row:
    text = metrics if isinstance(metrics, (str, bytes)) else json.dumps(metrics)
    return laid(title, {"run/metrics.json": text}, ["report", "run"], *said)


def other(name: str, value: Any, *said: str) -> Row:
    return reported(f"{name} is {json.dumps(value)}", METRICS | {name: value}, "expected the metrics.json", *said)


JSON = ("run/metrics.json: expected JSON with the metrics.json of a run, found something else",)
REPORTS = [
    Row("no folder", lambda _: ["report", "no"], ("report: expected a finished run, found no metrics.json in no",)),
    Row("a file", lambda _: ["report", "forget.json"], ("found no metrics.json in forget.json",)),
    Row("no run", lambda _: ["report", "model"], ("found no metrics.json in model",)),
    Row("nothing given", lambda _: ["report"], ("folder",)),
    laid("a folder of scores", {"run/metrics.json/x": ""}, ["report", "run"], "found a folder there"),
    laid("no other", {"run/metrics.json": json.dumps(METRICS)}, ["report", "run", "no"], "found no metrics.json in no"),
    reported("torn", json.dumps(METRICS)[:-20], *JSON),
    reported("nothing", "", *JSON),
    reported("10000 brackets", DEEP, *JSON),
    reported("binary", b"\xff\xfe\0", "run/metrics.json", "UTF-16"),
    reported("a list", [], "expected the metrics.json of `gradsurgery unlearn`", "without an object"),
    reported("no keys", {}, "without after, before, forget_quality"),
    other("after", {}, "without scores of the model after"),
    other("after", 3, "with int as after"),
    other("after", {"forget": 3}, "with int as after, forget"),
    other("after", {"forget": {"nll": "abc"}}, "with 'abc' as after, forget, nll and no number"),
    other("after", {"forget": {"nll": []}}, "with [] as after, forget, nll and no number"),
    other("reference", [1], "with list as reference"),
    other("forget_quality", 3, "with int as forget_quality"),
    other("membership", {"loss": 3}, "with int as membership, loss"),
    other("seconds", 3, "with int as seconds"),
    other("versions", "2", "with str as versions", "make the run again"),
]


def grid(title: str, text: str | bytes, *said: str, **files: str) -> Row:
    laid_out = {"grid.yaml": text, **{f"out/{name}/a-m0-d0.json": content for name, content in files.items()}}
    return laid(title, laid_out, ["ablate", "--config", "grid.yaml", "--output", "out"], *said)


ROW, TARGETS = "methods: [{name: a}]\n", "targets: {forget_probability: [0.1]}\n"
FINE = ROW + TARGETS
KEYS = ("grid.yaml: expected methods, targets and any other of",)
GRIDS = [
    Row("no grid", lambda _: ["ablate"], ("expected --config FILE.yaml with the grid",)),
    Row("a grid that is missing", lambda _: ["ablate", "--config", "no.yaml"], ("expected a YAML file with a grid",)),
    grid("empty", "", *KEYS, "found NoneType"),
    grid("torn", "methods: [", "grid.yaml: expected YAML with a grid"),
    grid("binary", b"\xff\xfe\0", "grid.yaml is not UTF-8"),
    grid("brackets", "[" * 900, "grid.yaml: expected YAML with a grid"),
    grid("code", f"methods: {CODE}\n{TARGETS}", "grid.yaml: expected YAML with a grid", "python/object"),
    grid("an unknown key", FINE + "foo: 1", *KEYS, "'foo'"),
    grid("an unknown key of a section", FINE + "data: {foo: 1}", "grid.yaml, data: expected any of", "['foo']"),
    grid("an unknown key of a row", f"methods: [{{name: a, foo: 1}}]\n{TARGETS}", "row 1: expected any of", "'foo'"),
    grid("a section that is none", FINE + "train: 3", "grid.yaml, train: expected any of", "found 3"),
    grid("no rows", f"methods: []\n{TARGETS}", "methods: expected rows with names", "found []"),
    grid("a row without a name", f"methods: [{{}}]\n{TARGETS}", "methods, row 1"),
    grid("a name twice", f"methods: [{{name: a}}, {{name: A}}]\n{TARGETS}", "expected rows with names that differ"),
    grid("an unknown rule", f"methods: [{{name: a, rule: grue}}]\n{TARGETS}", "'a': rule: expected one of", "'grue'"),
    grid("NaN in a row", f"methods: [{{name: a, lr: .nan}}]\n{TARGETS}", "'a': --lr: expected a finite number"),
    grid("no targets", ROW + "targets: {}", "targets: expected at least one that is met on the way"),
    grid("a target above 1", ROW + "targets: {forget_probability: [2]}", "expected numbers between 0 and 1, found [2.0]"),
    grid("a target below 0", ROW + "targets: {forget_nll: [-1]}", "targets, forget_nll: expected numbers above 0"),
    grid("a word as target", ROW + "targets: {forget_nll: [banana]}", "grid.yaml, targets", "banana"),
    grid("a seed twice", FINE + "seeds: {data: [0, 0]}", "seeds, data: expected different whole numbers"),
    grid("a seed below 0", FINE + "seeds: {model: [-1]}", "seeds, model: expected different whole numbers"),
    grid("no seeds", FINE + "seeds: {data: []}", "seeds: expected at least one of data"),
    grid("a model of no size", FINE + "model: {hidden_size: 7}", "grid.yaml: model: expected positive sizes"),
    grid("a model that learns backwards", FINE + "model: {lr: -1}", "grid.yaml: model: expected lr > 0"),
    grid("a file that is missing", FINE + "data: {forget: no.json, retain: no.json}", "no.json, found nothing"),
    *(grid(f"a result of {text!r}", FINE, "a-m0-d0.json", said, runs=text)
      for text, said in {"": "expected JSON", "{": "expected JSON", "[]": "without config", "{}": "remove the file",
                         '{"config": 3, "status": "finished"}': "without its configuration"}.items()),
    laid("scores of nothing", {"grid.yaml": FINE, "out/models/m0.json": "{}"},
         ["ablate", "--config", "grid.yaml", "--output", "out"], "m0.json", "without config, start, reference"),
    laid("a file as output", {"grid.yaml": FINE}, ["ablate", "--config", "grid.yaml", "--output", "forget.json"],
         "--output: expected a folder that can be written"),
    *(laid(" ".join(words), {"grid.yaml": FINE}, ["ablate", "--config", "grid.yaml", *words], *said)
      for words, said in [(["--index", "1"], ("--index: expected a run between 0 and 0",)),
                          (["--only", "b"], ("--only: expected the id of a run, found 'b'",)),
                          (["--only", "a-m0-d0", "--index", "0"], ("expected --only or --index, found both",)),
                          (["--jobs", "0"], ("expected --jobs and --threads >= 1",)),
                          (["--jobs", "many"], ("jobs",))]),
]  # fmt: skip


@pytest.mark.parametrize("row", RESUMED, ids=lambda row: row.name)
def test_a_run_that_cannot_go_on_is_refused(row: Row, refuse: Callable[[Row], None]) -> None:
    refuse(row)
    assert not Path(PROOF).exists()


@pytest.mark.parametrize("row", REFERENCES, ids=lambda row: row.name)
def test_a_reference_that_is_none_is_refused(row: Row, refuse: Callable[[Row], None]) -> None:
    refuse(row)


@pytest.mark.parametrize("row", REPORTS, ids=lambda row: row.name)
def test_a_report_of_no_run_is_refused(row: Row, refuse: Callable[[Row], None]) -> None:
    refuse(row)


@pytest.mark.parametrize("row", GRIDS, ids=lambda row: row.name)
def test_a_grid_or_a_result_that_is_none_is_refused(row: Row, refuse: Callable[[Row], None]) -> None:
    refuse(row)
    assert not Path(PROOF).exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("g_effect.csv", b"abc\n"),
        ("g_effect.csv", b"\xff\xfe"),
        ("config.yaml", b"1: 2\n"),
        ("config.yaml", DEEP.encode()[:900]),
        ("training.json", b'{"best": 3}'),
        ("probes.json", b'{"relearn": 3}'),
        ("evaluation.jsonl", b'{"model": "after", "spl'),
        ("curve.csv", b"step,forget\n1,x\n"),
    ],
)
def test_a_report_names_what_it_cannot_read_and_says_the_rest(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / name).write_bytes(content)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert f"{name} cannot be read" in (tmp_path / "report.md").read_text().replace("\\", "")
