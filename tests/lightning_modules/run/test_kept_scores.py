"""The scores of the model before unlearning: computed once for all runs that start from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_modules.run import kept_scores
from lightning_modules.run.kept_scores import scores_before, start_path
from lightning_modules.run.options import EvaluateOptions, UnlearnOptions
from lightning_modules.run.reference_log import cache_path, reference_rows
from lightning_modules.run.run import Run
from tests.lightning_modules.evaluation import evaluation_workers

SPLITS: dict[str, Any] = evaluation_workers.SPLITS
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def options(folder: Path) -> UnlearnOptions:
    return UnlearnOptions.of(model=str(folder), max_new_tokens=3, evaluation_batch_size=4)


def test_another_run_from_the_same_model_scores_nothing_and_has_the_same_to_the_last_bit(
    options: UnlearnOptions,
    folder: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = evaluation_workers.model_and_tokenizer()
    run = Run(options, folder, SPLITS, tokenizer)
    first = scores_before(run, model)
    (kept,) = cache.iterdir()
    capsys.readouterr()
    monkeypatch.setattr(kept_scores, "score", lambda *_: pytest.fail("scored"))
    other = Run(options.but(lr=1.0, seed=7, forget_loss="npo", output="elsewhere"), folder, SPLITS, tokenizer)
    assert repr(scores_before(other, model)) == repr(first)
    assert f"Before: scores from {kept}" in capsys.readouterr().err
    as_reference = EvaluateOptions.of(model="other", reference=str(folder), max_new_tokens=3, evaluation_batch_size=4)
    assert reference_rows(as_reference, SPLITS) == first.examples  # and it is a reference's too
    with pytest.raises(pytest.fail.Exception, match="scored"):
        scores_before(Run(options.but(reference_cache=False), folder, SPLITS, tokenizer), model)


def test_what_changes_the_model_or_how_it_is_scored_has_another_name_or_none(
    options: UnlearnOptions, folder: Path
) -> None:
    asked = EvaluateOptions.of(model="other", reference=str(folder), max_new_tokens=3, evaluation_batch_size=4)
    assert start_path(options, SPLITS) == cache_path(asked, SPLITS)
    small = options.but(model="scratch")
    names = [
        start_path(changed, SPLITS)
        for changed in (
            options,
            options.but(dtype="bfloat16"),
            options.but(lora_rank=4),
            options.but(lora_rank=4, lora_kind="dora"),
            options.but(max_new_tokens=4),
            options.but(evaluation_precision="bf16-mixed"),
            small,
            small.but(seed=1),
        )
    ]
    assert len({*names, cache_path(small, SPLITS)}) == len(names) + 1
    assert None not in names
    assert start_path(options.but(evaluation_precision="32-true"), SPLITS) == names[0]
    assert start_path(options.but(lora_rank=4, lora_init="fila"), SPLITS) is None
    (folder / "adapter_config.json").write_text("{}")  # names a base that may change
    assert start_path(options, SPLITS) is None
