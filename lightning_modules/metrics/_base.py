"""The base of all metric classes here, on top of `torchmetrics.Metric`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.metrics.functional import ROUGE_KINDS


class ExampleMetric(Metric):
    """A metric over examples with float64 states, which an error does not spoil.

    When `compute` raises, torchmetrics leaves the metric synchronised, or switched to a single batch, and every later
    result is silently wrong. Here the metric is restored to its state before the call.

    Apple's GPUs have no float64: keep the metric on the CPU there.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Every process has to send the same dtype, also the empty state of one that saw no example.
        self.set_dtype(torch.float64)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch and returns the metric of that batch alone."""
        before = {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    @contextmanager
    def sync_context(self, *args: Any, should_unsync: bool = True, **kwargs: Any) -> Generator[None]:
        """Gathers the states of all processes for the time of the block."""
        self.sync(*args, **kwargs)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)


class MeanOverExamples(ExampleMetric):
    """The mean of one number for each example, over all batches and processes.

    Args:
        options: what the number depends on, besides the class.
        kwargs: of `torchmetrics.Metric`.
    """

    def __init__(self, *options: object, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A MetricCollection takes metrics for one whose states have the same names and, after the first batch, the same
        # numbers, as all of an answer that is repeated word for word have.
        self._of = "_".join(map(str, (type(self).__name__, *options)))
        self.add_state(f"total_{self._of}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state(f"count_{self._of}", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def total(self) -> Tensor:
        """The sum of the numbers."""
        return getattr(self, f"total_{self._of}")

    @property
    def count(self) -> Tensor:
        """How many there are."""
        return getattr(self, f"count_{self._of}")

    def add(self, values: Tensor | float) -> None:
        """Adds the numbers of n examples, `[n]`, or that of one."""
        numbers = torch.as_tensor(values).to(self.total).reshape(-1)
        setattr(self, f"total_{self._of}", self.total + numbers.sum())
        setattr(self, f"count_{self._of}", self.count + len(numbers))

    def compute(self) -> Tensor:
        """The mean over the examples, float64.

        Raises:
            RuntimeError: if there was no example.
        """
        if not self.count:
            raise nothing_seen(self)
        return self.total / self.count


class RougeMean(MeanOverExamples):
    """The mean of a ROUGE score, over all batches and processes.

    Args:
        kind: `"rouge1"`, `"rouge2"`, `"rougeL"` or `"rougeLsum"`.
        use_stemmer: compare Porter stems.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: if the kind is unknown.
    """

    def __init__(self, kind: str, use_stemmer: bool, **kwargs: Any) -> None:
        if kind not in ROUGE_KINDS:
            raise ValueError(f"expected kind to be one of {', '.join(ROUGE_KINDS)}, found {kind!r}")
        super().__init__(kind, use_stemmer, **kwargs)
        self.kind = kind
        self.use_stemmer = use_stemmer

    @abstractmethod
    def score(self, predictions: str | Sequence[str], targets: str | Sequence[str]) -> Tensor | float:
        """The numbers of n examples, `[n]`, or that of one."""

    def update(self, predictions: str | Sequence[str], targets: str | Sequence[str]) -> None:
        """Adds n examples.

        Args:
            predictions: generated texts, n of them, or one.
            targets: the right texts, as many.

        Raises:
            ValueError: if there is none, or not as many of both.
        """
        self.add(self.score(predictions, targets))


def nothing_seen(metric: Metric, of: str = "") -> RuntimeError:
    """Returns the error of `compute` before any `update`."""
    return RuntimeError(
        f"{type(metric).__name__} has seen no example{of}: call update with a batch of them before compute"
    )


def gathered(state: Any) -> Tensor:
    """Returns a state that is a list of tensors as one tensor; an empty one if no process has any."""
    parts = [state] if isinstance(state, Tensor) else list(state)
    return dim_zero_cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
