"""From options and a model to the numbers of metrics.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_modules import folder as outputs
from lightning_modules.data.examples import Example
from lightning_modules.evaluation import processes
from lightning_modules.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate, summary, truth_ratios
from lightning_modules.evaluation.likelihood import device_of
from lightning_modules.evaluation.membership import membership
from lightning_modules.evaluation.utility import model_utilities
from lightning_modules.metrics.functional import forget_quality
from lightning_modules.run.options import DataOptions

Rows = dict[str, list[dict[str, Any]]]
"""Split -> scored examples, as in `Evaluation.examples`."""


def scored(options: DataOptions, splits: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    """The examples that are scored: the first ones of every split."""
    return {split: list(rows[: options.evaluation_examples]) for split, rows in splits.items()}


def score(
    options: DataOptions,
    splits: Mapping[str, Sequence[Example]],
    model: nn.Module,
    tokenizer: Any,
    *,
    across_processes: bool = False,
) -> Evaluation:
    """Score a model where that is fastest, and give the memory back."""
    home = device_of(model)
    if home.type == "cpu" and torch.cuda.is_available():
        model.to("cuda")
    found = evaluate(
        model,
        tokenizer,
        scored(options, splits),
        EvaluationSettings(options.evaluation_batch_size, options.max_new_tokens, options.max_length),
        across_processes=across_processes,
        progress=not across_processes or processes.is_first(),
    )
    model.to(home)
    return found


def metrics(
    options: DataOptions,
    before: Evaluation | None,
    after: Evaluation,
    reference: Rows | None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything in metrics.json, from the examples that evaluation.jsonl holds.

    `membership` is None without a split called "holdout": an attack has to tell the forget set from examples that neither model
    has seen, and no other split is that. `model_utility` and its inputs are keys only where a model has all nine inputs
    (`evaluation.utility.model_utilities`).
    """
    examples = {"before": None if before is None else before.examples, "after": after.examples, "reference": reference}
    return {
        "before": None if before is None else before.summary,
        "after": after.summary,
        "reference": None if reference is None else {split: summary(rows) for split, rows in reference.items()},
        "forget_quality": None if reference is None else _quality(after.examples, reference),
        "membership": membership(examples["before"], after.examples, reference),
        **model_utilities(examples),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seed": options.seed,
        "versions": outputs.versions(),
    }


def _quality(after: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any] | None:
    ours, theirs = (truth_ratios(examples.get("forget", [])) for examples in (after, reference))
    if not ours or not theirs:
        return None
    if any(
        map(math.isnan, ours)
    ):  # it has no rank: the model diverged, and what was trained is to be seen all the same
        return {**dict.fromkeys(("statistic", "pvalue", "log10_pvalue"), math.nan), "n": len(ours)}
    return forget_quality(ours, theirs)._asdict()
