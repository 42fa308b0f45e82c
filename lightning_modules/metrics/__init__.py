"""Unlearning metrics: the pure functions in `functional`, and a `torchmetrics.Metric` over each of them.

The functions need torch alone. The classes accumulate over batches and processes. They need `torchmetrics`, which comes
with Lightning, and are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_modules.metrics import functional

if TYPE_CHECKING:
    from lightning_modules.metrics.answer_probability import AnswerProbability
    from lightning_modules.metrics.exact_memorization import ExactMemorization
    from lightning_modules.metrics.extraction_strength import ExtractionStrength
    from lightning_modules.metrics.forget_quality import ForgetQuality
    from lightning_modules.metrics.model_utility import ModelUtility
    from lightning_modules.metrics.multiple_choice_accuracy import MultipleChoiceAccuracy
    from lightning_modules.metrics.priv_leak import PrivLeak
    from lightning_modules.metrics.rouge_f1 import RougeF1
    from lightning_modules.metrics.rouge_recall import RougeRecall
    from lightning_modules.metrics.truth_ratio import TruthRatio

__all__ = [
    "AnswerProbability",
    "ExactMemorization",
    "ExtractionStrength",
    "ForgetQuality",
    "ModelUtility",
    "MultipleChoiceAccuracy",
    "PrivLeak",
    "RougeF1",
    "RougeRecall",
    "TruthRatio",
    "functional",
]

_HOMES = {
    "AnswerProbability": "answer_probability",
    "ExactMemorization": "exact_memorization",
    "ExtractionStrength": "extraction_strength",
    "ForgetQuality": "forget_quality",
    "ModelUtility": "model_utility",
    "MultipleChoiceAccuracy": "multiple_choice_accuracy",
    "PrivLeak": "priv_leak",
    "RougeF1": "rouge_f1",
    "RougeRecall": "rouge_recall",
    "TruthRatio": "truth_ratio",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchmetrics":
            raise
        hint = f"lightning_modules.metrics.{name} needs torchmetrics: pip install 'gradsurgery[lightning]'"
        raise ModuleNotFoundError(hint, name=error.name) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
