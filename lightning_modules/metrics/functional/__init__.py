r"""Pure metric functions: numbers in, numbers out, no model and no state.

Notation: n examples, m perturbed (wrong) answers each; `nll` is the mean negative log-likelihood per token of an answer
given its question, in nats, with the eos counted.

Source: TOFU (Maini et al. 2024, arXiv 2401.06121, section 2.2) as its `aggregate_eval_stat.py` computes it; this is the
definition behind the published tables. Two other definitions circulate under the same names. They differ by up to .12,
and each docstring says how.

Inputs may be tensors or sequences of numbers. Arithmetic is float64; a float32 tensor `[n]` gives a float32 result of
the same shape. Invalid shapes and unknown kinds raise a `ValueError`. A NaN stays a NaN, because a diverged model must
not be mistaken for one that forgot. The functions need torch alone, except ROUGE (`rouge-score`) and forget quality
(`scipy`).
"""

from lightning_modules.metrics.functional._forget_quality import ForgetQualityResult, forget_quality
from lightning_modules.metrics.functional._membership import (
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    zlib_score,
)
from lightning_modules.metrics.functional._memorization import exact_memorization, extraction_strength
from lightning_modules.metrics.functional._model_utility import (
    UTILITY_METRICS,
    UTILITY_NAMES,
    UTILITY_SPLITS,
    model_utility,
)
from lightning_modules.metrics.functional._multiple_choice import accuracy_interval, multiple_choice_accuracy
from lightning_modules.metrics.functional._privacy import auc, priv_leak
from lightning_modules.metrics.functional._probability import answer_probability, option_probability
from lightning_modules.metrics.functional._rouge import ROUGE_KINDS, has_words, rouge_f1, rouge_recall
from lightning_modules.metrics.functional._truth_ratio import TRUTH_RATIO_KINDS, truth_ratio
from lightning_modules.metrics.functional.numbers import Numbers

__all__ = [
    "ROUGE_KINDS",
    "TRUTH_RATIO_KINDS",
    "UTILITY_METRICS",
    "UTILITY_NAMES",
    "UTILITY_SPLITS",
    "ForgetQualityResult",
    "Numbers",
    "accuracy_interval",
    "answer_probability",
    "auc",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "has_words",
    "loss_score",
    "min_k_plus_plus_score",
    "min_k_score",
    "model_utility",
    "multiple_choice_accuracy",
    "option_probability",
    "priv_leak",
    "rouge_f1",
    "rouge_recall",
    "truth_ratio",
    "zlib_score",
]
