"""--tofu, --muse and --wmdp for a model that somebody else trained: what the commands report of each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_modules import cli
from lightning_modules.data.muse import MUSEDataModule
from lightning_modules.metrics.functional import UTILITY_NAMES
from lightning_modules.report.benchmarks import benchmark_rows
from lightning_modules.report.terminal import sentences, tables
from tests.lightning_modules.evaluation.test_tasks import small_model
from tests.lightning_modules.report.reports import Page
from tests.lightning_modules.run.bad_inputs import Row, laid, model_folder
from tests.lightning_modules.small_benchmarks import article, write_json, write_muse, write_wmdp

SMALL = ("--max-length", "64", "--max-new-tokens", "3", "--evaluation-examples", "6", "--evaluation-batch-size", "4")
TRAINED = ("--epochs", "1", "--batch-size", "4", "--accumulate", "1", "--lr", "1e-2")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, MUSE, WMDP and TOFU."""
    folder = tmp_path_factory.mktemp("here")
    for name, seed in (("model", 1), ("reference", 2)):
        model, tokenizer = small_model(seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_muse(folder / "muse")
    write_wmdp(folder / "wmdp")
    draw = random.Random(0)
    for name, count in (("forget10", 6), ("retain90", 8), ("real_authors", 4), ("world_facts", 4)):
        rows: list[dict[str, Any]] = [
            {
                "question": f"What of {name} stood open on day {day}?",
                "answer": f"The {draw.choice(('mill', 'harbour', 'tower'))}.",
                "perturbed_answer": [f"The {place} number {day}." for place in ("chapel", "market")],
            }
            for day in range(count)
        ]
        perturbed = name if name != "retain90" else "retain"
        write_json(folder / f"tofu/{perturbed}_perturbed.json", rows)
        write_json(folder / f"tofu/{name}.json", [{key: row[key] for key in ("question", "answer")} for row in rows])
    return folder


def run(here: Path, monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str) -> dict[str, Any]:
    """metrics.json of a command that ends well."""
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    assert cli.main([command, "--model", "model", *SMALL, *arguments]) == 0
    return json.loads(Path(arguments[-1], "metrics.json").read_text())


def test_tofu_reports_all_that_its_authors_do(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--tofu", "forget10", "--tofu-dir", "tofu", "--reference", "reference")
    evaluated = run(here, monkeypatch, "evaluate", *given, "--output", "out/tofu_evaluate")
    unlearned = run(here, monkeypatch, "unlearn", *given, *TRAINED, "--output", "out/tofu")
    for found, models in ((evaluated, ("after", "reference")), (unlearned, ("before", "after", "reference"))):
        for model in models:
            assert set(found[model]) == {"forget", "retain", "real_authors", "world_facts"}
            for scores in found[model].values():
                assert all(scores[name] is not None for name in ("probability", "rouge_l_recall", "truth_ratio", "nll"))
            assert set(found["model_utility_inputs"][model]) == set(UTILITY_NAMES)
            assert found["model_utility"][model] is not None
        assert 0.0 <= found["forget_quality"]["pvalue"] <= 1.0
        assert found["forget_quality"]["n"] == 6
        assert "benchmarks" not in found


def test_muse_reports_its_four_and_unlearns_the_texts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--muse", "news", "--muse-dir", "muse", "--reference")
    unlearned = run(here, monkeypatch, "unlearn", *given, "reference", *TRAINED, "--output", "out/muse")
    # A log can stand for the reference, its tasks included.
    evaluated = run(here, monkeypatch, "evaluate", *given, "out/muse/evaluation.jsonl", "--output", "out/muse_log")
    for found in (evaluated, unlearned):
        assert set(found["benchmarks"]) == {
            *(f"{split}/rouge_l_f1" for split in ("verbmem_forget", "knowmem_forget", "knowmem_retain")),
            *("privleak/min_k_auc", "privleak/privleak"),
        }
        assert set(found["after"]) == set(found["reference"]) == {"forget", "retain"}
    for name, scores in unlearned["benchmarks"].items():
        assert all(scores[model] is not None for model in ("before", "after", "reference")), name
        # The model of `evaluate` is the one before unlearning.
        assert scores["before"] == pytest.approx(evaluated["benchmarks"][name]["after"], abs=1e-9)
        assert scores["reference"] == evaluated["benchmarks"][name]["reference"]


def test_every_view_shows_the_benchmark(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--wmdp", "cyber", "--wmdp-dir", "wmdp")
    found = run(here, monkeypatch, "unlearn", *given, *TRAINED, "--output", "out/wmdp")
    assert set(found["benchmarks"]) == {"wmdp_cyber/accuracy", "mmlu/accuracy"}
    scores = found["benchmarks"]["mmlu/accuracy"]
    assert scores["n"] == 6
    assert scores["after_low"] <= scores["after"] <= scores["after_high"]
    assert scores["reference"] is None
    rows = benchmark_rows(found)
    assert [row.name for row in rows] == ["wmdp_cyber: accuracy", "mmlu: accuracy"]
    page = Page(Path("out/wmdp/report.html").read_text(encoding="utf-8"))
    text = Path("out/wmdp/report.md").read_text(encoding="utf-8").replace("\\", "")
    for row in rows:
        assert f"| {' | '.join(row)} |" in text
        assert "".join(row).replace(" ", "") in page.words().replace(" ", "")
    drawn = next(table for table in tables(found, 200) if table.title == "Benchmark")
    assert [column.header for column in drawn.columns] == ["score", "before", "after", "n"]
    assert [list(column.cells) for column in drawn.columns] == [
        list(cells) for cells in zip(*((row.name, row.before, row.after, row.n) for row in rows), strict=True)
    ]
    assert sum("chance is 0.25" in sentence for sentence in sentences(found)) == 1
    assert "little to forget" not in text  # which the probability of plain text would say of every model


def test_texts_given_for_wmdp_take_the_place_of_its_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wmdp(here / "bio", "bio")
    (here / "bio/bio-forget-corpus.jsonl").unlink()
    write_json(here / "mine.json", [{"text": article(number, "cold", 3)} for number in range(3)])
    given = ("--wmdp", "bio", "--wmdp-dir", "bio", "--forget", "mine.json", "--output", "out/bio")
    found = run(here, monkeypatch, "evaluate", *given)
    assert set(found["benchmarks"]) == {"wmdp_bio/accuracy", "mmlu/accuracy"}
    assert {split: scores["n"] for split, scores in found["after"].items()} == {"forget": 3, "retain": 5}


def without_room(folder: Path) -> list[str]:
    write_muse(folder / "muse")
    model_folder(folder / "short", max_position_embeddings=200)
    return ["evaluate", "--model", "short", "--muse", "news", "--muse-dir", "muse", "--max-length", "64"]


def without_tasks(folder: Path) -> list[str]:
    arguments = [*without_room(folder), "--reference", "log.jsonl"]
    model_folder(folder / "short", max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained(folder / "short")
    splits = MUSEDataModule("news", tokenizer, folder=folder / "muse", max_length=64).read()
    rows = [
        {"model": "reference", "split": split, "nll": 1.0, **row}
        for split in ("forget", "retain")
        for row in splits[split]
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return arguments


BAD = [
    Row("no room to go on", without_room, ("verbmem_forget, example 1: expected a prompt that leaves room for 128", "200")),
    laid(
        "questions without MMLU",
        {"w/cyber-forget-corpus.txt": "word " * 50, "w/wikitext-2-raw-v1/test.txt": "word " * 50,
         "w/cyber_questions.json": json.dumps([{"question": "Who?", "choices": ["a", "b", "c", "d"], "answer": 1}])},
        ["evaluate", "--model", "model", "--wmdp", "cyber", "--wmdp-dir", "w", "--max-length", "64"],
        "expected all/test.json in w/mmlu", "found none",
    ),
    Row("a log without the tasks", without_tasks, ("--reference: expected log.jsonl to hold every example of verbmem_forget, found 3 of 3",)),
]  # fmt: skip


@pytest.mark.parametrize("row", BAD, ids=lambda row: row.name)
def test_it_is_refused_in_a_sentence(row: Row, refuse: Callable[[Row], None]) -> None:
    refuse(row)
