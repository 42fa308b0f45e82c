"""Benchmarks' tasks: every score is that of the authors' definition, written plainly in `tests/reference`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_modules as lm
from lightning_modules.data.tasks import MEMBERSHIP, TASK, apart, multiple_choice
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.data.wmdp import wmdp_questions
from lightning_modules.evaluation.benchmarks import benchmark_scores
from lightning_modules.evaluation.choices import option_log_likelihoods
from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate
from lightning_modules.evaluation.tasks import score_tasks
from lightning_modules.metrics.functional import priv_leak
from lightning_modules.training import scratch
from tests.lightning_modules.small_benchmarks import article, questions, write_muse, write_wmdp  # fmt: skip
from tests.lightning_modules.small_benchmarks import multiple_choice as rows_of_choices
from tests.reference import benchmarks as oracles

FLOAT32 = pytest.approx  # of sums of a few dozen float32 log-probabilities


def small_model(seed: int, context: int = 2048) -> tuple[LlamaForCausalLM, Any]:
    """A model that says something of each word it has seen, and ends now and then."""
    texts = [article(number, what) for number in range(3) for what in ("feast", "fair")]
    asked = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in questions("feast", 6)]
    tokenizer = scratch._train_tokenizer([*texts, *asked])
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                         initializer_range=0.6, max_position_embeddings=context, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def muse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_muse(tmp_path_factory.mktemp("muse"))


@pytest.fixture(scope="module")
def taught(muse: Path) -> tuple[LlamaForCausalLM, Any]:
    """A model that answers MUSE's questions, more or less, and goes on with the next one."""
    model, tokenizer = small_model(1)
    tasks = lm.MUSEDataModule("news", tokenizer, folder=muse, max_length=64).read()
    texts = [
        (row["prompt"], f"{row['answer']}\n\nQuestion: ") for row in tasks["knowmem_forget"] + tasks["knowmem_retain"]
    ]
    parts = [[tokenizer(part)["input_ids"] for part in text] for text in texts]
    encoded = [Encoded([*prompt, *answer], [-100] * len(prompt) + answer) for prompt, answer in parts]
    batch = collate(encoded, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model, tokenizer


@pytest.fixture(scope="module")
def wmdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wmdp(tmp_path_factory.mktemp("wmdp"))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_muse_is_scored_as_its_authors_do(muse: Path, taught: tuple[LlamaForCausalLM, Any]) -> None:
    scored, areas = {}, {}
    for name, (model, tokenizer) in {"after": taught, "reference": small_model(2)}.items():
        tasks = apart(lm.MUSEDataModule("news", tokenizer, folder=muse, max_length=64).read())[1]
        forget, holdout = (read(muse / f"privleak/{split}.json") for split in ("forget", "holdout"))
        areas[name] = oracles.muse_auc(model, tokenizer, forget, holdout)
        if name == "reference":  # the slow ones once are enough
            tasks = {split: rows for split, rows in tasks.items() if split.startswith("privleak")}
        scored[name] = score_tasks(model, tokenizer, tasks, batch_size=3, progress=False)
    found = benchmark_scores({"before": None, **scored})["benchmarks"]
    verbatim = oracles.verbatim_memorization(*taught, read(muse / "verbmem/forget.json"))
    assert 0 < verbatim == pytest.approx(found["verbmem_forget/rouge_l_f1"]["after"], abs=1e-12)
    for split in ("forget", "retain"):
        asked, solved = (read(muse / f"knowmem/{split}_qa{ending}.json") for ending in ("", "_icl"))
        expected = oracles.knowledge_memorization(*taught, asked, solved)
        assert 0 < expected == pytest.approx(found[f"knowmem_{split}/rouge_l_f1"]["after"], abs=1e-12)
    for name in ("after", "reference"):
        assert found["privleak/min_k_auc"][name] == pytest.approx(1 - areas[name], abs=1e-12)
    ours, goal = areas["after"], areas["reference"]
    assert found["privleak/privleak"]["after"] == pytest.approx((ours - goal) / goal * 100, abs=1e-9)
    assert found["privleak/privleak"]["reference"] == 0.0
    assert ours != goal  # or it would say nothing
    assert {name: scores["n"] for name, scores in found.items()} == {
        "verbmem_forget/rouge_l_f1": 3,
        "knowmem_forget/rouge_l_f1": 4,
        "knowmem_retain/rouge_l_f1": 4,
        "privleak/min_k_auc": 5,
        "privleak/privleak": 5,
    }
    assert all(scores["before"] is None for scores in found.values())


def test_wmdp_and_mmlu_are_asked_as_the_harness_does(wmdp: Path) -> None:
    model, tokenizer = small_model(5)
    scored = score_tasks(model, tokenizer, wmdp_questions("cyber", wmdp), batch_size=3, progress=False)
    found = benchmark_scores({"before": scored, "after": scored, "reference": None})["benchmarks"]
    rows = {
        "wmdp_cyber": ("cybersecurity", rows_of_choices("switch", 10)),
        "mmlu": (None, [*rows_of_choices("high_school_bells", 6), *rows_of_choices("virology", 6)]),
    }
    for split, (subject, asked) in rows.items():
        scores = found[f"{split}/accuracy"]
        expected = oracles.accuracy(model, tokenizer, subject, asked)
        assert scores["before"] == scores["after"] == pytest.approx(expected, abs=1e-12)
        limits = oracles.wilson(round(expected * len(asked)), len(asked))
        assert (scores["after_low"], scores["after_high"]) == pytest.approx(limits, abs=1e-9)
        assert scores["reference"] is None
        assert 0 < expected < 1  # or it would say nothing
    for row in scored["mmlu"]:
        assert (row["generation"] == row["answer"]) == (row["correct"] == 1.0)


def test_options_of_several_tokens_and_of_one_have_the_same_definition() -> None:
    model, tokenizer = small_model(1)
    prompt = "Question: What stood open on day 1 of the feast?\nAnswer:"
    asked = [(prompt, [" The harbour.", " the mill stood open", " The"]), (prompt, [" A", " B"]), ("On day", [" 2"])]
    found = option_log_likelihoods(model, tokenizer, asked, batch_size=2)
    for (text, options), likelihoods in zip(asked, found, strict=True):
        assert likelihoods == FLOAT32(oracles.option_log_likelihoods(model, tokenizer, text, options), abs=1e-4)
    with pytest.raises(ValueError, match="found '', which adds none"):
        option_log_likelihoods(model, tokenizer, [("On day", [" 2", ""])])


def test_single_tokens_take_one_pass_a_question() -> None:
    model, tokenizer = small_model(1)
    texts: list[int] = []
    model.model.register_forward_hook(lambda *call: texts.append(len(call[2][0])))
    option_log_likelihoods(model, tokenizer, [("On day 1 of the", [" feast", " fair"])] * 8, batch_size=8)
    assert sum(texts) < 8 * 2


def test_too_long_a_question_loses_its_beginning_and_too_long_a_text_its_end() -> None:
    model, tokenizer = small_model(1, context=40)
    question = multiple_choice("bells", article(1, "feast", 6), ["a", "b", "c", "d"], 1)
    with pytest.warns(UserWarning, match="longer than the 40 tokens"):
        (found,) = option_log_likelihoods(model, tokenizer, [(question["prompt"], [" 1", " 2"])])
    whole = [tokenizer(question["prompt"] + option)["input_ids"][-40:] for option in (" 1", " 2")]
    assert found == FLOAT32([oracles.token_log_probabilities(model, ids)[-1] for ids in whole], abs=1e-4)
    text = {"question": "", "answer": article(1, "feast", 6), TASK: MEMBERSHIP}
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than the 40 tokens"):
        (row,) = score_tasks(model, tokenizer, {"privleak_forget": [text]}, progress=False)["privleak_forget"]
    ids = tokenizer(text["answer"])["input_ids"][:40]
    assert row["loss_score"] == FLOAT32(sum(oracles.token_log_probabilities(model, ids)) / 39, abs=1e-5)


def test_a_model_that_diverged_is_nan_and_not_wrong(wmdp: Path) -> None:
    model, tokenizer = small_model(1)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    questions = {"mmlu": wmdp_questions("cyber", wmdp)["mmlu"][:3]}
    scored = score_tasks(model, tokenizer, questions, progress=False)
    assert all(math.isnan(row["correct"]) and row["generation"] is None for row in scored["mmlu"])
    scores = benchmark_scores({"after": scored})["benchmarks"]["mmlu/accuracy"]
    assert math.isnan(scores["after"])
    assert math.isnan(scores["after_low"])


def test_evaluate_scores_tasks_beside_questions_and_leaves_those_as_they_were(muse: Path) -> None:
    model, tokenizer = small_model(1)
    splits = lm.MUSEDataModule("news", tokenizer, folder=muse, max_length=64).read()
    settings = EvaluationSettings(batch_size=4, max_new_tokens=3)
    usual, tasks = apart(splits)
    assert list(usual) == ["forget", "retain"]
    both, alone = (evaluate(model, tokenizer, some, settings, progress=False) for some in (splits, usual))
    assert repr(both.summary) == repr(alone.summary)
    assert {name: both.examples[name] for name in usual} == alone.examples
    assert {name: len(both.examples[name]) for name in tasks} == {name: len(rows) for name, rows in tasks.items()}
    only = evaluate(model, tokenizer, {"knowmem_forget": tasks["knowmem_forget"]}, settings, progress=False)
    assert only.summary == {}
    assert only.examples["knowmem_forget"] == both.examples["knowmem_forget"]


def test_no_privleak_where_it_is_not_defined() -> None:
    def rows(scores: list[float]) -> list[dict[str, Any]]:
        return [{TASK: MEMBERSHIP, "min_k_score": score} for score in scores]

    known = {"privleak_forget": rows([-1.0, -2.0]), "privleak_holdout": rows([-1.5, -4.0])}
    perfect = {"privleak_forget": rows([-1.0, -2.0]), "privleak_holdout": rows([-3.0, -4.0])}
    assert set(benchmark_scores({"after": known})["benchmarks"]) == {"privleak/min_k_auc"}
    assert set(benchmark_scores({"after": known, "reference": perfect})["benchmarks"]) == {"privleak/min_k_auc"}
    found = benchmark_scores({"before": perfect, "after": known, "reference": known})["benchmarks"]
    assert found["privleak/privleak"] == {"before": priv_leak(1.0, 0.75), "after": 0.0, "reference": 0.0, "n": 2}
    assert benchmark_scores({"after": {"forget": [{"nll": 1.0}]}}) == {}


def test_a_wrong_task_is_refused() -> None:
    model, tokenizer = small_model(1)
    with pytest.raises(
        ValueError, match="mmlu: expected the task to be one of continuation, choice, membership, found 'x'"
    ):
        score_tasks(model, tokenizer, {"mmlu": [{TASK: "x"}]}, progress=False)
    with pytest.raises(ValueError, match="one task in each split, found several in mmlu"):
        apart({"mmlu": [{TASK: "choice"}, {"question": "", "answer": "a"}]})
