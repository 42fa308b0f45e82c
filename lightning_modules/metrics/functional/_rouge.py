"""How much of the right text a generation reproduces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@overload
def rouge_recall(prediction: str, target: str, kind: str = ..., use_stemmer: bool = ...) -> float: ...
@overload
def rouge_recall(
    prediction: list[str] | tuple[str, ...],
    target: list[str] | tuple[str, ...],
    kind: str = ...,
    use_stemmer: bool = ...,
) -> Tensor: ...
def rouge_recall(
    prediction: str | Sequence[str], target: str | Sequence[str], kind: str = "rougeL", use_stemmer: bool = True
) -> float | Tensor:
    """The share of the target's words that the prediction has, in order (ROUGE-L) or in any order (ROUGE-1).

    Source: Lin 2004, as the `rouge-score` package computes it, recall only. TOFU uses stems (without them a forget set
    scores .4015 instead of .4082) and reports recall. The F1 that other packages print by default is another number
    (.287 where recall is .923), because it penalises full sentences. open-unlearning first strips the text and cuts it
    at stop words; here text is scored as it is. Words are runs of a-z and 0-9, so a text in another script scores 0.

    Args:
        prediction: the model's text, or n of them.
        target: the right text, or n of them.
        kind: `"rouge1"`, `"rouge2"`, `"rougeL"` or `"rougeLsum"`.
        use_stemmer: compare Porter stems.

    Returns:
        A float in [0, 1] for two strings, a float64 tensor `[n]` for two lists.

    Raises:
        ValueError: if the kind is unknown, or there are not as many predictions as targets and at least one.
        ImportError: without the `rouge-score` package.

    Example:
        >>> rouge_recall("He wrote the novel in Lima", "The novel")
        1.0
        >>> rouge_recall(["a b", "c"], ["a b c d", "d"])
        tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    if kind not in ROUGE_KINDS:
        raise ValueError(f"expected kind to be one of {', '.join(ROUGE_KINDS)}, found {kind!r}")
    scorer = _scorer(kind, use_stemmer)
    if isinstance(prediction, str) and isinstance(target, str):
        return float(scorer.score(target, prediction)[kind].recall)
    if isinstance(prediction, str) or isinstance(target, str):
        raise ValueError("expected two strings or two lists of strings, found one of each")
    if len(prediction) != len(target) or not prediction:
        raise ValueError(
            f"expected as many predictions as targets, and at least one, found {len(prediction)} and {len(target)}"
        )
    recalls = [scorer.score(right, text)[kind].recall for text, right in zip(prediction, target, strict=True)]
    return torch.tensor(recalls, dtype=torch.float64)


@lru_cache(maxsize=8)
def _scorer(kind: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer: bool) -> RougeScorer:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the rouge-score package: pip install rouge-score") from error
    return RougeScorer([kind], use_stemmer=use_stemmer)
