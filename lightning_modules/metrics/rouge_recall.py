"""How much of the right texts a model's generations reproduce, over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_modules.metrics._base import RougeMean
from lightning_modules.metrics.functional import rouge_recall


class RougeRecall(RougeMean):
    """Mean ROUGE recall of the generations; for each example `functional.rouge_recall`. Needs `rouge-score`.

    Direction: higher is better on what is to be kept, and `higher_is_better` says that. On the forget set lower is
    better, down to the retrained model's score.

    | Llama-2-7B on TOFU, ROUGE-L | retain | forget10 | real authors | world facts |
    |---|---|---|---|---|
    | fine-tuned on everything | .9857 | .9854 | .9330 | .8825 |
    | retrained without forget10 | .9758 | .4082 | .9230 | .8974 |

    Args:
        kind: `"rouge1"`, `"rouge2"`, `"rougeL"` or `"rougeLsum"`.
        use_stemmer: compare Porter stems, as TOFU does.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if the kind is unknown.

    Example:
        >>> metric = RougeRecall()
        >>> metric.update(["He wrote the novels in Lima", "No."], ["The novel", "In Lima"])
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, kind: str = "rougeL", use_stemmer: bool = True, **kwargs: Any) -> None:
        super().__init__(kind, use_stemmer, **kwargs)

    def score(self, predictions: str | Sequence[str], targets: str | Sequence[str]) -> Tensor | float:
        """`functional.rouge_recall` of each example."""
        return rouge_recall(predictions, targets, self.kind, self.use_stemmer)  # pyright: ignore[reportArgumentType, reportCallIssue]
