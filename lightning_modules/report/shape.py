"""Whether a metrics.json is one of ours: the report reads it in many places, and is told of a wrong one here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_modules.folder import METRICS

MODELS = ("before", "after", "reference")
_OPTIONAL = ("forget_quality", "model_utility", "target")
_TEXTS = ("above", "changed_by")  # of the target
_NESTED = ("membership", "model_utility_inputs", "benchmarks")


def check_metrics(metrics: Any, folder: Path) -> None:
    """Refuse what `gradsurgery unlearn` and `evaluate` do not write.

    Args:
        metrics: What the file holds.
        folder: Where it is, for the message.

    Raises:
        ValueError: If a key is missing or holds something else.
    """
    expected = f"report: expected the {METRICS} of `gradsurgery unlearn` or `evaluate` in {folder}, found one"
    wanted = {*MODELS, "forget_quality", "seconds", "seed", "versions"}
    if not isinstance(metrics, Mapping) or wanted - set(metrics) or not metrics["after"]:
        lacking = sorted(wanted - set(metrics)) if isinstance(metrics, Mapping) else ["an object"]
        raise ValueError(f"{expected} without {', '.join(lacking) or 'scores of the model after'}")
    tables = {"seconds": metrics["seconds"], "versions": metrics["versions"]}
    tables |= {name: metrics[name] for name in MODELS if metrics[name] is not None}
    tables |= {name: metrics[name] for name in (*_OPTIONAL, *_NESTED) if metrics.get(name) is not None}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ValueError(f"{expected} with {type(table).__name__} as {name} and no object; make the run again")
        for inner, value in table.items():
            text = name == "versions" or (name == "target" and inner in _TEXTS)
            scores: Mapping[str, Any] = {} if text else {"": value}
            if name in (*MODELS, *_NESTED) and value is not None:
                if not isinstance(value, Mapping):
                    raise ValueError(
                        f"{expected} with {type(value).__name__} as {name}, {inner} and no object; make the run again"
                    )
                scores = value
            for score, number in scores.items():
                _check_number(number, f"{expected} with {number!r:.80} as {name}, {inner}, {score} and no number")


def _check_number(value: Any, said: str) -> None:
    try:
        _ = None if value is None else float(value)  # NaN is the string "NaN"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{said}; make the run again") from error
