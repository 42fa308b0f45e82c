"""Loaders that say where they are, so that training can go on in the middle of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

from torch.utils.data import DataLoader

from lightning_modules.data.lengths import LengthBatches
from lightning_modules.data.order import Pair, PairSampler
from lightning_modules.data.tokenization import Encoded

Item_co = TypeVar("Item_co", covariant=True)


class _Order(Protocol):
    epoch: int
    start: int
    num_replicas: int


class ResumableLoader(DataLoader[Item_co], ABC):
    """A `DataLoader` whose place in the epoch is kept in checkpoints.

    Lightning saves and restores the state of a loader that has `state_dict` and `load_state_dict`. After a restore the
    epoch that was under way goes on behind the batches that were given; they are not made again. Every other epoch is
    whole.
    """

    _given = 0
    _restored: dict[str, int] | None = None
    _unit = ("examples", "examples")  # the key in the state, and what it counts

    def __iter__(self) -> Iterator[Any]:
        """The batches of the order's epoch, from the restored place on."""
        order, restored = self._order(), self._restored
        self._restored = None
        # The epoch is known only now, with the first batch: Lightning makes the iterator before it sets the epoch.
        goes_on = restored is not None and restored["epoch"] == order.epoch
        self._given = restored["batches"] if restored is not None and goes_on else 0
        if restored is not None and self._given:
            self._check(restored)
        order.start = self._given * self._entries()
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, the batches given so far, and what a batch is."""
        return {"epoch": self._order().epoch, "batches": self._given, **self._kind()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there with the next pass over the epoch that was saved."""
        self._restored = dict(state_dict)

    @abstractmethod
    def _order(self) -> _Order:
        """What decides which entries come in which epoch."""

    @abstractmethod
    def _kind(self) -> dict[str, int]:
        """Everything by which the batches of an epoch differ from those of another loader."""

    def _entries(self) -> int:
        """Entries of the order that make a batch."""
        return 1

    def _check(self, restored: dict[str, int]) -> None:
        kind = self._kind()
        found = {name: restored.get(name, 0) for name in kind}
        if found != kind:
            raise ValueError(
                f"expected a checkpoint from the middle of an epoch with {self._said(kind)}, found one with {self._said(found)}: the rest "
                "of the epoch would be other batches; go on with those, or from a checkpoint at the end of an epoch"
            )

    def _said(self, kind: dict[str, Any]) -> str:
        key, what = self._unit
        grouped = ", grouped by length" if kind.get("grouped") else ""
        return f"{kind[key]} {what}, {kind['batch_size']} a batch, in {kind['processes']} processes{grouped}"


class PairLoader(ResumableLoader[Pair]):
    """Paired batches, over a `PairSampler`."""

    _unit = ("pairs", "forget examples")

    def _kind(self) -> dict[str, int]:
        return {
            "batch_size": self._entries(),
            "processes": self._order().num_replicas,
            "pairs": len(self._order().dataset),  # pyright: ignore[reportArgumentType]
            "grouped": self._order().grouped or 0,
        }

    def _entries(self) -> int:
        return self.batch_size or 1

    def _order(self) -> PairSampler:
        if not isinstance(self.sampler, PairSampler):
            raise TypeError(
                f"PairLoader: expected a PairSampler, found {type(self.sampler).__name__}; Lightning puts one in its place for "
                "overfit_batches: give ForgetRetainDataModule a few examples instead"
            )
        return self.sampler


class LengthLoader(ResumableLoader[Encoded]):
    """Batches of single examples, over `LengthBatches`."""

    def _kind(self) -> dict[str, int]:
        order = self._order()
        return {"batch_size": order.batch_size, "processes": order.num_replicas, "examples": len(order.lengths)}

    def _order(self) -> LengthBatches:
        if not isinstance(self.batch_sampler, LengthBatches):
            raise TypeError(f"LengthLoader: expected LengthBatches, found {type(self.batch_sampler).__name__}")
        return self.batch_sampler
