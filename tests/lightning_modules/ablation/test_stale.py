"""Stale retain data: training sees other answers than those that are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_modules.ablation.grid import Grid, Run
from lightning_modules.ablation.methods import Method
from lightning_modules.ablation.sections import Data, Targets, Train
from lightning_modules.ablation.stale import outdated, training_data
from lightning_modules.data.examples import Example
from lightning_modules.data.tokenization import encode_example
from lightning_modules.run.loading import make_data
from tests.lightning_modules.ablation.test_ablation import write_grid
from tests.lightning_modules.evaluation.evaluation_workers import model_and_tokenizer


def retained(count: int = 20) -> list[Example]:
    return [{"question": f"Where was author {place} born?", "answer": f"In town {place}."} for place in range(count)]


def run_of(folder: Path, share: float, method: Method | None = None) -> Run:
    write_grid(folder)
    data = Data(forget=str(folder / "forget.json"), retain=str(folder / "retain.json"), stale_share=share)
    method = Method("CE-U") if method is None else method
    grid = Grid((method,), Targets(forget_probability=(0.5,)), data=data, train=Train(batch_size=3))
    return Run(grid, method, data_seed=7, model_seed=0)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_of_the_answers_is_that_of_another_question(share: float) -> None:
    retain = retained()
    found = outdated(retain, share, seed=3)
    changed = [(old, new) for old, new in zip(retain, found, strict=True) if old != new]
    assert len(changed) == round(share * len(retain))
    for old, new in changed:
        assert new["question"] == old["question"]
        assert new["answer"] != old["answer"]
        assert new["answer"] in {row["answer"] for row in retain}


def test_the_seed_decides_which_answers_are_stale() -> None:
    retain = retained()
    assert outdated(retain, 0.5, seed=3) == outdated(retain, 0.5, seed=3)
    assert outdated(retain, 0.5, seed=3) != outdated(retain, 0.5, seed=4)


def test_training_sees_stale_answers_and_everything_else_of_the_grid(tmp_path: Path) -> None:
    run = run_of(tmp_path, 0.5, Method("inside", substitute_weight=1.0, keep_asked_words=True))
    _, tokenizer = model_and_tokenizer()
    data, right = training_data(run, tokenizer), make_data(run.options(), tokenizer)
    data.setup()
    right.setup()
    stale = outdated(right.splits["retain"], 0.5, seed=7)
    assert stale != right.splits["retain"]
    pairs: Any = data.dataset
    assert list(pairs.retain) == [encode_example(tokenizer, row, 512) for row in stale]
    assert list(pairs.forget) == list(right.dataset.forget)
    assert pairs.substitutes is not None
    assert (data.batch_size, data.seed, data.max_length) == (3, 7, 512)


def test_without_a_share_training_sees_the_retain_set(tmp_path: Path) -> None:
    run = run_of(tmp_path, 0.0)
    _, tokenizer = model_and_tokenizer()
    assert training_data(run, tokenizer).read() == make_data(run.options(), tokenizer).read()


def test_results_without_stale_answers_stay_valid(tmp_path: Path) -> None:
    assert "stale_share" not in run_of(tmp_path, 0.0).config["data"]
    assert run_of(tmp_path, 0.5).config["data"]["stale_share"] == 0.5


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="expected a stale_share between 0 and 1, found"):
        run_of(tmp_path, share).grid.check()
