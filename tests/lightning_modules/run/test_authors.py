"""--authors and --forget-authors choose the rows of every command, or one sentence refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.report.changed import changed_options
from lightning_modules.run.loading import read_splits
from lightning_modules.run.options import EvaluateOptions, UnlearnOptions
from lightning_modules.run.options.commands import Options
from lightning_modules.run.report import defaults
from tests.lightning_modules.ledger.requests import rows
from tests.lightning_modules.run.bad_inputs import changed, status

FILES = {"model": "m", "forget": "forget.json", "retain": "retain.json"}
TOFU = {"tofu": "forget01", "tofu_dir": "tofu"}
FEW = {"authors": 3, "forget_authors": 1}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tofu").mkdir()
    for name, found in {"forget01": rows(5, 40), "retain99": rows(6, 80), "real_authors_perturbed": rows(7, 2)}.items():
        (tmp_path / "tofu" / f"{name}.json").write_text("\n".join(map(json.dumps, found)))
    return tmp_path


def counts(options: Options) -> dict[str, int]:
    return {split: len(found) for split, found in read_splits(options).items()}


def test_a_model_that_was_taught_some_authors_forgets_and_is_evaluated_on_the_rows_that_it_learned(world: Path) -> None:
    taught = UnlearnOptions.of(model="m", finetune_first=True, **TOFU, **FEW)
    scored = EvaluateOptions.of(model="m", **TOFU, **FEW)
    scored.check()
    assert counts(scored) == counts(taught) == {"forget": 20, "retain": 40, "real_authors": 2}
    ready = UnlearnOptions.of(model="m", **TOFU, **FEW)
    ready.check()
    assert read_splits(scored) == read_splits(taught) == read_splits(ready)


def test_without_authors_a_ready_model_is_evaluated_on_all_of_them(world: Path) -> None:
    assert counts(EvaluateOptions.of(model="m", **TOFU)) == {"forget": 40, "retain": 80, "real_authors": 2}
    assert counts(UnlearnOptions.of(model="m", **TOFU)) == {"forget": 40, "retain": 80, "real_authors": 2}


def test_ten_authors_are_the_default_where_a_model_learns_them() -> None:
    assert counts(EvaluateOptions()) == {"forget": 40, "retain": 160}
    assert UnlearnOptions().resolved().data.authors == 10
    assert UnlearnOptions.of(model="m", finetune_first=True, **TOFU).resolved().data.authors == 10
    assert UnlearnOptions.of(model="m", **TOFU).resolved().data.authors is None


@pytest.mark.parametrize(
    "options",
    [
        UnlearnOptions.of(**FILES, authors=12),
        UnlearnOptions.of(**FILES, authors=12, finetune_first=True),
        UnlearnOptions.of(**FILES | {"model": "scratch"}, authors=12),
        UnlearnOptions.of(model="m", muse="news", authors=12),
        EvaluateOptions.of(**FILES, authors=12),
        EvaluateOptions.of(model="m", wmdp="cyber", authors=12),
    ],
)
def test_authors_without_effect_are_refused(options: Options) -> None:
    with pytest.raises(ValueError, match=r"^--authors: expected .* found .*; leave it out"):
        options.check()


def test_authors_to_forget_of_a_ready_model_need_to_know_of_how_many() -> None:
    with pytest.raises(ValueError, match=r"^--forget-authors: expected .* or --authors with --tofu"):
        EvaluateOptions.of(model="m", **TOFU, forget_authors=1).check()


def test_the_ten_authors_in_the_configuration_of_an_earlier_run_are_not_refused() -> None:
    for given in (FILES, FILES | {"finetune_first": True}):
        options = UnlearnOptions.of(**given, authors=10)
        options.check()
        assert options.resolved().data.authors == 10  # its checkpoints say so
        assert "--authors" not in changed_options(options.resolved().recorded(), defaults())


def test_ten_authors_that_are_typed_are_refused_as_any_other_number(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--authors", "10"], ["--authors=10"]):
        assert status([*changed(), *words]) == 1
        assert "--authors: expected" in capsys.readouterr().err


def test_what_a_report_calls_changed_is_what_was_given() -> None:
    def said(**options: Any) -> bool:
        return "--authors" in changed_options(UnlearnOptions.of(**options).resolved().recorded(), defaults())

    assert not said()
    assert not said(model="m", finetune_first=True, **TOFU)
    assert not said(**FILES)
    assert said(authors=12)
