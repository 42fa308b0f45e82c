"""A log is a reference where its scores can be compared: of the same wrong answers, in the same format, of the same length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_modules import folder as outputs
from lightning_modules.run.loading import check_start
from lightning_modules.run.options import EvaluateOptions
from lightning_modules.run.reference_log import reference_rows, rows_of_log
from lightning_modules.run.scoring import ScoredSplits
from tests.lightning_modules.evaluation import evaluation_workers

SPLITS: dict[str, Any] = evaluation_workers.SPLITS
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def options(folder: Path) -> EvaluateOptions:
    return EvaluateOptions.of(model=str(folder), reference=str(folder), max_new_tokens=3, reference_cache=False)


@pytest.fixture
def log(options: EvaluateOptions, tmp_path: Path) -> Path:
    """Scores as `evaluate --log` leaves them."""
    path = tmp_path / "evaluation.jsonl"
    outputs.write_evaluation(path, {"after": reference_rows(options, SPLITS)})
    return path


def taken(options: EvaluateOptions, log: Path, splits: dict[str, Any] = SPLITS) -> ScoredSplits | None:
    """What `evaluate` and `unlearn` take of the log before any work is done."""
    given = options.but(reference=str(log))
    return rows_of_log(given.evaluation, splits, given.data, given.loading, known=check_start(given, splits))


def with_other(name: str, value: Any) -> dict[str, Any]:
    splits = json.loads(json.dumps(SPLITS))
    splits["forget"][1][name] = value
    return splits


def test_a_log_of_the_same_scoring_is_taken(options: EvaluateOptions, log: Path) -> None:
    found = taken(options, log)
    assert found is not None
    assert {split: len(rows) for split, rows in found.items()} == {name: len(rows) for name, rows in SPLITS.items()}
    assert taken(options.but(evaluation_examples=2), log) is not None


@pytest.mark.parametrize(
    ("name", "value"), [("perturbed_answer", ["He never did.", "She often did."]), ("paraphrased_answer", "Otherwise.")]
)
def test_other_wrong_or_paraphrased_answers_are_refused(
    name: str, value: Any, options: EvaluateOptions, log: Path
) -> None:
    assert len(SPLITS["forget"][1]["perturbed_answer"]) == 2
    with pytest.raises(
        ValueError, match=r"^--reference: expected .* the same paraphrased and wrong answers, found others"
    ):
        taken(options, log, with_other(name, value))


@pytest.mark.parametrize(
    "change", [{"prompt_format": "tofu-llama2"}, {"prompt_format": "Ask: {question} Say: {answer}"}]
)
def test_another_format_is_refused(change: dict[str, Any], options: EvaluateOptions, log: Path) -> None:
    with pytest.raises(ValueError, match=r"^--reference: .* the same tokens, found others; .* --prompt-format"):
        taken(options.but(**change), log)


def test_generated_answers_of_another_length_are_refused_where_there_are_any(
    options: EvaluateOptions, log: Path
) -> None:
    longer = options.but(max_new_tokens=5)
    with pytest.raises(ValueError, match=r"at most 5 tokens of a generated answer, found 3; .* --max-new-tokens"):
        taken(longer, log)
    rows = [json.loads(line) | {"generation": None} for line in log.read_text().splitlines()]
    log.write_text("\n".join(map(json.dumps, rows)))
    assert taken(longer, log) is not None


def test_a_log_that_does_not_say_how_it_was_scored_is_taken(options: EvaluateOptions, log: Path) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        for name in ("answers_hash", "tokens_hash", "max_new_tokens"):
            del row[name]
    log.write_text("\n".join(map(json.dumps, rows)))
    assert taken(options.but(prompt_format="tofu-llama2", max_new_tokens=5), log) is not None


def test_a_reference_of_another_format_still_is_scored_in_the_format_given(
    options: EvaluateOptions, tmp_path: Path
) -> None:
    other = options.but(prompt_format="tofu-llama2")
    path = tmp_path / "other.jsonl"
    outputs.write_evaluation(path, {"after": reference_rows(other, SPLITS)})
    assert taken(other, path) is not None
