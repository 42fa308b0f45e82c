"""Held-out retention: examples to keep that the start model knows, that training never sees, and that are scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_modules import cli
from lightning_modules.data.examples import as_example
from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.data.heldout import RETAIN_HELDOUT, held_out, to_keep
from lightning_modules.data.tofu import ROWS_PER_AUTHOR, tofu_examples
from lightning_modules.run import first, loading
from lightning_modules.run.loading import make_data, read_splits
from lightning_modules.run.options import EvaluateOptions, UnlearnOptions
from tests.lightning_modules.run.bad_inputs import Row, changed, given, laid
from tests.lightning_modules.run.small_runs import small_run

TOFU = Path(__file__).parents[4] / "shared" / "tofu"
ALL = [as_example(row) for row in fictional_authors(6)]
KEPT = ALL[:80]
OTHERS = [{"question": f"Who wrote poem {number}?", "answer": f"Poet {number} did."} for number in range(3)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def test_they_are_scored_before_and_after_and_change_no_weight(tmp_path: Path) -> None:
    arguments = small_run(tmp_path)
    (tmp_path / "others.json").write_text(json.dumps(OTHERS))
    heldout = ["--retain-heldout", str(tmp_path / "others.json"), "--output", str(tmp_path / "with")]
    assert cli.main(arguments) == cli.main([*arguments, *heldout]) == 0
    alone, beside = weights(tmp_path / "run"), weights(tmp_path / "with")
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    without, found = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "with"))
    for model in ("before", "after"):
        assert found[model].pop(RETAIN_HELDOUT)["n"] == len(OTHERS)
        for split, scores in without[model].items():
            assert found[model][split] == pytest.approx(scores, rel=1e-5)  # other texts beside them in a batch
    report = (tmp_path / "with" / "report.md").read_text()
    assert f"the {len(OTHERS)} answers to keep that no step saw" in report
    assert "held-out retain probability, after minus before" in report
    assert "no step saw" not in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_all_authors_are_kept_in_their_order_so_that_the_start_model_is_the_same(count: int) -> None:
    options = {"authors": 6, "forget_authors": 2}
    whole, split = (read_splits(EvaluateOptions.of(**options, heldout_authors=number)) for number in (0, count))
    assert to_keep(split) == whole["retain"] == KEPT
    assert split["forget"] == whole["forget"]
    assert len(split.get(RETAIN_HELDOUT, ())) == 20 * count
    assert set(split) == {"forget", "retain", *([RETAIN_HELDOUT] if count else [])}


@pytest.mark.skipif(not TOFU.is_dir(), reason=f"the TOFU data is not in {TOFU}")
@pytest.mark.parametrize("authors", [None, 10])
def test_of_tofu_whole_authors_are_held_out(authors: int | None) -> None:
    whole, split = (tofu_examples("forget10", TOFU, authors, heldout_authors=number) for number in (0, 3))
    assert to_keep(split) == whole["retain"]
    assert len(split[RETAIN_HELDOUT]) == 3 * ROWS_PER_AUTHOR
    assert {name: rows for name, rows in split.items() if name not in ("retain", RETAIN_HELDOUT)} == {
        name: rows for name, rows in whole.items() if name != "retain"
    }


def test_the_small_model_and_its_reference_learn_them(monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[list[Any]] = []

    def learn(rows: Any, *_: Any, **__: Any) -> tuple[torch.nn.Module, Any]:
        taught.append(list(rows))
        return torch.nn.Module(), None

    monkeypatch.setattr(loading, "set_format", lambda *_: None)
    monkeypatch.setattr(loading, "scratch_model", learn)
    for count in (0, 2):
        options = EvaluateOptions.of(authors=6, forget_authors=2, heldout_authors=count)
        splits = read_splits(options)
        loading.load_model(options, splits)
        loading.load_reference(options, splits)
    assert taught[:2] == taught[2:] == [ALL, KEPT]


def test_what_is_taught_first_is_the_same_with_and_without(kitchen: Path) -> None:
    given = {"model": str(kitchen / "model"), "tofu": "forget10", "tofu_dir": str(TOFU), "finetune_first": True}
    if not TOFU.is_dir():
        pytest.skip(f"the TOFU data is not in {TOFU}")
    folders = []
    for count in (0, 1):
        options = UnlearnOptions.of(**given, authors=4, forget_authors=1, heldout_authors=count)
        splits = make_data(options, None).read()
        folders.append([getattr(first.lesson(options, splits, part), "folder", None) for part in first.SPLITS])
    assert folders[0] == folders[1]
    assert None not in folders[0]


@pytest.mark.parametrize("count", [-1, 4, 5])
def test_as_many_as_there_are_cannot_be_held_out(count: int) -> None:
    with pytest.raises(ValueError, match=rf"less than the 4 authors.*found {count}"):
        held_out(KEPT, count, 20)


def scratch(*options: str) -> Callable[[Path], list[str]]:
    return lambda _: ["unlearn", "--output", "out", *options]


HELD = json.dumps(OTHERS)
FAULTS = [
    Row("held-out authors below 0", scratch("--heldout-authors", "-1"), ("--heldout-authors >= 0, found -1",)),
    Row("all authors held out", scratch("--heldout-authors", "8"), ("--heldout-authors", "less than the 8", "found 8")),
    given("held-out authors of files", "--heldout-authors", "1", said=("--retain-heldout", "--heldout-authors 1")),
    Row("a held-out file alone", scratch("--retain-heldout", "a.json"), ("--forget and --retain with --retain-heldout",)),
    given("a held-out file that is missing", "--retain-heldout", "no.json", said=("no.json, found nothing",)),
    laid("an empty held-out file", {"a.json": "[]"}, changed(**{"retain-heldout": "a.json"}), "a.json"),
    given("held out and trained on", "--retain-heldout", "retain.json", said=("--retain-heldout", "6 of 6", "in retain")),
    given("held out and forgotten", "--retain-heldout", "forget.json", said=("--retain-heldout", "2 of 2", "in forget")),
    laid(
        "held out and no member",
        {"a.json": HELD, "b.json": HELD},
        changed(**{"retain-heldout": "a.json", "holdout": "b.json"}),
        "--holdout: expected examples that no model has seen, found 3 of 3 that are in retain_heldout too",
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: row.name)
def test_bad_input_is_refused_in_a_sentence(row: Row, refuse: Callable[[Row], None]) -> None:
    refuse(row)
