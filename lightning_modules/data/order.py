"""Pairs of a forget and a retain example, and the order in which the processes see them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightning_modules.data.lengths import BUCKET
from lightning_modules.data.tokenization import Encoded, collate


class Pair(NamedTuple):
    """One entry of a batch.

    Attributes:
        forget: a forget example.
        retain: a retain example.
        refusal: the forget example's question with a refusal or a substitute as its answer; `None` without.
        index: the places of the forget and of the retain example in their sets.
    """

    forget: Encoded
    retain: Encoded
    refusal: Encoded | None
    index: tuple[int, int]


class PairDataset(Dataset[Pair]):
    """Forget and retain examples, addressed by a pair of indices; its length is that of the forget set.

    Attributes:
        forget: the examples to forget.
        retain: the examples to keep.
        refusal: for each example to forget, its question with a refusal; or `None`.
        substitutes: for each example to forget, its question with other answers, of which each pair has one; or `None`.
    """

    def __init__(
        self,
        forget: Sequence[Encoded],
        retain: Sequence[Encoded],
        refusal: Sequence[Encoded] | None = None,
        substitutes: Sequence[Sequence[Encoded]] | None = None,
    ) -> None:
        """Keeps the sequences.

        Raises:
            ValueError: if `forget` or `retain` is empty, or a forget example is without a refusal or a substitute.
        """
        for name, examples in (("forget", forget), ("retain", retain)):
            if not examples:
                raise ValueError(f"expected at least one {name} example, found none")
        if refusal is not None and len(refusal) != len(forget):
            raise ValueError(f"expected a refusal for each of {len(forget)} forget examples, found {len(refusal)}")
        self.forget = forget
        self.retain = retain
        if substitutes is not None and (len(substitutes) != len(forget) or not all(substitutes)):
            raise ValueError(f"expected substitutes for each of {len(forget)} forget examples, found some without")
        self.refusal = refusal
        self.substitutes = substitutes

    def __len__(self) -> int:
        """The number of forget examples."""
        return len(self.forget)

    def __getitem__(self, pair: tuple[int, int]) -> Pair:
        """The forget and the retain example at `(forget index, retain index)`."""
        refusal = None if self.refusal is None else self.refusal[pair[0]]
        if self.substitutes is not None:  # the retain example beside it is another one each time
            others = self.substitutes[pair[0]]
            refusal = others[pair[1] % len(others)]
        return Pair(self.forget[pair[0]], self.retain[pair[1]], refusal, pair)


class PairSampler(DistributedSampler):
    """Yields `(forget index, retain index)`: an epoch is one pass over the forget set.

    The order is a pure function of seed and epoch, so a resumed run sees what an uninterrupted one would have seen:

    - forget: a fresh permutation each epoch;
    - retain: an endless chain of permutations of the retain set, which the epochs continue. Pair number t of the whole
      training takes entry t of it. So every retain example is seen once before any is seen twice.

    At every step, W processes with batches of B together see the pairs that one process sees with batches of `W * B`.
    Where W does not divide the forget set, the epoch ends with its first pairs again, as in `DistributedSampler`.

    It is a `DistributedSampler` even for one process, because Lightning replaces every other sampler by its own.

    With `group_by_length` every run of eight steps' pairs is sorted by length, the forget and the retain examples each
    by themselves, and the steps are shuffled; a step's examples are then of similar length, and the sentences above
    hold for runs of eight steps.

    Attributes:
        start: so many pairs of this process are left out of the next pass, for training that goes on in the middle of
            an epoch.
    """

    def __init__(
        self,
        dataset: PairDataset,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        group_by_length: int | None = None,
    ) -> None:
        """Prepares the order of one process.

        Args:
            dataset: the pairs to draw from.
            seed: of both orders.
            num_replicas: the number of processes, W.
            rank: this process, below W.
            group_by_length: the batch size B of one process, if the examples of a batch are to be of similar length.
        """
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)
        self.sizes = len(dataset.forget), len(dataset.retain)
        self.start, self.grouped = 0, group_by_length
        self._lengths = [[len(text.input_ids) for text in texts] for texts in (dataset.forget, dataset.retain)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The pairs of this process in the current epoch, see `set_epoch`; those before `start` are left out, once."""
        start, self.start = self.start, 0
        num_forget, num_retain = self.sizes
        forget = permutation(num_forget, self.seed, "forget", self.epoch)
        first = self.epoch * num_forget
        walks = {
            walk: permutation(num_retain, self.seed, "retain", walk)
            for walk in range(first // num_retain, (first + num_forget - 1) // num_retain + 1)
        }
        retain = [walks[step // num_retain][step % num_retain] for step in range(first, first + num_forget)]
        pairs = list(zip(forget, retain, strict=True))
        if self.grouped is not None:
            pairs = self._grouped(pairs, self.grouped * self.num_replicas)
        positions = range(self.rank, self.total_size, self.num_replicas)[start:]
        return iter([pairs[position % num_forget] for position in positions])

    def _grouped(self, pairs: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
        """The pairs in steps of similar length, the last and smaller step at the end."""
        steps: list[list[tuple[int, int]]] = []
        for start in range(0, len(pairs), BUCKET * size):
            columns = zip(*pairs[start : start + BUCKET * size], strict=True)
            forget, retain = (
                sorted(column, key=lambda place, lengths=lengths: lengths[place])
                for column, lengths in zip(columns, self._lengths, strict=True)
            )
            bucket = list(zip(forget, retain, strict=True))
            steps += [bucket[first : first + size] for first in range(0, len(bucket), size)]
        whole = len(pairs) // size
        order = [*permutation(whole, self.seed, "steps", self.epoch), *range(whole, len(steps))]
        return [pair for step in order for pair in steps[step]]


def permutation(n: int, seed: int, stream: str, number: int) -> list[int]:
    """Returns a permutation of `range(n)` that depends on the arguments alone.

    Args:
        n: its length.
        seed: the run's seed.
        stream: what is permuted; each stream has permutations of its own.
        number: counts the permutations of a stream.
    """
    # Hashed, because with seed + epoch the second epoch of seed 0 would be the first of seed 1: no independent seeds.
    mixed = hashlib.blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little"))
    return torch.randperm(n, generator=generator).tolist()


def collate_pairs(pairs: Sequence[Pair], pad_token_id: int) -> dict[str, dict[str, Tensor]]:
    """Returns one padded batch for each objective, with `index`, the examples' places in their sets.

    Args:
        pairs: B of them, either all with a refusal (or a substitute) or none.
        pad_token_id: see `tokenization.padding_id`.

    Returns:
        "forget" and "retain" (and "refusal") -> the batch of `tokenization.collate` with `index`, int64 `[B]`.
    """
    forget, retain = (torch.tensor(indices) for indices in zip(*(pair.index for pair in pairs), strict=True))
    batches = {
        "forget": collate([pair.forget for pair in pairs], pad_token_id) | {"index": forget},
        "retain": collate([pair.retain for pair in pairs], pad_token_id) | {"index": retain},
    }
    refusals = [pair.refusal for pair in pairs if pair.refusal is not None]
    return batches | ({"refusal": collate(refusals, pad_token_id) | {"index": forget}} if refusals else {})
