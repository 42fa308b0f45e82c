"""The loader of paired batches, which says where it is, so that training can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_modules.data.order import Pair, PairSampler


class PairLoader(DataLoader[Pair]):
    """A `DataLoader` over a `PairSampler` whose place in the epoch is kept in checkpoints.

    Lightning saves and restores the state of a loader that has `state_dict` and `load_state_dict`. After a restore the
    epoch that was under way goes on behind the batches that were given; they are not made again. Every other epoch is
    whole.
    """

    _given = 0
    _restored: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:
        """The batches of the sampler's epoch, from the restored place on."""
        sampler, restored = self._order(), self._restored
        self._restored = None
        # The epoch is known only now, with the first batch: Lightning makes the iterator before it sets the epoch.
        goes_on = restored is not None and restored["epoch"] == sampler.epoch
        self._given = restored["batches"] if restored is not None and goes_on else 0
        if restored is not None and self._given:
            self._check(restored)
        sampler.start = self._given * (self.batch_size or 1)
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, the batches given so far, and what a batch is."""
        return {"epoch": self._order().epoch, "batches": self._given, **self._kind()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there with the next pass over the epoch that was saved."""
        self._restored = dict(state_dict)

    def _kind(self) -> dict[str, int]:
        return {
            "batch_size": self.batch_size or 1,
            "processes": self._order().num_replicas,
            "pairs": len(self._order().dataset),  # pyright: ignore[reportArgumentType]
        }

    def _check(self, restored: dict[str, int]) -> None:
        kind = self._kind()
        found = {name: restored.get(name) for name in kind}
        if found != kind:
            raise ValueError(
                f"expected a checkpoint from the middle of an epoch with {_said(kind)}, found one with {_said(found)}: the rest of the "
                "epoch would be other batches; go on with those, or from a checkpoint at the end of an epoch"
            )

    def _order(self) -> PairSampler:
        if not isinstance(self.sampler, PairSampler):
            raise TypeError(f"PairLoader: expected a PairSampler, found {type(self.sampler).__name__}")
        return self.sampler


def _said(kind: dict[str, Any]) -> str:
    return f"{kind['pairs']} forget examples, {kind['batch_size']} a batch, in {kind['processes']} processes"
