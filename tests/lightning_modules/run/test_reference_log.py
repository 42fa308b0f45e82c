"""The reference's scores: computed once, found again exactly when nothing that determines them changed, or taken from a log."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers

import gradsurgery as gs
from lightning_modules import folder as outputs
from lightning_modules.data import chat
from lightning_modules.evaluation.evaluate import summary
from lightning_modules.run import reference_log
from lightning_modules.run.loading import read_splits
from lightning_modules.run.options import EvaluateOptions
from lightning_modules.run.reference_log import cache_path, matching, reference_rows, rows_of_log
from tests.gradsurgery.optimizer import distributed_workers
from tests.lightning_modules.data.chat_templates import LLAMA3
from tests.lightning_modules.evaluation import evaluation_workers

SPLITS: dict[str, Any] = evaluation_workers.SPLITS
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def options(folder: Path) -> EvaluateOptions:
    return EvaluateOptions.of(model="some/model", reference=str(folder), max_new_tokens=3, evaluation_batch_size=4)


def rows_like(splits: dict[str, Any], **more: Any) -> dict[str, list[dict[str, Any]]]:
    """What a log holds about these examples, each with two wrong answers."""
    wrong = {"paraphrase_nll": 1.0, "perturbed_nll": [2.0, 3.0]}
    return {
        split: [{"question": row["question"], "answer": row["answer"], "nll": 1.0, **wrong, **more} for row in entries]
        for split, entries in splits.items()
    }


def test_a_second_time_needs_no_model_and_gives_the_same_to_the_last_bit(
    options: EvaluateOptions, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = reference_rows(options, SPLITS)
    assert "scores from" not in capsys.readouterr().err
    (kept,) = cache.iterdir()
    monkeypatch.setattr(reference_log, "load_reference", lambda *_: pytest.fail("loaded"))
    assert repr(reference_rows(options, SPLITS)) == repr(first)
    assert f"Reference: scores from {kept}" in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        reference_rows(options.but(reference_cache=False), SPLITS)


def test_a_broken_log_in_the_cache_is_replaced_and_no_cache_is_no_failure(
    options: EvaluateOptions,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = reference_rows(options, SPLITS)
    (kept,) = cache.iterdir()
    whole = kept.read_text()
    for broken in ("{", "[]\n", "", whole[: whole.index("\n") + 1], '{"model": "reference"}\n'):
        kept.write_text(broken)
        assert reference_rows(options, SPLITS) == first
        assert kept.read_text() == whole
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert reference_rows(options, SPLITS) == first
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
    same = [name(), name(options.but(output="elsewhere", seed=3, model="another")), name(splits={**SPLITS})]
    assert set(same) == {first}
    other = json.loads(json.dumps(SPLITS))
    other["retain"][2]["perturbed_answer"][1] = "Somewhere."
    names = [
        first,
        name(splits=other),
        name(splits={**SPLITS, "world_facts": SPLITS["retain"]}),
        name(options.but(max_new_tokens=4)),
        name(options.but(max_length=99)),
        name(options.but(evaluation_batch_size=5)),
        name(options.but(evaluation_batch_tokens=99)),
        name(options.but(evaluation_precision="bf16-mixed")),
        name(options.but(evaluation_examples=2)),
    ]
    for module in (transformers, torch, gs):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", f"{module.__version__}.post1")
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
    options = EvaluateOptions.of(authors=5)
    splits = read_splits(options)
    more = [*splits["retain"], {"question": "One more?", "answer": "Yes."}]
    scored = options.but(evaluation_examples=10)
    names = {cache_path(changed, splits) for changed in (scored, scored.but(seed=1))}
    names.add(cache_path(scored, {**splits, "retain": more}))  # not scored, but learned
    assert len(names) == 3
    assert None not in names


def test_a_model_on_the_hub_is_known_by_its_commit_only(
    options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = options.but(reference="some/reference")
    commits: list[str | None] = ["a1", "a1", "b2", None]

    def config(_: str, **options: Any) -> Any:
        found = transformers.LlamaConfig()
        found._commit_hash = commits.pop(0)
        return found

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)

    def no_tokenizer(_: str, **options: Any) -> Any:
        raise OSError("not there")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", no_tokenizer)
    monkeypatch.setattr(transformers.utils, "find_adapter_config_file", lambda _: None)
    first, again, other, unknown = (cache_path(hub, SPLITS) for _ in range(4))
    assert first == again
    assert first != other
    assert None not in (first, other)
    assert unknown is None
    commits.append("a1")
    monkeypatch.setattr(transformers.utils, "find_adapter_config_file", lambda _: "adapter_config.json")
    assert cache_path(hub, SPLITS) is None

    def offline(_: str, **options: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    assert cache_path(hub, SPLITS) is None
    assert cache_path(options.but(reference=None), SPLITS) is None


def test_the_tokens_are_in_the_name_and_with_them_the_template_and_its_day(
    options: EvaluateOptions, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = LLAMA3.replace("<|eot_id|>", "<eos>")
    stamp = (folder / "tokenizer_config.json").stat().st_mtime_ns
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        os.utime(path, ns=(stamp, stamp))
    names = [cache_path(options, SPLITS)]
    names.append(cache_path(options.but(chat_template_kwargs={"date_string": "1 Jan 2025"}), SPLITS))
    monkeypatch.setattr(chat, "DATE", datetime.date(2025, 2, 3))
    names.append(cache_path(options, SPLITS))
    names.append(cache_path(options.but(chat_template_kwargs={"strftime_now": "2025-02-04"}), SPLITS))
    assert len({*names}) == 4
    assert None not in names
    assert names[2] == cache_path(options.but(chat_template_kwargs={"strftime_now": "2025-02-03"}), SPLITS)


def test_rows_that_repeat_a_question_and_answer_keep_their_own_scores() -> None:
    twice = {"question": "Who?", "answer": "Ada."}
    examples = {"forget": [{**twice, "perturbed_answer": wrong} for wrong in (["Bo."], ["Cy.", "Di."], ["Ed."])]}
    log = {"forget": [{**twice, "paraphrase_nll": 1.0, "perturbed_nll": nll} for nll in ([2.0], [3.0, 4.0], [5.0])]}
    assert matching(log, examples, "a.jsonl") == log
    with pytest.raises(ValueError, match="every example of forget, found 1 of 3 missing"):
        matching({"forget": log["forget"][:2]}, examples, "a.jsonl")


def test_logs_that_lack_scores_or_a_holdout_will_do(tmp_path: Path, options: EvaluateOptions) -> None:
    log = tmp_path / "evaluation.jsonl"
    rows = rows_like({split: SPLITS[split] for split in ("retain", "forget")})
    rows["forget"].reverse()
    outputs.write_evaluation(log, {"after": rows})
    found = reference_rows(options.but(reference=str(log)), SPLITS)
    assert found is not None
    assert list(found) == ["forget", "retain"]
    assert [row["question"] for row in found["forget"]] == [row["question"] for row in SPLITS["forget"]]
    assert summary(found["forget"])["exact_memorization"] is None
    assert summary(found["forget"])["nll"] == 1.0
    # and what it was called there is not what it is here
    outputs.write_evaluation(tmp_path / "again.jsonl", {"reference": found})
    assert {json.loads(line)["model"] for line in (tmp_path / "again.jsonl").read_text().splitlines()} == {"reference"}
    for split in ("forget", "retain", "holdout"):
        whole = rows_like(SPLITS)
        with pytest.raises(ValueError, match=f"every example of {split}, found 1 of"):
            matching({**whole, split: whole[split][1:]}, SPLITS, "a.jsonl")


def test_whose_scores_a_log_holds_is_said_and_those_of_an_unlearned_model_are_refused(
    tmp_path: Path, options: EvaluateOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "evaluation.jsonl"
    ours, theirs = rows_like(SPLITS), rows_like(SPLITS, nll=7.0)
    for models, name, nll in (
        ({"before": ours, "after": ours, "reference": theirs}, "reference", 7.0),
        ({"after": ours, "reference": theirs}, "reference", 7.0),
        ({"after": ours}, "after", 1.0),
    ):
        outputs.write_evaluation(log, models)
        found = rows_of_log(options.but(reference=str(log)).evaluation, SPLITS)
        assert found is not None
        assert found["retain"][0]["nll"] == nll
        assert capsys.readouterr().err == f"Reference: the rows of {name!r} in {log}\n"
    outputs.write_evaluation(log, {"before": ours, "after": ours})
    with pytest.raises(ValueError, match="without a reference: give the model that never saw it, or the log"):
        rows_of_log(options.but(reference=str(log)).evaluation, SPLITS)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("there", [None, [2.0], [2.0, 3.0, 4.0]])
@pytest.mark.parametrize("split", ["forget", "retain"])
def test_truth_ratios_over_other_wrong_answers_are_refused(split: str, there: list[float] | None) -> None:
    log = rows_like(SPLITS)
    assert matching(log, SPLITS, "a.jsonl") == log
    log[split][2]["perturbed_nll"] = there
    with pytest.raises(ValueError, match=f"a.jsonl to score the same 2 perturbed answers.*found {len(there or ())};"):
        matching(log, SPLITS, "a.jsonl")
    bare = json.loads(json.dumps(SPLITS))
    del bare[split][2]["perturbed_answer"]
    if there is None:
        assert matching(log, bare, "a.jsonl") == log
    else:
        with pytest.raises(ValueError, match="the same 0 perturbed answers"):
            matching(log, bare, "a.jsonl")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": None}, "without model"),
        ({"split": None}, "without split"),
        ({"question": None, "answer": None}, "without question, answer"),
        ({"question": ["a"]}, "without question"),
        ({"paraphrase_nll": None}, "without paraphrase_nll"),
        ({"perturbed_nll": 2.0}, "without perturbed_nll as a list"),
    ],
)
def test_a_log_that_lacks_something_says_where_and_what(
    change: dict[str, Any], said: str, tmp_path: Path, options: EvaluateOptions
) -> None:
    log = tmp_path / "evaluation.jsonl"
    outputs.write_evaluation(log, {"reference": rows_like(SPLITS)})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[3] = {name: value for name, value in (lines[3] | change).items() if value is not None}
    log.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(ValueError, match=rf"evaluation.jsonl, row 4: expected.*{said}.*it has .*nll.*gradsurgery"):
        rows_of_log(options.but(reference=str(log)).evaluation, SPLITS)


@pytest.mark.parametrize("content", [b"{", b"[1, 2]\n", b"", b"\xff\xfe\x00", b'{"nll": "much"}\n'])
def test_a_file_that_is_no_log_is_refused_in_a_sentence(
    content: bytes, tmp_path: Path, options: EvaluateOptions
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jsonl: expected"):
        rows_of_log(options.but(reference=str(tmp_path / "a.jsonl")).evaluation, SPLITS)


def test_a_model_is_looked_for_and_not_loaded(
    options: EvaluateOptions, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").unlink()
    assert rows_of_log(options.evaluation, SPLITS) is None
    assert rows_of_log(options.but(reference=None).evaluation, SPLITS) is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="is a folder without a loadable model"):
        rows_of_log(options.evaluation, SPLITS)
    with pytest.raises(FileNotFoundError, match="'no/where' is neither a folder nor a model on the hub"):
        rows_of_log(options.but(reference="no/where").evaluation, SPLITS)


def test_an_adapter_is_a_model_too(tmp_path: Path, options: EvaluateOptions, folder: Path) -> None:
    base, tokenizer = evaluation_workers.model_and_tokenizer()
    base.config._name_or_path = base.name_or_path = str(folder)
    adapter = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert rows_of_log(options.but(reference=str(tmp_path / "adapter")).evaluation, SPLITS) is None


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_every_process_loads_the_reference_once_the_first_ahead_and_an_error_reaches_both(tmp_path: Path) -> None:
    # Each process imports Transformers first: on a busy machine one may be seconds behind the other.
    distributed_workers.run(evaluation_workers.reference_is_loaded_once, str(tmp_path), patience=3)


def test_a_log_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    path.write_text("before")
    with pytest.raises(TypeError):
        outputs.write_evaluation(path, {"after": {"forget": [{"nll": 1.0}, {"nll": object()}]}})
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["evaluation.jsonl"]
