"""Model utility: one number for everything that a model should still know, over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.metrics._base import ExampleMetric, nothing_seen
from lightning_modules.metrics.functional import (
    UTILITY_METRICS,
    UTILITY_SPLITS,
    Numbers,
    answer_probability,
    model_utility,
    option_probability,
    truth_ratio,
)
from lightning_modules.metrics.functional.numbers import as_numbers


class ModelUtility(ExampleMetric):
    """TOFU's model utility: the harmonic mean of nine means, `functional.model_utility`.

    Direction: higher is better. Llama-2-7B fine-tuned on all of TOFU scores .6227, retrained without forget10 .6137; an
    unlearned model should lose nothing. The smallest of the nine dominates a harmonic mean, so look at `nine` too.

    `update` takes one split at a time, `compute` needs all three. So calling the metric (`metric(...)`), which computes
    the metric of a single batch, raises.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = ModelUtility()
        >>> for split in ("retain", "real_authors", "world_facts"):
        ...     metric.update(split, [0.0], [0.0], [[1e4, 1e4, 1e4]], rouge_recall=[0.5])
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
        >>> metric.nine()["retain/rouge_l_recall"]
        0.5
    """

    higher_is_better = True

    totals: Tensor
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = (len(UTILITY_SPLITS), len(UTILITY_METRICS))
        self.add_state("totals", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(shape[:1], dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        split: str,
        answer_nll: Numbers,
        paraphrase_nll: Numbers,
        perturbed_nll: Tensor | Sequence[Sequence[float]],
        rouge_recall: Numbers,
    ) -> None:
        """Adds n examples of one split.

        Args:
            split: `"retain"`, `"real_authors"` or `"world_facts"`.
            answer_nll: mean token negative log-likelihood of the answers in nats, `[n]`.
            paraphrase_nll: that of the paraphrased answers, `[n]`; `answer_nll` again where there are none, as for real
                authors and world facts.
            perturbed_nll: that of the m wrong answers of each example, `[n, m]`.
            rouge_recall: ROUGE-L recall of the generations, `[n]`.

        Raises:
            ValueError: if the split is unknown, a shape is not the one stated or empty, or the n differ.
        """
        if split not in UTILITY_SPLITS:
            raise ValueError(f"expected split to be one of {', '.join(UTILITY_SPLITS)}, found {split!r}")
        probability = (
            answer_probability(answer_nll) if split == "retain" else option_probability(answer_nll, perturbed_nll)
        )
        recall, _ = as_numbers(rouge_recall, "rouge_recall", "[n]", dimensions=1)
        parts = (probability, recall, truth_ratio(paraphrase_nll, perturbed_nll, kind="utility"))
        if len({len(part) for part in parts}) > 1:
            raise ValueError(
                f"expected answer_nll, rouge_recall and paraphrase_nll of the same n, found {[len(part) for part in parts]}"
            )
        row = UTILITY_SPLITS.index(split)
        sums = torch.stack([part.to(self.totals).sum() for part in parts])
        self.totals = self.totals.index_add(0, torch.tensor([row], device=sums.device), sums.unsqueeze(0))
        self.counts = self.counts + torch.eye(len(UTILITY_SPLITS), dtype=torch.int64, device=sums.device)[row] * len(
            recall
        )

    def compute(self) -> Tensor:
        """The harmonic mean of the nine, a float64 scalar; 0 where one of them is 0, NaN where one is NaN.

        Raises:
            RuntimeError: if a split had no example.
        """
        return torch.tensor(model_utility(self._nine()), dtype=torch.float64, device=self.totals.device)

    def nine(self) -> dict[str, float]:
        """The nine means, as `"<split>/<metric>"`: probability, rouge_l_recall and truth_ratio of each split.

        The means are over all processes, so every process has to call it.

        Raises:
            RuntimeError: if a split had no example.
        """
        alone = not self._is_synced
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=alone, should_unsync=alone):
            return self._nine()

    def _nine(self) -> dict[str, float]:
        missing = [split for split, count in zip(UTILITY_SPLITS, self.counts.tolist(), strict=True) if not count]
        if missing:
            raise nothing_seen(self, f" of {', '.join(missing)}")
        means = (self.totals / self.counts.unsqueeze(-1)).tolist()
        return {
            f"{split}/{metric}": mean
            for split, row in zip(UTILITY_SPLITS, means, strict=True)
            for metric, mean in zip(UTILITY_METRICS, row, strict=True)
        }
