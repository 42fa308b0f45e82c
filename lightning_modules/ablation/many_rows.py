"""Many protected rows: the retain set in parts, each with a gradient of its own that no step may raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_modules.data.loader import PairLoader
from lightning_modules.data.order import permutation
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.tokenization import Encoded, collate, padding_id
from lightning_modules.training.module import UnlearningModule
from lightning_modules.training.soundness import check_retained

Batch = dict[str, Tensor]


def row_names(count: int) -> list[str]:
    """Names of the protected objectives."""
    return [f"retain_{number}" for number in range(count)]


class ManyRows(UnlearningModule):
    """An `UnlearningModule` that protects many parts of the retain set at once, on the batches of `RowsData`.

    The loss of each part is `retain_loss`, and its gradient a row of the Gram matrix; a weight of the retain gradient
    after the rule is divided among them.

    Args:
        arguments: Of `UnlearningModule`, the model.
        rows: How many parts, K.
        retain_weight: Multiple of their mean gradient to add after the rule.
        surgery: Base optimizer -> `GradientSurgery`; it is told the objectives.
        options: Of `UnlearningModule`.

    Raises:
        ValueError: If `retain_loss` is None.

    Cost: K + 1 backward passes and rows, and with an average K averages.
    """

    def __init__(
        self,
        *arguments: Any,
        rows: int,
        surgery: Callable[..., Any],
        retain_weight: float = 0.0,
        **options: Any,
    ) -> None:
        check_retained(**options)
        names = row_names(rows)
        add = dict.fromkeys(names, retain_weight / rows) if retain_weight else None
        super().__init__(*arguments, surgery=partial(surgery, objectives=("forget", *names), add=add), **options)
        retain = self.objectives["retain"]
        self.objectives = {"forget": self.objectives["forget"], **dict.fromkeys(names, retain)}


class RowsData(L.LightningDataModule):
    """The forget batches of another data module, and beside each a batch of every part of its retain set.

    Args:
        data: With the forget and the retain examples.
        rows: How many parts: each is a run of neighbours in the retain set, as long as the others to one example.
        examples: Of each part in a step, in an order that is shuffled anew whenever the part is through.

    Raises:
        ValueError: When training starts, if there are fewer retain examples than parts.
    """

    def __init__(self, data: ForgetRetainDataModule, rows: int, examples: int = 1) -> None:
        super().__init__()
        self.data, self.rows, self.examples = data, rows, examples

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize the examples."""
        self.data.setup(stage)

    def train_dataloader(self) -> RowBatches:
        """Batches `{"forget": ..., "retain_0": ..., ...}`."""
        loader, dataset = self.data.train_dataloader(), self.data.dataset
        if not isinstance(loader, PairLoader) or dataset is None:
            raise TypeError(f"RowsData: expected the loader of ForgetRetainDataModule, found {type(loader).__name__}")
        found = len(dataset.retain)
        if found < self.rows:
            raise ValueError(
                f"retain_rows: expected at most as many rows as retain examples, {found}, found {self.rows}"
            )
        ends = [round(found * number / self.rows) for number in range(self.rows + 1)]
        parts = [range(first, last) for first, last in pairwise(ends)]
        return RowBatches(loader, dataset.retain, parts, self)


class RowBatches:
    """The loader of `RowsData`; it goes on with the parts where the epoch before has ended."""

    def __init__(self, loader: PairLoader, retain: Sequence[Encoded], parts: Sequence[range], data: RowsData) -> None:
        self.loader, self.sampler = loader, loader.sampler  # Lightning tells the sampler its epoch
        self._retain, self._pad, self._examples = retain, padding_id(data.data.tokenizer), data.examples
        seed = data.data.seed
        self._walks = {
            name: chain.from_iterable(_walks(part, seed, name))
            for name, part in zip(row_names(len(parts)), parts, strict=True)
        }

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        for batch in self.loader:
            yield {"forget": batch["forget"], **{name: self._batch(name) for name in self._walks}}

    def _batch(self, name: str) -> Batch:
        places = list(islice(self._walks[name], self._examples))
        return collate([self._retain[place] for place in places], self._pad) | {"index": torch.tensor(places)}


def _walks(part: range, seed: int, name: str) -> Iterator[list[int]]:
    """The places of a part in one shuffled order after another."""
    walk = 0
    while True:
        yield [part[place] for place in permutation(len(part), seed, name, walk)]
        walk += 1
