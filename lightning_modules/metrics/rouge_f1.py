"""How much of right texts, and of nothing else, a model's generations say, over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_modules.metrics._base import RougeMean
from lightning_modules.metrics.functional import rouge_f1


class RougeF1(RougeMean):
    """Mean ROUGE F1 of the generations; for each example `functional.rouge_f1`. Needs `rouge-score`.

    MUSE's verbatim memorization, of continuations of the texts to forget, and its knowledge memorization, of answers
    about them; over answers about the texts to keep it is MUSE's utility.

    Direction: higher is better on what is to be kept, and `higher_is_better` says that. On the forget set lower is
    better, down to the retrained model's score.

    Args:
        kind: `"rouge1"`, `"rouge2"`, `"rougeL"` or `"rougeLsum"`.
        use_stemmer: compare Porter stems; MUSE does not.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if the kind is unknown.

    Example:
        >>> metric = RougeF1()
        >>> metric.update(["He wrote the novel in Lima", "No."], ["The novel", "In Lima"])
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, kind: str = "rougeL", use_stemmer: bool = False, **kwargs: Any) -> None:
        super().__init__(kind, use_stemmer, **kwargs)

    def score(self, predictions: str | Sequence[str], targets: str | Sequence[str]) -> Tensor | float:
        """`functional.rouge_f1` of each example."""
        return rouge_f1(predictions, targets, self.kind, self.use_stemmer)
