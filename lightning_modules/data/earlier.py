"""Batches of requests that were forgotten before, beside those of the request that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_modules.data.loader import PairLoader
from lightning_modules.data.order import permutation
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.tokenization import Encoded, collate, padding_id


class EarlierData(L.LightningDataModule):
    """The batches of another data module, and beside them a batch for each protected row of earlier requests.

    Args:
        data: With the examples to forget and to keep.
        rows: Name of a protected row -> its requests, each as its tokenized examples. They take turns: at batch t of
            the training, counted from 0, it is request t mod n of the n.
    """

    def __init__(self, data: ForgetRetainDataModule, rows: Mapping[str, Sequence[Sequence[Encoded]]]) -> None:
        super().__init__()
        self.data, self.rows = data, rows

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize the examples."""
        self.data.setup(stage)

    def val_dataloader(self) -> Any:
        """Those of the other data module."""
        return self.data.val_dataloader()

    def train_dataloader(self) -> EarlierBatches:
        """Batches `{"forget": ..., "retain": ..., <row>: ..., ...}`.

        Raises:
            TypeError: If the other data module has a loader of its own.
        """
        loader = self.data.train_dataloader()
        if not isinstance(loader, PairLoader):
            raise TypeError(
                f"EarlierData: expected the loader of ForgetRetainDataModule, found {type(loader).__name__}"
            )
        return EarlierBatches(loader, self.data, self.rows)


class EarlierBatches:
    """The loader of `EarlierData`. What a batch holds is a function of its place in the training alone."""

    def __init__(
        self, loader: PairLoader, data: ForgetRetainDataModule, rows: Mapping[str, Sequence[Sequence[Encoded]]]
    ) -> None:
        self.loader, self.sampler = loader, loader.sampler  # Lightning tells the sampler its epoch
        self._rows, self._size, self._seed = rows, data.batch_size, data.seed
        self._pad = padding_id(data.tokenizer)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The epoch's batches, from the restored place on."""
        for batch in self.loader:
            place = self.loader.state_dict()
            number = place["epoch"] * len(self) + place["batches"] - 1
            yield {**batch, **{name: self._batch(name, number) for name in self._rows}}

    def state_dict(self) -> dict[str, int]:
        """The place in the epoch."""
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self.loader.load_state_dict(state_dict)

    def _batch(self, name: str, number: int) -> dict[str, Tensor]:
        requests = self._rows[name]
        turn, which = divmod(number, len(requests))
        examples = requests[which]
        size = min(self._size, len(examples))
        places: list[int] = []
        for entry in range(turn * size, (turn + 1) * size):
            walk, place = divmod(entry, len(examples))
            places.append(permutation(len(examples), self._seed, f"{name}/{which}", walk)[place])
        return collate([examples[place] for place in places], self._pad) | {"index": torch.tensor(places)}
