"""From a model to its scores, and from scores to metrics.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_modules.data.examples import Example
from lightning_modules.data.tasks import apart
from lightning_modules.evaluation import processes
from lightning_modules.evaluation.benchmarks import benchmark_scores
from lightning_modules.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate, summary, truth_ratios
from lightning_modules.evaluation.likelihood import autocasting, on_gpu
from lightning_modules.evaluation.membership import membership
from lightning_modules.evaluation.utility import model_utilities
from lightning_modules.folder import versions
from lightning_modules.metrics.functional import forget_quality
from lightning_modules.run.options import EvaluationOptions, Options
from lightning_modules.run.options.precision import EXACT
from lightning_modules.run.run import Run, Splits

ScoredSplits = dict[str, list[dict[str, Any]]]
"""Split -> scored examples, as in `Evaluation.examples`."""


def to_score(evaluation: EvaluationOptions, splits: Splits) -> dict[str, list[Example]]:
    """The examples that are scored: the first ones of every split."""
    return {split: list(rows[: evaluation.evaluation_examples]) for split, rows in splits.items()}


def score(run: Run[Options], model: nn.Module, *, across_processes: bool = False) -> Evaluation:
    """Score a model on the run's examples, on the GPU if there is one, in the precision that the options say.

    Args:
        run: Its tokenizer is the model's.
        model: It is left where it was.
        across_processes: Every process calls this, and they share the work, as in `evaluate`.
    """
    evaluation = run.options.evaluation
    settings = EvaluationSettings(
        evaluation.evaluation_batch_size,
        evaluation.max_new_tokens,
        run.options.data.max_length,
        batch_tokens=evaluation.evaluation_batch_tokens,
    )
    with on_gpu(model), autocasting(model, enabled=evaluation.autocast):
        return evaluate(
            model,
            run.tokenizer,
            to_score(evaluation, run.splits),
            settings,
            across_processes=across_processes,
            progress=processes.is_first(),
        )


def examples_by_model(
    before: Evaluation | None, after: Evaluation, reference: ScoredSplits | None
) -> dict[str, ScoredSplits | None]:
    """The scored examples of the three models, by the names that evaluation.jsonl and metrics.json give them."""
    return {"before": None if before is None else before.examples, "after": after.examples, "reference": reference}


def contents_of_metrics(
    seed: int,
    before: Evaluation | None,
    after: Evaluation,
    reference: ScoredSplits | None,
    seconds: Mapping[str, float],
    precision: str = EXACT,
) -> dict[str, Any]:
    """What metrics.json holds. All scores in it are computed from the examples that evaluation.jsonl holds.

    `membership` is None without a split called "holdout": an attack has to tell the forget set from examples that
    neither model has seen, and no other split has such examples. `model_utility` and its inputs are keys only where a
    model has all nine inputs (`evaluation.utility.model_utilities`), `benchmarks` only where there are tasks of one
    (`evaluation.benchmarks.benchmark_scores`), and `evaluation_precision` only where it is not 32-true.

    Args:
        seed: Of the run.
        before: The model before unlearning; None if a model is only evaluated.
        after: The model that is left.
        reference: Scores of a model that never saw the forget set, if there is one.
        seconds: What took how long.
        precision: In which the three were scored, by Lightning's name.
    """
    examples = examples_by_model(before, after, reference)
    return {
        "before": None if before is None else before.summary,
        "after": after.summary,
        "reference": None
        if reference is None
        else {split: summary(rows) for split, rows in apart(reference)[0].items()},
        "forget_quality": None if reference is None else _quality(after.examples, reference),
        "membership": membership(examples["before"], after.examples, reference),
        **model_utilities(examples),
        **benchmark_scores(examples),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seed": seed,
        "versions": versions(),
        **({} if precision == EXACT else {"evaluation_precision": precision}),
    }


def _quality(after: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any] | None:
    """Forget quality; None without truth ratios of both models."""
    ours, theirs = (truth_ratios(examples.get("forget", [])) for examples in (after, reference))
    if not ours or not theirs:
        return None
    # A diverged model has truth ratios of NaN, which have no rank. The other scores are written all the same.
    if any(map(math.isnan, (*ours, *theirs))):
        return {**dict.fromkeys(("statistic", "pvalue", "log10_pvalue"), math.nan), "n": len(ours)}
    return forget_quality(ours, theirs)._asdict()
