"""The metrics as their papers write them, one example at a time, in plain Python: slow and obvious."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import mpmath


def option_probability(answer_nll: float, perturbed_nll: Sequence[float]) -> float:
    """With 50 digits and exponents without limit, so that nothing under- or overflows."""
    with mpmath.workdps(50):
        right = mpmath.exp(-mpmath.mpf(answer_nll))
        return float(right / (right + mpmath.fsum(mpmath.exp(-mpmath.mpf(wrong)) for wrong in perturbed_nll)))


def harmonic_mean(values: Sequence[float]) -> float:
    """In rational arithmetic, without any rounding."""
    return float(len(values) / sum(1 / Fraction(value) for value in values))


def extraction_strength(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Tries every prefix, from none of the answer to all of it."""
    length = len(labels)
    for shown in range(length + 1):
        if all(predicted[position] == labels[position] for position in range(shown, length)):
            return 1 - shown / length
    raise AssertionError("the empty rest is always reproduced")


def exact_memorization(predicted: Sequence[int], labels: Sequence[int]) -> float:
    return sum(guess == label for guess, label in zip(predicted, labels, strict=True)) / len(labels)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def min_k(log_probabilities: Sequence[float], k: float) -> float:
    """Takes the smallest away, one after another."""
    left = list(log_probabilities)
    taken = [left.pop(left.index(min(left))) for _ in range(max(1, int(k * len(left))))]
    return mean(taken)


def min_k_plus_plus(
    log_probabilities: Sequence[float], means: Sequence[float], stds: Sequence[float], k: float
) -> float:
    scores = [
        (value - centre) / max(deviation, 1e-3)
        for value, centre, deviation in zip(log_probabilities, means, stds, strict=True)
    ]
    return min_k(scores, k)


def zlib_score(log_probabilities: Sequence[float], text: str) -> float:
    return mean(log_probabilities) / len(zlib.compress(text.encode("utf-8")))


def auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """Every pair is a duel; a draw is half a win."""
    wins = sum(1.0 if ours > theirs else 0.5 if ours == theirs else 0.0 for ours in forget for theirs in holdout)
    return wins / (len(forget) * len(holdout))


def open_unlearning_auc(forget_losses: Sequence[float], holdout_losses: Sequence[float]) -> float:
    """As open-unlearning states its convention: scores are losses, and the holdout set is the class to be found."""
    rates = [(0.0, 0.0)] + [
        tuple(mean([float(loss >= threshold) for loss in losses]) for losses in (forget_losses, holdout_losses))
        for threshold in sorted({*forget_losses, *holdout_losses}, reverse=True)
    ]
    return math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(rates))


def priv_leak_of_muse(auc: float, reference_auc: float) -> float:
    """(AUC - AUC_ref) / AUC_ref * 100 where, as in MUSE, the AUC is 0 for a set that is remembered perfectly."""
    return (auc - reference_auc) / reference_auc * 100


def token_statistics(logits: Sequence[float], label: int) -> tuple[float, int, float, float]:
    """log p of the label, argmax, mean and standard deviation of log p under p, with 50 digits."""
    with mpmath.workdps(50):
        z = [mpmath.mpf(value) for value in logits]
        total = mpmath.fsum(mpmath.exp(value) for value in z)
        p = [mpmath.exp(value) / total for value in z]
        log_p = [value - mpmath.log(total) for value in z]
        support = [(q, x) for q, x in zip(p, log_p, strict=True) if q > 0]
        centre = mpmath.fsum(q * x for q, x in support)
        variance = mpmath.fsum(q * (x - centre) ** 2 for q, x in support)
        best = max(range(len(z)), key=lambda index: z[index])
        return float(log_p[label]), best, float(centre), float(mpmath.sqrt(variance))


def nine_of_tofu(splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[float]:
    """What model utility is the harmonic mean of, from probabilities and not in log space, one example at a time."""
    nine: list[float] = []
    for split in ("retain", "real_authors", "world_facts"):
        probabilities, recalls, truths = [], [], []
        for row in splits[split]:
            right, wrong = math.exp(-row["nll"]), [math.exp(-nll) for nll in row["perturbed_nll"]]
            probabilities.append(right if split == "retain" else right / (right + sum(wrong)))
            recalls.append(row["rouge_l_recall"])
            ratio = math.prod(wrong) ** (1 / len(wrong)) / math.exp(-row["paraphrase_nll"])
            truths.append(max(0.0, 1.0 - ratio))
        nine += [mean(probabilities), mean(recalls), mean(truths)]
    return nine
