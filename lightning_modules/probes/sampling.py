"""Leakage by sampling: an adversary who may ask often keeps the best of many answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_modules.data.examples import asked
from lightning_modules.data.tokenization import prompt_ids
from lightning_modules.evaluation.generation import generate_samples
from lightning_modules.evaluation.intervals import mean_interval
from lightning_modules.metrics.functional import has_words, rouge_recall
from lightning_modules.progress import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are sampled.

    Attributes:
        samples: n, for each question.
        temperature: That the logits are divided by.
        max_new_tokens: The longest answer, in tokens.
        batch_size: Answers that are generated at once.
        seed: Of the draws. The global random state stays as it is.

    Raises:
        ValueError: If a number is outside its domain.
    """

    samples: int = 32
    temperature: float = 1.0
    max_new_tokens: int = 64
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling_probe, {name}: expected at least 1, found {getattr(self, name)}")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"sampling_probe, temperature: expected a number > 0, found {self.temperature}")


def expected_best(scores: Sequence[float], k: int) -> float:
    r"""The expected best score of k answers, drawn without putting back from n sampled ones.

    $$\text{leak@}k = \binom{n}{k}^{-1} \sum_{j=k}^{n} \binom{j-1}{k-1} \, s_{(j)}, \quad
    s_{(1)} \le \dots \le s_{(n)}$$

    It is the unbiased estimate of the expected best of k answers from n >= k of them, as in "leak@k" (2511.04934).

    Raises:
        ValueError: If k is not between 1 and n.

    Example:
        >>> expected_best([0.0, 1.0, 0.0, 0.0], 2)
        0.5
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"expected_best: expected 1 <= k <= {n}, the number of scores, found {k}")
    ordered = sorted(scores)
    return sum(math.comb(place, k - 1) * ordered[place] for place in range(k - 1, n)) / math.comb(n, k)


def sampling_probe(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Mapping[str, Any]],
    settings: SamplingSettings = SamplingSettings(),
) -> dict[str, Any]:
    """Samples many answers to each forget question, and scores the best.

    A greedy answer may hide what one of many sampled answers says (probabilistic evaluation, 2410.03523). More answers
    match more words by chance as well: compare with a reference.

    Args:
        model: A causal language model with Hugging Face's `generate`.
        tokenizer: Of the model.
        forget: Examples; those whose answer has no word are left out, and so are plain texts.
        settings: How answers are sampled.

    Returns:
        `{"n", "samples", "temperature", "points": [{"k", "rouge_l_recall", "interval"}, ...], "values"}`: for k = 1, 2,
        4, ... and n the mean over the questions of `expected_best` ROUGE-L recall, with its interval
        (`evaluation.intervals.mean_interval`), and every answer's recall, a list for each question.

    Raises:
        ValueError: If no example has a question and an answer with words.

    Cost: `settings.samples` generations of every question.
    """
    rows = [row for row in forget if row["question"] and has_words(row["answer"])]
    if not rows:
        raise ValueError(f"sampling_probe: expected a question with an answer to forget, found none of {len(forget)}")
    questions = [prompt_ids(tokenizer, asked(row)) for row in rows]
    values: list[list[float]] = [[] for _ in rows]
    stage = Stage("Sampling answers to each question", settings.samples)
    for number in range(settings.samples):
        said = generate_samples(
            model,
            tokenizer,
            questions,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            sampling={"temperature": settings.temperature, "seed": settings.seed * settings.samples + number},
        )
        for recalls, row, answer in zip(values, rows, said, strict=True):
            recalls.append(float(rouge_recall(answer, row["answer"])))
        stage.advance()
    counts = sorted({2**power for power in range(settings.samples.bit_length())} | {settings.samples})
    points: list[dict[str, Any]] = []
    for k in counts:
        best = [expected_best(recalls, k) for recalls in values]
        interval = mean_interval(best)
        between = None if interval is None else [interval.low, interval.high]
        points.append({"k": k, "rouge_l_recall": sum(best) / len(best), "interval": between})
    said_how = {"n": len(rows), "samples": settings.samples, "temperature": settings.temperature}
    return {**said_how, "points": points, "values": values}
