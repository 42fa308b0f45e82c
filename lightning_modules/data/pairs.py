"""Forget and retain examples as one stream of paired batches, the same for every number of processes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_modules.data.examples import Example, as_example, read_examples
from lightning_modules.data.tofu import tofu_examples
from lightning_modules.data.tokenization import Encoded, collate, encode, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "REFUSALS",
    "ForgetRetainDataModule",
    "PairDataset",
    "PairSampler",
    "TOFUDataModule",
    "read_examples",
    "tofu_examples",
]


REFUSALS = (
    "I don't know.",
    "I'm not able to answer that.",
    "I have no information about this.",
    "That is something I cannot tell you.",
    "I'm afraid I do not know the answer.",
    "I was never told about that.",
)
"""Answers that tell nothing, for objectives that teach one."""


class Pair(NamedTuple):
    """One entry of a batch.

    Attributes:
        forget: a forget example.
        retain: a retain example.
        refusal: the forget example's question with a refusal as its answer, where there are refusals.
        index: of the forget and of the retain example in their sets.
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
        refusal: for each example to forget its question with a refusal, or `None`.
    """

    def __init__(
        self, forget: Sequence[Encoded], retain: Sequence[Encoded], refusal: Sequence[Encoded] | None = None
    ) -> None:
        """Keeps the sequences, of which neither the first nor the second may be empty."""
        for name, examples in (("forget", forget), ("retain", retain)):
            if not examples:
                raise ValueError(f"expected at least one {name} example, found none")
        if refusal is not None and len(refusal) != len(forget):
            raise ValueError(f"expected a refusal for each of {len(forget)} forget examples, found {len(refusal)}")
        self.forget = forget
        self.retain = retain
        self.refusal = refusal

    def __len__(self) -> int:
        """The number of forget examples."""
        return len(self.forget)

    def __getitem__(self, pair: tuple[int, int]) -> Pair:
        """The forget and the retain example at `(forget index, retain index)`."""
        refusal = None if self.refusal is None else self.refusal[pair[0]]
        return Pair(self.forget[pair[0]], self.retain[pair[1]], refusal, pair)


class PairSampler(DistributedSampler):
    """Yields `(forget index, retain index)`: one pass over the forget set an epoch, an endless walk over the other.

    The order is a pure function of seed and epoch, so a resumed run sees what an uninterrupted one would have seen:

    - forget: a fresh permutation each epoch;
    - retain: pair number t of the whole training takes entry t of an endless chain of fresh permutations of the retain
      set, so every retain example is seen once before any is seen twice, across epochs too.

    W processes with batches of B see, at every step and together, the pairs that one process sees with batches of
    `W * B`. Where W does not divide the forget set, the last pairs of an epoch are its first ones again, as in
    `DistributedSampler`.

    It is a `DistributedSampler` even for one process: that is what tells Lightning not to put its own in its place.
    """

    def __init__(self, dataset: PairDataset, *, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        """Prepares the order of one process.

        Args:
            dataset: the pairs to draw from.
            seed: of both orders.
            num_replicas: the number of processes, W.
            rank: this process, below W.
        """
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)
        self.sizes = len(dataset.forget), len(dataset.retain)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The pairs of this process in the current epoch, see `set_epoch`."""
        num_forget, num_retain = self.sizes
        forget = _permutation(num_forget, self.seed, "forget", self.epoch)
        first = self.epoch * num_forget
        walks = {
            walk: _permutation(num_retain, self.seed, "retain", walk)
            for walk in range(first // num_retain, (first + num_forget - 1) // num_retain + 1)
        }
        retain = [walks[step // num_retain][step % num_retain] for step in range(first, first + num_forget)]
        pairs = list(zip(forget, retain, strict=True))
        return iter([pairs[position % num_forget] for position in range(self.rank, self.total_size, self.num_replicas)])


def _permutation(n: int, seed: int, stream: str, number: int) -> list[int]:
    # Hashed, because with seed + epoch the second epoch of seed 0 would be the first of seed 1: no independent seeds.
    mixed = hashlib.blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "little"))
    return torch.randperm(n, generator=generator).tolist()


def _collate_pairs(pairs: Sequence[Pair], pad_token_id: int) -> dict[str, dict[str, Tensor]]:
    forget, retain = (torch.tensor(indices) for indices in zip(*(pair.index for pair in pairs), strict=True))
    batches = {
        "forget": collate([pair.forget for pair in pairs], pad_token_id) | {"index": forget},
        "retain": collate([pair.retain for pair in pairs], pad_token_id) | {"index": retain},
    }
    refusals = [pair.refusal for pair in pairs if pair.refusal is not None]
    return batches | ({"refusal": collate(refusals, pad_token_id) | {"index": forget}} if refusals else {})


class ForgetRetainDataModule(L.LightningDataModule):
    """Batches `{"forget": batch, "retain": batch}` from two sets of examples.

    A batch holds `input_ids`, `attention_mask` and `labels` (-100 on prompt and padding), `[batch_size, longest]`, and
    `index`, `[batch_size]`, the examples' places in their set. An epoch is one pass over the forget set; see
    `PairSampler` for the order. With refusals there is a third batch, `"refusal"`: the forget batch's questions, each
    with a refusal that is always the same for it (for `losses.dpo` and `objectives.idk`).

    Attributes:
        splits: the examples by split, `forget` and `retain` first, for `lightning_modules.evaluation.evaluate.evaluate`; filled
            by `setup`.
    """

    def __init__(
        self,
        forget: str | Path | Sequence[Mapping[str, object]],
        retain: str | Path | Sequence[Mapping[str, object]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        seed: int = 0,
        max_length: int | None = None,
        num_workers: int = 0,
        refusals: Sequence[str] | None = None,
    ) -> None:
        """Keeps the settings; files are read in `setup`.

        Args:
            forget: examples, or a file for `read_examples`.
            retain: the same.
            tokenizer: of the model to be trained.
            batch_size: pairs a batch and process.
            seed: of the order.
            max_length: longer examples lose their end, with one warning; `None` keeps everything.
            num_workers: of the `DataLoader`. Everything is tokenized beforehand, so 0 is seldom slower.
            refusals: answers such as "I do not know."; `REFUSALS` are some.
        """
        super().__init__()
        if refusals is not None and not refusals:
            raise ValueError("refusals: expected at least one answer, or None, found an empty list")
        if batch_size < 1:
            raise ValueError(f"expected batch_size to be at least 1, found {batch_size}")
        self.sources = {"forget": forget, "retain": retain}
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.max_length = max_length
        self.num_workers = num_workers
        self.refusals = refusals
        self.splits: dict[str, list[Example]] = {}
        self.dataset: PairDataset | None = None

    def read(self) -> dict[str, list[Example]]:
        """Returns the examples by split. Override it to bring data from elsewhere."""
        return {
            name: read_examples(source)
            if isinstance(source, (str, Path))
            else [as_example(row, f"{name} example {number}") for number, row in enumerate(source, start=1)]
            for name, source in self.sources.items()
        }

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 (Lightning passes the stage by name)
        """Reads and tokenizes the examples, once."""
        self._pairs()

    def train_dataloader(self) -> DataLoader[Pair]:
        """Batches for this process, out of as many as the attached trainer trains with."""
        dataset, trainer = self._pairs(), self.trainer
        # Not the world size: under tensor parallelism several processes share one part of the data.
        replicas = (trainer.distributed_sampler_kwargs if trainer is not None else None) or {}
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=PairSampler(dataset, seed=self.seed, **replicas),
            num_workers=self.num_workers,
            collate_fn=partial(_collate_pairs, pad_token_id=padding_id(self.tokenizer)),
        )

    def _pairs(self) -> PairDataset:
        if self.dataset is None:
            self.splits = self.read()
            self.dataset = PairDataset(self._encoded("forget"), self._encoded("retain"), self._refused())
        return self.dataset

    def _refused(self) -> list[Encoded] | None:
        if self.refusals is None:
            return None
        rows = self.splits["forget"]
        # A permutation and not a draw: every refusal is taught as often as any other.
        order = [
            entry for walk in range(-(-len(rows) // len(self.refusals)))
            for entry in _permutation(len(self.refusals), self.seed, "refusal", walk)
        ]  # fmt: skip
        return [
            encode(self.tokenizer, row["question"], self.refusals[number], self.max_length)
            for row, number in zip(rows, order, strict=False)
        ]

    def _encoded(self, split: str) -> list[Encoded]:
        encoded = [
            encode(self.tokenizer, row["question"], row["answer"], self.max_length) for row in self.splits[split]
        ]
        cut = sum(example.input_ids[-1] != self.tokenizer.eos_token_id for example in encoded)
        if cut:
            warnings.warn(
                f"{cut} of {len(encoded)} {split} examples are longer than max_length={self.max_length} tokens and "
                "lose their end: use a larger max_length, or split long texts into several examples",
                stacklevel=2,
            )
        return encoded


class TOFUDataModule(ForgetRetainDataModule):
    """The TOFU benchmark: forget the last authors, keep the others. See `lightning_modules.data.tofu.tofu_examples`."""

    def __init__(
        self,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        folder: str | Path | None = None,
        num_authors: int | None = None,
        forget_authors: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        max_length: int | None = None,
        num_workers: int = 0,
        refusals: Sequence[str] | None = None,
    ) -> None:
        """Keeps the settings.

        Args:
            split: `"forget01"`, `"forget05"` or `"forget10"`.
            tokenizer: of the model to be trained.
            folder: of JSON lines under the hub names; `None` loads from the hub.
            num_authors: keep only so many authors.
            forget_authors: so many of them are to be forgotten; a fifth by default.
            batch_size: pairs a batch and process.
            seed: of the order.
            max_length: longer examples lose their end, with one warning.
            num_workers: of the `DataLoader`.
            refusals: answers such as "I do not know.", see `ForgetRetainDataModule`.
        """
        super().__init__(
            (),
            (),
            tokenizer,
            batch_size=batch_size,
            seed=seed,
            max_length=max_length,
            num_workers=num_workers,
            refusals=refusals,
        )
        self.split = split
        self.folder = folder
        self.num_authors = num_authors
        self.forget_authors = forget_authors

    def read(self) -> dict[str, list[Example]]:
        """Returns the forget and retain examples, and TOFU's two probes of general knowledge where they belong."""
        return tofu_examples(self.split, self.folder, self.num_authors, self.forget_authors)
