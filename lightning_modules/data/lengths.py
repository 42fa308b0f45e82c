"""Batches of examples of similar length, so that little is spent on padding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

BUCKET = 8
"""Batches that are sorted by length together: enough to save padding, few enough to keep the order random."""


class LengthBatches:
    """A batch sampler: places of examples, in batches of similar length and in an order that depends on the seed alone.

    Every epoch is one pass over the examples in a fresh order. The examples are shuffled, each run of eight batches is
    sorted by length and cut into batches, and the batches are shuffled. At every step, W processes with batches of B
    together see the examples that one process sees with batches of `W * B`. Where W does not divide a batch, its first
    examples are seen again, as in PyTorch's `DistributedSampler`.

    Args:
        lengths: Of the examples, in tokens.
        batch_size: Examples in a batch of one process.
        seed: Of the order.
        num_replicas: Number of processes, W.
        rank: This process, below W.

    Attributes:
        start: So many batches are left out of the next pass, for training that goes on in the middle of an epoch.

    Example:
        >>> [sorted(batch) for batch in LengthBatches([3, 9, 3, 9], batch_size=2)]
        [[0, 2], [1, 3]]
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, seed: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch = self.start = 0

    @property
    def sampler(self) -> LengthBatches:
        """Itself: Lightning calls `set_epoch` on what a batch sampler samples from."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.lengths) // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        """This process's batches in the current epoch; those before `start` are left out, once."""
        start, self.start = self.start, 0
        order = random.Random(self.seed)
        batches: list[list[int]] = []
        for _ in range(self.epoch + 1):  # one stream of random numbers runs through all epochs
            batches = self._batches(order)
        for batch in batches[start:]:
            fair = -(-len(batch) // self.num_replicas)
            yield [batch[place % len(batch)] for place in range(self.rank, fair * self.num_replicas, self.num_replicas)]

    def _batches(self, order: random.Random) -> list[list[int]]:
        shuffled = order.sample(range(len(self.lengths)), len(self.lengths))
        size = self.batch_size * self.num_replicas
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), BUCKET * size):
            bucket = sorted(shuffled[start : start + BUCKET * size], key=lambda place: self.lengths[place])
            batches += [bucket[first : first + size] for first in range(0, len(bucket), size)]
        order.shuffle(batches)
        return batches
