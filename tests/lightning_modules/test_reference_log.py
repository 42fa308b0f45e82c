"""The reference's scores: computed once, found again exactly when nothing that determines them changed, or taken from a log."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from lightning_modules import outputs, reference_log
from lightning_modules.evaluation import Evaluation, summary
from lightning_modules.loading import read_splits
from lightning_modules.options import EvaluateOptions
from lightning_modules.reference_log import cache_path, matching, reference_rows
from tests.lightning_modules import evaluation_workers

SPLITS: dict[str, Any] = evaluation_workers.SPLITS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gradsurgery" / "reference"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, tokenizer = evaluation_workers.model_and_tokenizer()
    model.save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    return tmp_path / "reference"


@pytest.fixture
def options(folder: Path) -> EvaluateOptions:
    return EvaluateOptions(model="some/model", reference=str(folder), max_new_tokens=3, evaluation_batch_size=4)


def rows_like(splits: dict[str, Any], **more: Any) -> Evaluation:
    rows = {
        split: [{"question": row["question"], "answer": row["answer"], "nll": 1.0, **more} for row in entries]
        for split, entries in splits.items()
    }
    return Evaluation({}, rows)


def test_a_second_time_needs_no_model_and_gives_the_same_to_the_last_bit(
    options: EvaluateOptions, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    after = rows_like(SPLITS)
    first = reference_rows(options, SPLITS, after)
    assert "scores from" not in capsys.readouterr().err
    (kept,) = cache.iterdir()
    monkeypatch.setattr(reference_log, "load_reference", lambda *_: pytest.fail("loaded"))
    assert repr(reference_rows(options, SPLITS, after)) == repr(first)
    assert f"Reference: scores from {kept}" in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        reference_rows(replace(options, reference_cache=False), SPLITS, after)


def test_a_broken_log_in_the_cache_is_replaced_and_no_cache_is_no_failure(
    options: EvaluateOptions,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    after = rows_like(SPLITS)
    first = reference_rows(options, SPLITS, after)
    (kept,) = cache.iterdir()
    whole = kept.read_text()
    for broken in ("{", "[]\n", "", whole[: whole.index("\n") + 1], '{"model": "reference"}\n'):
        kept.write_text(broken)
        assert reference_rows(options, SPLITS, after) == first
        assert kept.read_text() == whole
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert reference_rows(options, SPLITS, after) == first
    assert "could not be cached" in capsys.readouterr().err
    assert [path.name for path in cache.iterdir()] == [kept.name]


def test_everything_that_determines_the_scores_is_in_the_name_and_nothing_else(
    options: EvaluateOptions, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(changed: Any = options, splits: Any = SPLITS) -> Path:
        found = cache_path(changed, splits)
        assert found is not None
        return found

    first = name()
    same = [name(), name(replace(options, output="elsewhere", seed=3, model="another")), name(splits={**SPLITS})]
    assert set(same) == {first}
    other = json.loads(json.dumps(SPLITS))
    other["retain"][2]["perturbed_answer"][1] = "Somewhere."
    names = [
        first,
        name(splits=other),
        name(splits={**SPLITS, "world_facts": SPLITS["retain"]}),
        name(replace(options, max_new_tokens=4)),
        name(replace(options, max_length=99)),
        name(replace(options, evaluation_batch_size=5)),
        name(replace(options, evaluation_examples=2)),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "__version__", "99.1.0")
        names.append(name())
    stamp = (folder / "config.json").stat().st_mtime_ns + 1_000_000_000
    os.utime(folder / "config.json", ns=(stamp, stamp))
    names.append(name())
    (folder / "more.txt").write_text("")
    names.append(name())
    assert len(set(names)) == len(names)
    (folder / "adapter_config.json").write_text("{}")  # names a base that may change
    assert cache_path(options, SPLITS) is None


def test_the_reference_of_the_model_from_scratch_is_known_by_what_it_is_trained_on() -> None:
    options = EvaluateOptions(authors=5)
    splits = read_splits(options)
    more = [*splits["retain"], {"question": "One more?", "answer": "Yes."}]
    scored = replace(options, evaluation_examples=10)
    names = {cache_path(changed, splits) for changed in (scored, replace(scored, seed=1))}
    names.add(cache_path(scored, {**splits, "retain": more}))  # not scored, but learned
    assert len(names) == 3
    assert None not in names


def test_a_model_on_the_hub_is_known_by_its_commit_only(
    options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = replace(options, reference="some/reference")
    commits: list[str | None] = ["a1", "a1", "b2", None]

    def config(_: str) -> Any:
        found = transformers.LlamaConfig()
        found._commit_hash = commits.pop(0)
        return found

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)
    monkeypatch.setattr(transformers.utils, "find_adapter_config_file", lambda _: None)
    first, again, other, unknown = (cache_path(hub, SPLITS) for _ in range(4))
    assert first == again
    assert first != other
    assert None not in (first, other)
    assert unknown is None
    commits.append("a1")
    monkeypatch.setattr(transformers.utils, "find_adapter_config_file", lambda _: "adapter_config.json")
    assert cache_path(hub, SPLITS) is None

    def offline(_: str) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    assert cache_path(hub, SPLITS) is None
    assert cache_path(replace(options, reference=None), SPLITS) is None


def test_logs_of_earlier_versions_and_without_a_holdout_will_do(tmp_path: Path, options: EvaluateOptions) -> None:
    after = rows_like(SPLITS, exact_memorization=1.0)
    log = tmp_path / "evaluation.jsonl"
    rows = rows_like({split: SPLITS[split] for split in ("retain", "forget")}).examples
    rows["forget"].reverse()
    outputs.write_evaluation(log, {"before": {"forget": [{"question": "", "answer": ""}]}, "after": rows})
    found = reference_rows(replace(options, reference=str(log)), SPLITS, after)
    assert found is not None
    assert list(found) == ["forget", "retain"]
    assert [row["question"] for row in found["forget"]] == [row["question"] for row in SPLITS["forget"]]
    assert summary(found["forget"])["exact_memorization"] is None
    assert summary(found["forget"])["nll"] == 1.0
    # and what it was called there is not what it is here
    outputs.write_evaluation(tmp_path / "again.jsonl", {"reference": found})
    assert {json.loads(line)["model"] for line in (tmp_path / "again.jsonl").read_text().splitlines()} == {"reference"}
    for split in ("forget", "retain", "holdout"):
        lacking = {**after.examples, split: after.examples[split][1:]}
        with pytest.raises(ValueError, match=f"every example of {split}, found 1 of"):
            matching(lacking, after, "a.jsonl")


def test_a_log_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    path.write_text("before")
    with pytest.raises(TypeError):
        outputs.write_evaluation(path, {"after": {"forget": [{"nll": 1.0}, {"nll": object()}]}})
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["evaluation.jsonl"]
