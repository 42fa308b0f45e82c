"""TOFU's model utility: how much a model still knows of everything that it was not to forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lightning_modules.evaluation.evaluate import summary
from lightning_modules.metrics.functional import (
    UTILITY_METRICS,
    UTILITY_NAMES,
    UTILITY_SPLITS,
    model_utility,
    option_probability,
)

Examples = Mapping[str, Sequence[Mapping[str, Any]]]


def utility_inputs(examples: Examples | None) -> dict[str, float] | None:
    """Returns the nine means that model utility is computed from, of one model.

    They are probability, ROUGE-L recall and truth ratio on retain, real authors and world facts. The probability of
    retain is exp(-nll) of the answer, as in the tables. That of real authors and world facts is the answer's share
    among the options, `metrics.functional.option_probability`, as TOFU defines it there (section 2.2.2).

    Args:
        examples: split -> scored examples, as in `Evaluation.examples`; `None` for no model.

    Returns:
        "<split>/<metric>" -> mean over the examples that have it, in the order of `UTILITY_NAMES`; NaN where the model
        gives NaN. `None` if one of the nine is missing: a split was not scored, or was scored without generation, or
        has no perturbed answers.
    """
    found: dict[str, float] = {}
    for split in UTILITY_SPLITS:
        rows = (examples or {}).get(split, ())
        means: dict[str, Any] = dict(summary(rows))
        if split != "retain":
            means["probability"] = _share_among_options(rows)
        found |= {f"{split}/{name}": means[name] for name in UTILITY_METRICS if means[name] is not None}
    return found if len(found) == len(UTILITY_NAMES) else None


def model_utilities(models: Mapping[str, Examples | None]) -> dict[str, dict[str, Any]]:
    """Returns the entries of metrics.json about model utility.

    Args:
        models: "before", "after" and "reference" -> split -> scored examples; `None` where there is no such model.

    Returns:
        `{"model_utility": {model: utility}, "model_utility_inputs": {model: the nine}}`, with `None` for a model that
        lacks one of its nine inputs. Empty if every model does, so that metrics.json has these keys only where there is
        a utility to show.
    """
    inputs = {name: utility_inputs(examples) for name, examples in models.items()}
    if not any(inputs.values()):
        return {}
    utilities = {name: None if nine is None else model_utility(nine) for name, nine in inputs.items()}
    return {"model_utility": utilities, "model_utility_inputs": inputs}


def _share_among_options(rows: Sequence[Mapping[str, Any]]) -> float | None:
    shares = [
        option_probability([row["nll"]], [row["perturbed_nll"]]).item() for row in rows if row.get("perturbed_nll")
    ]
    return fmean(shares) if shares else None
